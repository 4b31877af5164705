//! Generating text token by token.

use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::sampler::{Next, Sampler};
use crate::state::State;
use crate::tokenizer::{TextStream, Tokenizer};

/// Prompt tokens that are processed together: bounds memory and the wait for Ctrl-C.
const PREFILL_CHUNK: usize = 512;

/// When to stop, and how to report.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// The most tokens to generate; `None` for as many as fit.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Also stop at any special token, as the turn of a chat does.
    pub stop_at_special: bool,
    /// Never choose an end token: the answer goes on to the other limits.
    pub ignore_end: bool,
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
    /// The caller's sink asked to stop.
    Interrupted,
}

/// How long things took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Prompt tokens computed (tokens still in the cache are not).
    pub prefill_tokens: usize,
    /// Time for them.
    pub prefill: Duration,
    /// Tokens generated.
    pub decode_tokens: usize,
    /// Time for those after the first.
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
    /// How long it took.
    pub timings: Timings,
}

/// Continues `prompt`, handing text to `sink` as it appears; `sink` returns whether to go on.
/// What `state` already holds of the prompt is not computed again: `cached` are its tokens.
///
/// # Errors
/// [`Error::Usage`] if the prompt is empty or does not fit into the context.
pub fn generate(
    model: &Engine,
    tokenizer: &Tokenizer,
    state: &mut State,
    cached: &mut Vec<u32>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    mut sink: impl FnMut(&str) -> bool,
) -> Result<Generated> {
    if prompt.len() >= state.context() {
        return Err(Error::usage(format!(
            "the prompt has {} tokens, the context {}: shorten it or raise -c",
            prompt.len(),
            state.context()
        )));
    }
    if prompt.is_empty() {
        return Err(Error::usage("the prompt is empty; give some text"));
    }
    // Reuse the common start, but compute the last token again for its logits.
    let common = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let common = common.min(prompt.len().saturating_sub(1));
    state.truncate(common);
    cached.truncate(common);
    prompt.iter().for_each(|t| sampler.accept(*t));

    let mut timings = Timings { prefill_tokens: prompt.len() - common, ..Timings::default() };
    let started = Instant::now();
    let mut text = StopFilter::new(&options.stop);
    let mut tokens = Vec::new();
    let mut next = Next::default();
    let banned = if options.ignore_end { &tokenizer.eos[..] } else { &[] };
    for chunk in prompt[common..].chunks(PREFILL_CHUNK) {
        model.next(state, chunk, sampler, banned, &mut next)?;
        cached.extend_from_slice(chunk);
        // An empty text asks whether to go on.
        if !sink("") {
            timings.prefill = started.elapsed();
            return Ok(finish(tokens, text, Finish::Interrupted, timings));
        }
    }
    timings.prefill = started.elapsed();

    let mut stream = TextStream::new(tokenizer, prompt);
    let started = Instant::now();
    let reason = loop {
        if options.max_tokens.is_some_and(|n| tokens.len() >= n) {
            break Finish::Length;
        }
        let token = sampler.choose(&mut next, banned);
        if tokenizer.eos.contains(&token)
            || (options.stop_at_special && tokenizer.is_special(token))
        {
            break Finish::Stop;
        }
        tokens.push(token);
        let ready = text.push(&stream.push(token)?);
        if !sink(&ready) {
            break Finish::Interrupted;
        }
        if text.stopped {
            break Finish::Stop;
        }
        if options.max_tokens.is_some_and(|n| tokens.len() >= n) {
            break Finish::Length;
        }
        if state.len() >= state.context() {
            break Finish::Context;
        }
        model.next(state, &[token], sampler, banned, &mut next)?;
        cached.push(token);
    };
    let rest = stream.finish()?;
    let mut rest = text.push(&rest);
    rest.push_str(&text.flush());
    sink(&rest);
    timings.decode_tokens = tokens.len();
    timings.decode = started.elapsed();
    Ok(finish(tokens, text, reason, timings))
}

fn finish(tokens: Vec<u32>, text: StopFilter<'_>, finish: Finish, timings: Timings) -> Generated {
    Generated { tokens, text: text.released, finish, timings }
}

/// Holds back text that may turn out to be the beginning of a stop text.
struct StopFilter<'a> {
    stops: &'a [String],
    held: String,
    released: String,
    stopped: bool,
}

impl<'a> StopFilter<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new(), released: String::new(), stopped: false }
    }

    /// The text that can be shown after `new` has come in.
    fn push(&mut self, new: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(new);
        let found = self.stops.iter().filter(|s| !s.is_empty());
        if let Some(at) = found.filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return self.release(at);
        }
        let risky = |at: &usize| {
            let tail = &self.held[*at..];
            self.stops.iter().any(|s| s.starts_with(tail))
        };
        let starts = self.held.char_indices().map(|(at, _)| at);
        let safe = starts.into_iter().find(risky).unwrap_or(self.held.len());
        self.release(safe)
    }

    /// What was held back for nothing.
    fn flush(&mut self) -> String {
        self.release(self.held.len())
    }

    fn release(&mut self, bytes: usize) -> String {
        let text: String = self.held.drain(..bytes).collect();
        self.released.push_str(&text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut shown = String::new();
        for piece in pieces {
            shown.push_str(&filter.push(piece));
        }
        shown.push_str(&filter.flush());
        assert_eq!(shown, filter.released);
        (shown, filter.stopped)
    }

    #[test]
    fn stop_texts_are_found_across_pieces_and_never_shown() {
        assert_eq!(run(&["END"], &["abE", "N", "D more"]), ("ab".into(), true));
        assert_eq!(run(&["END"], &["abE", "Nx"]), ("abENx".into(), false));
        assert_eq!(run(&["aab"], &["aa", "ab"]), ("a".into(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&["long stop", "x"], &["lo", "x"]), ("lo".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&["END"], &["abEN"]), ("abEN".into(), false));
    }
}
