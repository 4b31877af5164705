//! What all answers have in common: identity, token counts, log probabilities.

use std::hash::{BuildHasher, RandomState};

use serde::Serialize;
use utoipa::ToSchema;

use super::models::Loaded;
use crate::generate::Finish;
use crate::scheduler::{TokenLogprob, Usage};

/// The log probability of impossible tokens: JSON has no infinity.
const IMPOSSIBLE: f32 = -9999.0;

/// Identity of a response.
#[derive(Clone, Debug)]
pub(crate) struct ReplyHead {
    pub id: String,
    pub created: i64,
    pub model: String,
}

impl ReplyHead {
    /// A new identity; `prefix` tells the kind of response.
    pub fn new(prefix: &str, model: &Loaded) -> Self {
        let created = chrono::Utc::now().timestamp();
        Self { id: format!("{prefix}-{}", random_name(24)), created, model: model.name.clone() }
    }
}

/// A random name of so many lower-case letters and digits.
pub(crate) fn random_name(length: usize) -> String {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // The standard library takes the keys of its hashers from the operating system.
    let state = RandomState::new();
    (0..length).map(|i| char::from(LETTERS[(state.hash_one(i) % 36) as usize])).collect()
}

/// Token counts of a response.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct UsageBody {
    /// Tokens of all prompts.
    prompt_tokens: usize,
    /// Tokens of all answers.
    completion_tokens: usize,
    /// Their sum.
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

/// Details of the prompt.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Tokens that were in the prefix cache.
    cached_tokens: usize,
}

/// Token counts and times; with several answers, the times of the slowest.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct TimingsBody {
    prompt_tokens: usize,
    cached_tokens: usize,
    /// Milliseconds until the first token, without the time in the queue.
    prompt_ms: f64,
    completion_tokens: usize,
    /// Milliseconds from the first to the last token.
    completion_ms: f64,
}

/// The counts of all answers of a response.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    timings: TimingsBody,
}

impl Totals {
    /// Adds an answer. Its prompt counts if it is the first answer to it.
    pub fn add(&mut self, usage: &Usage, first: bool) {
        let all = &mut self.timings;
        if first {
            all.prompt_tokens += usage.prompt_tokens;
            all.cached_tokens += usage.cached_tokens;
        }
        all.completion_tokens += usage.completion_tokens;
        all.prompt_ms = all.prompt_ms.max(usage.timings.prefill.as_secs_f64() * 1e3);
        all.completion_ms = all.completion_ms.max(usage.timings.decode.as_secs_f64() * 1e3);
    }

    pub fn timings(&self) -> TimingsBody {
        self.timings
    }

    /// Prompt tokens and tokens generated.
    pub fn counts(&self) -> (usize, usize) {
        (self.timings.prompt_tokens, self.timings.completion_tokens)
    }

    pub fn usage(&self) -> UsageBody {
        let (prompt_tokens, completion_tokens) = self.counts();
        UsageBody {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: self.timings.cached_tokens },
        }
    }
}

/// OpenAI's name for the end of an answer.
pub(crate) fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::Interrupted => "stop",
        Finish::Length | Finish::Context => "length",
    }
}

/// A token with its log probability.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct LogprobEntry {
    /// The text, with replacement characters for incomplete characters.
    pub token: String,
    /// The natural logarithm of the probability.
    pub logprob: f32,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens, best first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative of a token.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

impl LogprobEntry {
    pub fn new(model: &Loaded, token: u32, logprob: &TokenLogprob) -> Self {
        let bytes = |id: u32| model.token_bytes().get(id as usize).cloned().unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let alternative = |(id, logprob): &(u32, f32)| {
            let bytes = bytes(*id);
            TopLogprob { token: text(&bytes), logprob: logprob.max(IMPOSSIBLE), bytes }
        };
        let bytes = bytes(token);
        Self {
            token: text(&bytes),
            logprob: logprob.logprob.max(IMPOSSIBLE),
            bytes,
            top_logprobs: logprob.top.iter().map(alternative).collect(),
        }
    }
}
