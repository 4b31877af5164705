//! From a request to the events of its answers.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::calls::CallFormat;
use super::error::ApiError;
use super::grammar::GrammarConstraint;
use super::models::Loaded;
use super::sampling::Sampling;
use crate::generate::Finish;
use crate::scheduler::{Event, EventSink, Job, SubmitError, Usage};
use crate::tokenizer::Tokenizer;

/// The most answers of a request: prompts times answers to each.
const MAX_JOBS: usize = 64;

/// What to generate.
pub(crate) struct Order {
    /// The field that the prompts come from, for messages.
    pub field: &'static str,
    /// The tokens of each prompt.
    pub prompts: Vec<Vec<u32>>,
    pub sampling: Sampling,
    /// Report the log probability of each token and of so many alternatives.
    pub logprobs: Option<usize>,
    /// Whether special tokens end the answer, as in a chat.
    pub chat: bool,
    /// The format of calls to look for.
    pub calls: Option<CallFormat>,
    pub constraint: Option<GrammarConstraint>,
}

/// The answers of a request while they are generated. Dropping it cancels them.
pub(crate) struct Generation {
    /// The index of the answer with each event. Answers to one prompt follow each other. The channel has no bound,
    /// because the scheduler must not wait for a slow client; an answer has no more tokens than the context.
    events: UnboundedReceiver<(usize, Event)>,
    deadline: Instant,
    answers: usize,
}

impl Generation {
    /// Queues the jobs of a request.
    ///
    /// # Errors
    /// 400 for a prompt that is empty or too long, 429 if the queue is full, 503 if the server is shutting down.
    pub fn start(model: &Loaded, order: Order, timeout: Duration) -> Result<Self, ApiError> {
        let Order { field, prompts, sampling, logprobs, chat, calls, mut constraint } = order;
        let answers = prompts.len() * sampling.answers as usize;
        if answers > MAX_JOBS {
            let message =
                format!("the request asks for {answers} answers, but may ask for {MAX_JOBS}");
            return Err(ApiError::field("n", message));
        }
        let context = model.scheduler.context();
        for prompt in &prompts {
            if prompt.len() >= context {
                return Err(ApiError::too_long(field, prompt.len(), context));
            }
        }
        let specials =
            calls.filter(|_| chat).and_then(|format| Specials::of(&model.tokenizer, format));
        let (sender, events) = unbounded_channel();
        for (index, prompt) in
            prompts.iter().flat_map(|p| vec![p; sampling.answers as usize]).enumerate()
        {
            let number = index as u64 % u64::from(sampling.answers);
            let mut sampler = sampling.options.clone();
            // Answers to one prompt differ, and each is what its own seed gives.
            sampler.seed = sampler.seed.wrapping_add(number);
            let last = index + 1 == answers;
            let constraint = if last {
                constraint.take()
            } else {
                constraint.as_ref().map(GrammarConstraint::copy)
            };
            let job = Job {
                max_tokens: sampling.max_tokens,
                stop: sampling.stop.clone(),
                ignore_end: sampling.ignore_end,
                stop_at_special: chat && !sampling.ignore_end && specials.is_none(),
                logprobs,
                constraint: constraint.map(|c| Box::new(c) as _),
                ..Job::new(prompt.clone(), sampler)
            };
            let sink = sink(index, job.prompt.len(), sender.clone(), specials.clone());
            model.scheduler.submit(job, sink).map_err(|e| match e {
                SubmitError::Busy => ApiError::busy(),
                SubmitError::Closed => ApiError::unavailable("The server is shutting down."),
                SubmitError::Invalid(e) => ApiError::from(e).with_param(field),
            })?;
        }
        Ok(Self { events, deadline: Instant::now() + timeout, answers })
    }

    /// The number of answers.
    pub fn answers(&self) -> usize {
        self.answers
    }

    /// The next event and the index of its answer.
    ///
    /// # Errors
    /// 504 after the time limit; the error of an answer that failed; 500 if the scheduler has ended.
    pub async fn next(&mut self) -> Result<(usize, Event), ApiError> {
        match tokio::time::timeout_at(self.deadline, self.events.recv()).await {
            Err(_) => Err(ApiError::timeout()),
            Ok(None) => Err(ApiError::internal("The model has stopped answering.")),
            Ok(Some((_, Event::Failed(e)))) => Err(ApiError::of_job(&e)),
            Ok(Some(event)) => Ok(event),
        }
    }
}

/// Special tokens that begin a call, in models whose calls begin with one.
#[derive(Clone)]
struct Specials {
    tokenizer: Arc<Tokenizer>,
    markers: Vec<(u32, &'static str)>,
}

impl Specials {
    /// `None` if no marker of the format is a special token.
    fn of(tokenizer: &Arc<Tokenizer>, format: CallFormat) -> Option<Self> {
        let marker = |text: &&'static str| {
            let id = tokenizer.token_id(text).filter(|id| tokenizer.is_special(*id))?;
            Some((id, *text))
        };
        let markers: Vec<_> = format.markers().iter().filter_map(marker).collect();
        (!markers.is_empty()).then(|| Self { tokenizer: Arc::clone(tokenizer), markers })
    }
}

/// Sends the events of an answer to its request.
fn sink(
    index: usize,
    prompt_tokens: usize,
    channel: UnboundedSender<(usize, Event)>,
    specials: Option<Specials>,
) -> EventSink {
    let mut tokens = 0;
    Box::new(move |event| {
        let event = match (&specials, event) {
            (Some(specials), Event::Token { token, text, logprob })
                if specials.tokenizer.is_special(token) =>
            {
                match specials.markers.iter().find(|(id, _)| *id == token) {
                    // The text of special tokens is left out otherwise.
                    Some((_, marker)) => Event::Token { token, text: text + marker, logprob },
                    None => {
                        let usage =
                            Usage { prompt_tokens, completion_tokens: tokens, ..Usage::default() };
                        let _ = channel
                            .send((index, Event::Done { finish: Finish::Stop, text, usage }));
                        return ControlFlow::Break(());
                    }
                }
            }
            (_, event) => event,
        };
        tokens += 1;
        match channel.send((index, event)) {
            Ok(()) => ControlFlow::Continue(()),
            // The request was dropped: its client has gone, or its time is over.
            Err(_) => ControlFlow::Break(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "added_tokens": [
        {"id": 1, "content": "[TOOL_CALLS]", "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false, "special": true},
        {"id": 2, "content": "[INST]", "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false, "special": true}],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[TOOL_CALLS]": 1, "[INST]": 2}, "unk_token": "a"}}"#;

    #[test]
    fn special_tokens_begin_calls_or_end_answers() {
        let tokenizer = Arc::new(Tokenizer::new(TOKENIZER, None, vec![], 3).unwrap());
        assert!(Specials::of(&tokenizer, CallFormat::Llama3).is_none());
        let specials = Specials::of(&tokenizer, CallFormat::Mistral);
        let (sender, mut events) = unbounded_channel();
        let mut sink = sink(3, 7, sender, specials);
        let mut send = |token| sink(Event::Token { token, text: "x".into(), logprob: None });
        assert!(send(0).is_continue() && send(1).is_continue() && send(2).is_break());
        let mut texts = Vec::new();
        while let Ok((index, event)) = events.try_recv() {
            assert_eq!(index, 3);
            match event {
                Event::Token { text, .. } => texts.push(text),
                Event::Done { usage, .. } => {
                    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (7, 2));
                    texts.push("end".into());
                }
                Event::Failed(e) => panic!("{e}"),
            }
        }
        assert_eq!(texts, ["x", "x[TOOL_CALLS]", "end"]);
        drop(events);
        assert!(send(0).is_break());
    }
}
