//! Requests to a [`Session`](crate::Session) and its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::template::Message;

/// The input that an answer continues.
#[derive(Clone, Copy, Debug)]
pub enum PromptInput<'a> {
    /// A conversation. The model's chat template turns it into text. Without a template, the contents
    /// are joined by line breaks.
    Messages(&'a [Message]),
    /// A text to continue. A begin token is added if the model uses one.
    Text(&'a str),
    /// Token ids, used unchanged.
    Tokens(&'a [u32]),
}

/// A prompt with stopping conditions.
#[derive(Clone, Copy, Debug)]
pub struct GenerateRequest<'a> {
    /// The input that the answer continues.
    pub prompt: PromptInput<'a>,
    /// The largest number of tokens to generate; `None` for as many as fit into the context.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: &'a [String],
    /// Never choose an end token.
    pub ignore_end: bool,
    /// Lets another thread stop the answer.
    pub cancel: Option<&'a CancelToken>,
}

impl<'a> GenerateRequest<'a> {
    /// A request that ends with an end token or a full context.
    #[must_use]
    pub fn new(prompt: PromptInput<'a>) -> Self {
        Self { prompt, max_tokens: None, stop: &[], ignore_end: false, cancel: None }
    }

    /// Whether the cancel token has stopped the answer.
    pub(crate) fn is_canceled(&self) -> bool {
        self.cancel.is_some_and(CancelToken::is_canceled)
    }

    /// Whether an answer of `tokens` tokens has reached `max_tokens`.
    pub(crate) fn is_full(&self, tokens: usize) -> bool {
        self.max_tokens.is_some_and(|most| tokens >= most)
    }
}

/// Stops an answer from another thread. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Stops the answer. Returns whether the token was already canceled.
    pub fn cancel(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether [`CancelToken::cancel`] was called since the last reset.
    #[must_use]
    pub fn is_canceled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Clears the flag for the next answer.
    pub fn reset(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// A step of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The token of this step; `None` for text that remains after the last token.
    pub token: Option<u32>,
    /// The text that can be shown now; empty inside a character or a possible stop text.
    pub text: &'a str,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token, a special token or a stop text.
    Stop,
    /// The answer has [`GenerateRequest::max_tokens`] tokens.
    Length,
    /// The context is full.
    Context,
    /// The sink or the cancel token stopped the answer.
    Interrupted,
}

/// Token counts and times of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Prompt tokens that were in the KV cache already.
    pub reused_tokens: usize,
    /// Prompt tokens computed.
    pub prefill_tokens: usize,
    /// Time of the prefill.
    pub prefill: Duration,
    /// Tokens generated.
    pub decode_tokens: usize,
    /// Time of the decoding. The prefill computes the logits of the first token.
    pub decode: Duration,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The generated tokens, without the end token.
    pub tokens: Vec<u32>,
    /// The streamed text.
    pub text: String,
    /// Why the answer ended.
    pub finish: Finish,
    /// Token counts and times.
    pub timings: Timings,
}
