//! [`Session`]: generates text with a model and keeps the KV cache between requests.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::{Finish, GenerateRequest, Generated, Piece, PromptInput, Timings};
use crate::linear::RowKind;
use crate::sampler::{Sampler, SamplerInput, SamplerOptions};
use crate::state::State;
use crate::stop::StopFilter;
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::{TextStream, Tokenizer};

/// Prompt tokens per call: bounds the memory and the delay of a cancellation.
const PREFILL_CHUNK: usize = 512;

/// Options of a [`Session`].
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// The largest number of tokens in the KV cache; `None` for the context length of the model.
    pub context: Option<usize>,
    /// Whether to use the chat template of the model, if it has one.
    pub template: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { context: None, template: true }
    }
}

/// A model with its tokenizer, chat template and KV cache.
///
/// The prefix that a prompt shares with the cached tokens is reused.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
/// use stb_runtime::{
///     GenerateRequest, Message, Engine, OpenOptions, PromptInput, Sampler, Session, SessionOptions,
/// };
///
/// let engine = Arc::new(Engine::open("model.stb".as_ref(), &OpenOptions::default())?);
/// let mut session = Session::new(engine, SessionOptions::default())?;
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
    engine: Arc<Engine>,
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
    /// [`Error::Invalid`] if the tokenizer or the template of the model is missing or broken.
    pub fn new(engine: Arc<Engine>, options: SessionOptions) -> Result<Self> {
        let tokenizer = Arc::new(engine.model.tokenizer()?);
        let template = match options.template {
            true => engine.model.chat_template(&tokenizer)?.map(Arc::new),
            false => None,
        };
        let context = options.context.unwrap_or(engine.model.spec.context_length as usize);
        let state = State::new(&engine, context);
        Ok(Self { engine, tokenizer, template, state, cached: Vec::new() })
    }

    /// A session without cached tokens that shares the engine, tokenizer and template of this one.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            engine: Arc::clone(&self.engine),
            tokenizer: Arc::clone(&self.tokenizer),
            template: self.template.clone(),
            state: State::new(&self.engine, self.state.context()),
            cached: Vec::new(),
        }
    }

    /// The engine with its model.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokenizer of the model.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether a chat template formats messages.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The tokens in the KV cache.
    #[must_use]
    pub fn cached(&self) -> &[u32] {
        &self.cached
    }

    /// The largest number of tokens in the KV cache.
    #[must_use]
    pub fn context(&self) -> usize {
        self.state.context()
    }

    /// Bytes of the keys and values of the tokens in the KV cache.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        self.state.cache_bytes()
    }

    /// Sampling parameters from the model file, with the values of [`SamplerOptions::default`] for
    /// missing ones.
    #[must_use]
    pub fn suggested_sampling(&self) -> SamplerOptions {
        self.engine.model.suggested_sampling()
    }

    /// The token ids of a prompt.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the template rejects the messages or the tokenizer fails.
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

    /// Answers `request`. `sink` is called with every piece of the answer; `Break` stops the answer.
    ///
    /// # Errors
    /// [`Error::Usage`] if the prompt is empty or does not fit into the context; [`Error::Invalid`] as for
    /// [`Session::encode`]; [`Error::Device`] if the device fails.
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
                "the prompt has {} tokens, but the context only {}: shorten it or raise -c",
                prompt.len(),
                self.state.context()
            )));
        }
        if prompt.is_empty() {
            return Err(Error::usage("the prompt is empty"));
        }
        Ok(())
    }

    /// Computes the tokens of `prompt` that are not in the KV cache. Returns `Break` if the request was
    /// canceled.
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
        answer.sampler.start(prompt);
        answer.timings.reused_tokens = common;
        answer.timings.prefill_tokens = prompt.len() - common;
        let started = Instant::now();
        let mut flow = ControlFlow::Continue(());
        let kind = RowKind::of_prompt(prompt.len());
        for chunk in prompt[common..].chunks(PREFILL_CHUNK) {
            self.append((chunk, kind), answer)?;
            if answer.request.is_canceled() {
                flow = ControlFlow::Break(());
                break;
            }
        }
        answer.timings.prefill = started.elapsed();
        Ok(flow)
    }

    /// Generates tokens until the answer ends.
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
            self.append((&[token], RowKind::Decode), answer)?;
        };
        answer.finish()?;
        answer.timings.decode_tokens = answer.tokens.len();
        answer.timings.decode = started.elapsed();
        Ok(finish)
    }

    /// Appends tokens to the KV cache and stores the input of the sampler for the next token.
    fn append<S>(&mut self, tokens: (&[u32], RowKind), answer: &mut Answer<'_, S>) -> Result<()> {
        let Answer { sampler, banned, input, .. } = answer;
        self.engine.sampled(&mut self.state, tokens, sampler, banned, input)?;
        self.cached.extend_from_slice(tokens.0);
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
    text: StopFilter,
    tokens: Vec<u32>,
    timings: Timings,
}

impl<S: FnMut(Piece<'_>) -> ControlFlow<()>> Answer<'_, S> {
    /// Sends a token and the text that it completes to the sink.
    fn push(&mut self, token: u32) -> Result<ControlFlow<()>> {
        self.tokens.push(token);
        let text = self.text.push(&self.stream.push(token)?);
        Ok((self.sink)(Piece { token: Some(token), text: &text }))
    }

    /// Sends the text that was held back to the sink.
    fn finish(&mut self) -> Result<()> {
        let mut rest = self.text.push(&self.stream.finish()?);
        rest.push_str(&self.text.flush());
        // The answer has ended, so `Break` has no effect.
        let _ = (self.sink)(Piece { token: None, text: &rest });
        Ok(())
    }
}
