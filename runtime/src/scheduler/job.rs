//! What a [`Scheduler`](super::Scheduler) is asked for, and what it reports.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::generate::{Finish, Timings};
use crate::sampler::SamplerOptions;

/// One answer to generate.
pub struct Job {
    /// The tokens that the answer continues; not empty.
    pub prompt: Vec<u32>,
    /// The largest number of tokens to generate; `None` for as many as fit into the context.
    pub max_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Never choose an end token.
    pub ignore_end: bool,
    /// Whether any special token ends the answer, as in a chat.
    pub stop_at_special: bool,
    /// Report the log probability of each token and of the given number of most likely tokens.
    pub logprobs: Option<usize>,
    /// A grammar that the answer follows.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Job {
    /// A job that ends with an end token or a full context.
    #[must_use]
    pub fn new(prompt: Vec<u32>, sampler: SamplerOptions) -> Self {
        Self {
            prompt,
            max_tokens: None,
            sampler,
            stop: Vec::new(),
            ignore_end: false,
            stop_at_special: false,
            logprobs: None,
            constraint: None,
        }
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("prompt_tokens", &self.prompt.len())
            .field("max_tokens", &self.max_tokens)
            .field("sampler", &self.sampler)
            .finish_non_exhaustive()
    }
}

/// Restricts the tokens of one answer, for example to those that a grammar accepts.
pub trait Constraint: Send {
    /// Forbids in `allowed`, in which every token is allowed, the tokens that may not come next.
    ///
    /// # Errors
    /// If the constraint cannot be computed; the answer then fails with the error.
    fn mask(&mut self, allowed: &mut TokenMask) -> Result<()>;

    /// Is told the token that was chosen, unless it ends the answer.
    ///
    /// # Errors
    /// If the token was not allowed; the answer then fails with the error.
    fn accept(&mut self, token: u32) -> Result<()>;

    /// Whether the answer may end here. End tokens are allowed exactly then, whatever the mask says.
    fn may_end(&self) -> bool;
}

/// Which tokens of the vocabulary may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `t % 32` of word `t / 32` is set if token `t` is allowed.
    words: Vec<u32>,
    tokens: usize,
}

impl TokenMask {
    /// A mask that allows all of `tokens` tokens.
    #[must_use]
    pub fn new(tokens: usize) -> Self {
        let mut mask = Self { words: vec![0; tokens.div_ceil(32)], tokens };
        mask.allow_all();
        mask
    }

    /// The number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Allows all tokens.
    pub fn allow_all(&mut self) {
        self.words.fill(u32::MAX);
    }

    /// Forbids all tokens.
    pub fn forbid_all(&mut self) {
        self.words.fill(0);
    }

    /// Allows or forbids `token`; a token outside the vocabulary is ignored.
    pub fn set(&mut self, token: u32, allowed: bool) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            let bit = 1 << (token % 32);
            *word = if allowed { *word | bit } else { *word & !bit };
        }
    }

    /// Whether `token` is allowed.
    #[must_use]
    pub fn is_allowed(&self, token: u32) -> bool {
        let word = self.words.get(token as usize / 32);
        (token as usize) < self.tokens && word.is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The bits: token `t` is bit `t % 32` of word `t / 32`. Bits past the last token mean nothing.
    pub fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }
}

/// A step of an answer.
#[derive(Debug)]
pub enum Event {
    /// A token, with the text that can be shown now: empty inside a character or a possible stop text.
    Token {
        /// The token.
        token: u32,
        /// The text.
        text: String,
        /// Its log probability, if the job asks for it.
        logprob: Option<TokenLogprob>,
    },
    /// The answer is complete. No event follows.
    Done {
        /// Why it ended.
        finish: Finish,
        /// The text that was held back.
        text: String,
        /// Token counts and times.
        usage: Usage,
    },
    /// The answer failed. No event follows.
    Failed(Error),
}

/// The log probability of a token, by the model's distribution before penalties, temperature and constraints.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The natural logarithm of the probability.
    pub logprob: f32,
    /// The most likely tokens with their log probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Token counts and times of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, without the token that ended the answer.
    pub completion_tokens: usize,
    /// Times. The prefill includes what other sequences computed in the same passes, but not the time in the
    /// queue.
    pub timings: Timings,
}

/// Receives the events of a job on the thread of the scheduler, so it must not block. `Break` cancels the job:
/// the client has gone. The slot is then free before the next token.
pub type EventSink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// Receives the embedding of a text, `[hidden]`: the mean over its tokens of the hidden state after the last norm.
pub type EmbeddingSink = Box<dyn FnOnce(Result<Vec<f32>>) + Send>;

/// A job that was accepted. Dropping the ticket does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The number of the job, counted from 1.
    pub id: u64,
}

/// Why a job was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the queue is full; try again later")]
    Busy,
    /// The scheduler finishes what is running and accepts no more jobs.
    #[error("the server is shutting down")]
    Closed,
    /// The job is wrong, for example its prompt does not fit into the context.
    #[error(transparent)]
    Invalid(#[from] Error),
}
