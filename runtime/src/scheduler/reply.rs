//! [`Reply`]: one job in progress, from logits to events.

use std::ops::ControlFlow;
use std::time::Instant;

use super::job::{Event, EventSink, Job, TokenLogprob, TokenMask, Usage};
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::sampler::Sampler;
use crate::stop::StopFilter;
use crate::tokenizer::{TextStream, Tokenizer};

/// How a step of an answer went.
#[derive(Debug)]
pub(super) enum Step {
    /// The answer continues with this token.
    Next(u32),
    /// The answer has ended.
    Ended(Finish),
    /// The client has gone.
    Gone,
}

/// A job in progress.
pub(super) struct Reply<'t> {
    tokenizer: &'t Tokenizer,
    sink: EventSink,
    job: Job,
    sampler: Sampler,
    stream: TextStream<'t>,
    text: StopFilter,
    mask: TokenMask,
    started: Instant,
    first_token: Option<Instant>,
    usage: Usage,
}

impl<'t> Reply<'t> {
    /// The answer to `prompt`, which has been taken out of `job`.
    pub(super) fn new(
        job: Job,
        prompt: &[u32],
        sink: EventSink,
        (tokenizer, vocab): (&'t Tokenizer, usize),
    ) -> Self {
        let mut sampler = Sampler::new(job.sampler.clone());
        sampler.start(prompt);
        Self {
            tokenizer,
            sink,
            sampler,
            stream: TextStream::new(tokenizer, prompt),
            text: StopFilter::new(&job.stop),
            mask: TokenMask::new(if job.constraint.is_some() { vocab } else { 0 }),
            started: Instant::now(),
            first_token: None,
            usage: Usage { prompt_tokens: prompt.len(), ..Usage::default() },
            job,
        }
    }

    /// The number of tokens generated.
    pub(super) fn tokens(&self) -> usize {
        self.usage.completion_tokens
    }

    /// Whether the answer has as many tokens as were asked for.
    pub(super) fn is_full(&self) -> bool {
        self.job.max_tokens.is_some_and(|most| self.usage.completion_tokens >= most)
    }

    /// Chooses the next token from `logits`, `[vocab]`, which may be changed, and sends it to the client.
    /// `has_room` says whether the token fits into the context.
    ///
    /// # Errors
    /// Those of the constraint and of the tokenizer.
    pub(super) fn step(&mut self, logits: &mut [f32], has_room: bool) -> Result<Step> {
        let log_probabilities = self.job.logprobs.map(|top| LogProbabilities::new(logits, top));
        if !self.restrict(logits)? {
            return Ok(Step::Ended(Finish::Stop));
        }
        let token = self.sampler.sample(logits);
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        let special = self.job.stop_at_special && self.tokenizer.is_special(token);
        if special || self.tokenizer.eos.contains(&token) {
            return Ok(Step::Ended(Finish::Stop));
        }
        if let Some(constraint) = &mut self.job.constraint {
            constraint.accept(token)?;
        }
        let text = self.text.push(&self.stream.push(token)?);
        self.usage.completion_tokens += 1;
        let logprob = log_probabilities.map(|d| d.of(token));
        if (self.sink)(Event::Token { token, text, logprob }).is_break() {
            return Ok(Step::Gone);
        }
        Ok(if self.text.stopped {
            Step::Ended(Finish::Stop)
        } else if self.is_full() {
            Step::Ended(Finish::Length)
        } else if !has_room {
            Step::Ended(Finish::Context)
        } else {
            Step::Next(token)
        })
    }

    /// Sets the logits of forbidden tokens to −∞. Returns false if the answer can only end.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<bool> {
        let eos = &self.tokenizer.eos;
        let Some(constraint) = &mut self.job.constraint else {
            if self.job.ignore_end {
                forbid(logits, eos);
            }
            return Ok(true);
        };
        self.mask.allow_all();
        constraint.mask(&mut self.mask)?;
        let may_end = constraint.may_end();
        eos.iter().for_each(|token| self.mask.set(*token, may_end && !self.job.ignore_end));
        let mut any = false;
        for (token, logit) in logits.iter_mut().enumerate() {
            if self.mask.is_allowed(token as u32) {
                any = true;
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        if !any && !may_end {
            return Err(Error::invalid("the grammar allows no token here and does not end here"));
        }
        Ok(any)
    }

    /// Sends the rest of the text and the counts; `cached` tokens of the prompt were in the prefix cache.
    pub(super) fn finish(mut self, finish: Finish, cached: usize) {
        let rest = match self.stream.finish() {
            Ok(rest) => rest,
            Err(e) => {
                return self.fail(e);
            }
        };
        let mut text = self.text.push(&rest);
        text.push_str(&self.text.flush());
        let now = Instant::now();
        let first = self.first_token.unwrap_or(now);
        self.usage.cached_tokens = cached;
        let timings = &mut self.usage.timings;
        timings.reused_tokens = cached;
        timings.prefill_tokens = self.usage.prompt_tokens - cached;
        timings.prefill = first - self.started;
        timings.decode = now - first;
        timings.decode_tokens = self.usage.completion_tokens;
        let _: ControlFlow<()> = (self.sink)(Event::Done { finish, text, usage: self.usage });
    }

    /// Sends the error that ended the answer.
    pub(super) fn fail(mut self, error: Error) {
        let _: ControlFlow<()> = (self.sink)(Event::Failed(error));
    }
}

fn forbid(logits: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The log probabilities of a step.
struct LogProbabilities {
    logits: Vec<f32>,
    /// The logarithm of the sum of all exp(logit).
    log_sum: f64,
    top: Vec<(u32, f32)>,
}

impl LogProbabilities {
    fn new(logits: &[f32], top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
        let log_sum = sum.ln() + f64::from(largest);
        let by_logit =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let top = top.min(order.len());
        if top > 0 && top < order.len() {
            order.select_nth_unstable_by(top - 1, by_logit);
        }
        order.truncate(top);
        order.sort_unstable_by(by_logit);
        let log = |token: u32| (f64::from(logits[token as usize]) - log_sum) as f32;
        let top = order.into_iter().map(|token| (token, log(token))).collect();
        Self { logits: logits.to_vec(), log_sum, top }
    }

    fn of(self, token: u32) -> TokenLogprob {
        let logit = f64::from(self.logits[token as usize]);
        TokenLogprob { logprob: (logit - self.log_sum) as f32, top: self.top }
    }
}
