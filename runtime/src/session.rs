//! A conversation with a model.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::forward::State;
use crate::generate::{Finish, GenerateRequest, Generated, Piece, PromptInput, Timings};
use crate::model::Model;
use crate::sampler::{Sampler, SamplerInput, SamplerOptions};
use crate::stop::StopFilter;
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::{TextStream, Tokenizer};

/// Prompt tokens per pass: bounds memory and the wait after a cancellation.
const PREFILL_CHUNK: usize = 512;

/// How a [`Session`] is set up.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Tokens of the KV cache; `None` for the context length of the model.
    pub context: Option<usize>,
    /// Use the chat template of the model, if it has one.
    pub template: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { context: None, template: true }
    }
}

/// A model with its tokenizer, chat template and KV cache.
///
/// The start that a prompt shares with the cached tokens is not computed again.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
/// use stb_runtime::{
///     GenerateRequest, Message, Model, OpenOptions, PromptInput, Sampler, Session, SessionOptions,
/// };
///
/// let model = Arc::new(Model::open("model.stb".as_ref(), &OpenOptions::default())?);
/// let mut session = Session::new(model, SessionOptions::default())?;
/// let mut sampler = Sampler::new(session.suggested_sampling());
/// let messages = [Message::new("user", "Tell me a story.")];
/// let request = GenerateRequest::new(PromptInput::Messages(&messages));
/// let answer = session.generate(&request, &mut sampler, |piece| {
///     // Show `piece.text`.
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), stb_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Session {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    state: State,
    /// Tokens in `state`.
    cached: Vec<u32>,
}

impl Session {
    /// A session without cached tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if tokenizer or template of the model cannot be used.
    pub fn new(model: Arc<Model>, options: SessionOptions) -> Result<Self> {
        let tokenizer = Arc::new(model.tokenizer()?);
        let template = match options.template {
            true => model.chat_template(&tokenizer)?.map(Arc::new),
            false => None,
        };
        let context = options.context.unwrap_or(model.spec.context_length as usize);
        let state = State::new(&model, context);
        Ok(Self { model, tokenizer, template, state, cached: Vec::new() })
    }

    /// A session without cached tokens that shares model, tokenizer and template with this one.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            model: Arc::clone(&self.model),
            tokenizer: Arc::clone(&self.tokenizer),
            template: self.template.clone(),
            state: State::new(&self.model, self.state.context()),
            cached: Vec::new(),
        }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokenizer of the model.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether messages are turned into text by a chat template.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The tokens in the KV cache.
    #[must_use]
    pub fn cached(&self) -> &[u32] {
        &self.cached
    }

    /// The sampling that the model file suggests; our defaults where it suggests nothing.
    #[must_use]
    pub fn suggested_sampling(&self) -> SamplerOptions {
        let default = SamplerOptions::default();
        let file = |key: &str| self.model.sampling_default(key);
        let number = |key: &str, default: f32| file(key).map_or(default, |v| v as f32);
        SamplerOptions {
            repeat_penalty: number("repetition_penalty", default.repeat_penalty),
            repeat_last: default.repeat_last,
            temperature: number("temperature", default.temperature),
            top_k: file("top_k").map_or(default.top_k, |v| v as usize),
            top_p: number("top_p", default.top_p),
            min_p: number("min_p", default.min_p),
            seed: default.seed,
        }
    }

    /// The token ids of a prompt.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the template refuses the messages or the tokenizer fails.
    pub fn encode(&self, prompt: PromptInput<'_>) -> Result<Vec<u32>> {
        match prompt {
            PromptInput::Tokens(tokens) => Ok(tokens.to_vec()),
            PromptInput::Text(text) => self.tokenizer.encode_prompt(text),
            PromptInput::Messages(messages) => {
                self.tokenizer.encode_prompt(&self.conversation_text(messages)?)
            }
        }
    }

    fn conversation_text(&self, messages: &[Message]) -> Result<String> {
        match &self.template {
            Some(template) => template.render(messages),
            None => {
                let text: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                Ok(text.join("\n"))
            }
        }
    }

    /// Answers `request`. `sink` gets every piece of the answer when it is ready, and can stop it.
    ///
    /// # Errors
    /// [`Error::Usage`] if the prompt is empty or does not fit into the context; [`Error::Invalid`] as for
    /// [`Session::encode`]; errors of a device.
    pub fn generate(
        &mut self,
        request: &GenerateRequest<'_>,
        sampler: &mut Sampler,
        sink: impl FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let prompt = self.encode(request.prompt)?;
        self.check_length(&prompt)?;
        let tokenizer = Arc::clone(&self.tokenizer);
        let chat = matches!(request.prompt, PromptInput::Messages(_)) && self.has_template();
        let mut answer = Answer {
            request,
            sampler,
            sink,
            banned: if request.ignore_end { &tokenizer.eos } else { &[] },
            stop_at_special: chat && !request.ignore_end,
            input: SamplerInput::default(),
            stream: TextStream::new(&tokenizer, &prompt),
            text: StopFilter::new(request.stop),
            tokens: Vec::new(),
            timings: Timings::default(),
        };
        let finish = match self.prefill(&prompt, &mut answer)? {
            ControlFlow::Continue(()) => self.decode(&tokenizer, &mut answer)?,
            ControlFlow::Break(()) => Finish::Interrupted,
        };
        let Answer { tokens, text, timings, .. } = answer;
        Ok(Generated { tokens, text: text.released, finish, timings })
    }

    fn check_length(&self, prompt: &[u32]) -> Result<()> {
        if prompt.len() >= self.state.context() {
            return Err(Error::usage(format!(
                "the prompt has {} tokens, the context {}: shorten it or raise -c",
                prompt.len(),
                self.state.context()
            )));
        }
        if prompt.is_empty() {
            return Err(Error::usage("the prompt is empty; give some text"));
        }
        Ok(())
    }

    /// Computes what the KV cache lacks of `prompt`; breaks if the request was canceled.
    fn prefill<S>(
        &mut self,
        prompt: &[u32],
        answer: &mut Answer<'_, S>,
    ) -> Result<ControlFlow<()>> {
        // The last token is always computed: its logits are needed.
        let common = self.cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let common = common.min(prompt.len().saturating_sub(1));
        self.state.truncate(common);
        self.cached.truncate(common);
        prompt.iter().for_each(|t| answer.sampler.accept(*t));
        answer.timings.prefill_tokens = prompt.len() - common;
        let started = Instant::now();
        let mut flow = ControlFlow::Continue(());
        for chunk in prompt[common..].chunks(PREFILL_CHUNK) {
            self.append(chunk, answer)?;
            if answer.request.is_canceled() {
                flow = ControlFlow::Break(());
                break;
            }
        }
        answer.timings.prefill = started.elapsed();
        Ok(flow)
    }

    /// Generates tokens until something ends the answer.
    fn decode<S: FnMut(Piece<'_>) -> ControlFlow<()>>(
        &mut self,
        tokenizer: &Tokenizer,
        answer: &mut Answer<'_, S>,
    ) -> Result<Finish> {
        let started = Instant::now();
        let finish = loop {
            if answer.request.is_full(answer.tokens.len()) {
                break Finish::Length;
            }
            let token = answer.sampler.choose(&mut answer.input, answer.banned);
            let special = answer.stop_at_special && tokenizer.is_special(token);
            if special || tokenizer.eos.contains(&token) {
                break Finish::Stop;
            }
            if answer.push(token)?.is_break() || answer.request.is_canceled() {
                break Finish::Interrupted;
            }
            if answer.text.stopped {
                break Finish::Stop;
            }
            if answer.request.is_full(answer.tokens.len()) {
                break Finish::Length;
            }
            if self.state.len() >= self.state.context() {
                break Finish::Context;
            }
            self.append(&[token], answer)?;
        };
        answer.finish()?;
        answer.timings.decode_tokens = answer.tokens.len();
        answer.timings.decode = started.elapsed();
        Ok(finish)
    }

    /// Appends tokens to the KV cache and keeps what the sampler needs to choose the next one.
    fn append<S>(&mut self, tokens: &[u32], answer: &mut Answer<'_, S>) -> Result<()> {
        let Answer { sampler, banned, input, .. } = answer;
        self.model.next(&mut self.state, tokens, sampler, banned, input)?;
        self.cached.extend_from_slice(tokens);
        Ok(())
    }
}

/// An answer in progress.
struct Answer<'a, S> {
    request: &'a GenerateRequest<'a>,
    sampler: &'a mut Sampler,
    sink: S,
    banned: &'a [u32],
    stop_at_special: bool,
    input: SamplerInput,
    stream: TextStream<'a>,
    text: StopFilter<'a>,
    tokens: Vec<u32>,
    timings: Timings,
}

impl<S: FnMut(Piece<'_>) -> ControlFlow<()>> Answer<'_, S> {
    /// Hands a token and the text that it completes to the sink.
    fn push(&mut self, token: u32) -> Result<ControlFlow<()>> {
        self.tokens.push(token);
        let text = self.text.push(&self.stream.push(token)?);
        Ok((self.sink)(Piece { token: Some(token), text: &text }))
    }

    /// Hands the text to the sink that was held back.
    fn finish(&mut self) -> Result<()> {
        let mut rest = self.text.push(&self.stream.finish()?);
        rest.push_str(&self.text.flush());
        // The answer ends here, whatever the sink says.
        let _ = (self.sink)(Piece { token: None, text: &rest });
        Ok(())
    }
}
