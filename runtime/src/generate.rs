//! What a [`Session`](crate::Session) is asked for, and what it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::template::Message;

/// The text before an answer.
#[derive(Clone, Copy, Debug)]
pub enum PromptInput<'a> {
    /// A conversation. The model's chat template turns it into text; without a template the contents are joined by
    /// line breaks and continued.
    Messages(&'a [Message]),
    /// A text to continue. A begin token is added if the model wants one.
    Text(&'a str),
    /// Token ids, used unchanged.
    Tokens(&'a [u32]),
}

/// A prompt, and when to stop.
#[derive(Clone, Copy, Debug)]
pub struct GenerateRequest<'a> {
    /// The text before the answer.
    pub prompt: PromptInput<'a>,
    /// The most tokens to generate; `None` for as many as fit into the context.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer. They are not part of it.
    pub stop: &'a [String],
    /// Never choose an end token: only the other limits end the answer.
    pub ignore_end: bool,
    /// Another thread can stop the answer with this token.
    pub cancel: Option<&'a CancelToken>,
}

impl<'a> GenerateRequest<'a> {
    /// A request without limits of its own.
    #[must_use]
    pub fn new(prompt: PromptInput<'a>) -> Self {
        Self { prompt, max_tokens: None, stop: &[], ignore_end: false, cancel: None }
    }

    /// Whether another thread has stopped the answer.
    pub(crate) fn is_canceled(&self) -> bool {
        self.cancel.is_some_and(CancelToken::is_canceled)
    }

    /// Whether an answer of `tokens` tokens is as long as the request allows.
    pub(crate) fn is_full(&self, tokens: usize) -> bool {
        self.max_tokens.is_some_and(|most| tokens >= most)
    }
}

/// Stops an answer from another thread. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks to stop, and returns whether that had been asked before.
    pub fn cancel(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether [`CancelToken::cancel`] was called since the last reset.
    #[must_use]
    pub fn is_canceled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Makes the token ready for the next answer.
    pub fn reset(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// A step of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The token of this step; `None` for text that remains after the last token.
    pub token: Option<u32>,
    /// The text that can be shown now. It is empty inside a character, and inside what may become a stop text.
    pub text: &'a str,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token, a special token or a stop text.
    Stop,
    /// The number of tokens asked for.
    Length,
    /// The context is full.
    Context,
    /// The sink or the cancel token asked to stop.
    Interrupted,
}

/// Token counts and times of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Prompt tokens computed. Tokens that were in the KV cache do not count.
    pub prefill_tokens: usize,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Tokens generated.
    pub decode_tokens: usize,
    /// Time for them. The logits of the first one come from the prompt.
    pub decode: Duration,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// The text as it was streamed.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Token counts and times.
    pub timings: Timings,
}
