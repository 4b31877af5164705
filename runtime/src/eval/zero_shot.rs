//! Multiple-choice accuracy with the rules of lm-evaluation-harness (version 0.4.13,
//! `output_type: multiple_choice`). The score of a choice is ln p(continuation | context). `acc` selects
//! the highest score, `acc_norm` the highest score per character of the choice; ties go to the first
//! choice. Text that does not fit into the context is truncated at the left.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::distribution::Distribution;
use super::estimate::Estimate;
use super::open::is_small;
use super::tasks::{ChoicePrompt, Question, Task};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::linear::RowKind;
use crate::pass::{Output, OutputKind, Segment};
use crate::state::State;
use crate::tokenizer::Tokenizer;

/// Questions that are computed together: a product over packed weights takes little more time for the rows of all of
/// them than for those of one.
const BATCH: usize = 16;

/// Options of [`zero_shot`].
#[derive(Clone, Copy, Debug)]
pub struct ZeroShotOptions {
    /// The largest number of input tokens.
    pub context: usize,
    /// Whether each context starts with a begin token, if texts of the model do. This is the default
    /// of harness version 0.4.13; early 0.4 versions never added one.
    pub begin: bool,
}

/// The score of one choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// ln p(continuation | context).
    pub log_likelihood: f64,
    /// Whether the context was truncated.
    pub truncated: bool,
}

/// The accuracy of a model on a task.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// The task.
    pub task: Task,
    /// The number of questions.
    pub items: usize,
    /// Fraction of correct answers by likelihood.
    pub acc: Estimate,
    /// Fraction of correct answers by likelihood per character; `None` for tasks without `acc_norm` in
    /// the harness.
    pub acc_norm: Option<Estimate>,
    /// The number of questions whose context was truncated.
    pub truncated: usize,
}

/// Measures the accuracy of a model on the questions of a task. `progress(done, total)` is called
/// after some questions.
///
/// # Errors
/// [`Error::Usage`] if a choice does not fit into the context; [`Error::Invalid`] if logits are not
/// finite or the tokenizer fails; [`Error::Device`] if the device fails.
pub fn zero_shot(
    engine: &Engine,
    tokenizer: &Tokenizer,
    task: Task,
    items: &[Question],
    options: &ZeroShotOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<TaskResult> {
    let done = AtomicUsize::new(0);
    let measure = |states: &mut Vec<State>, questions: &[Question]| {
        let scores = score_questions(engine, states, tokenizer, questions, options)?;
        let before = done.fetch_add(questions.len(), Ordering::Relaxed);
        progress(before + questions.len(), items.len());
        Ok(scores)
    };
    // A device computes one sequence at a time.
    let batch = if engine.device_name().is_some() { 1 } else { BATCH };
    let new_states = || (0..batch).map(|_| State::new(engine, options.context)).collect();
    let found: Vec<Vec<Vec<Score>>> = if is_small(engine) {
        items.par_chunks(batch).map_init(new_states, measure).collect::<Result<_>>()?
    } else {
        let mut states = new_states();
        items.chunks(batch).map(|items| measure(&mut states, items)).collect::<Result<_>>()?
    };
    let found = found.concat();
    let correct = |per_character: bool| {
        let outcomes = items.iter().zip(&found).map(move |(item, scores)| {
            let value = |(score, prompt): (&Score, &ChoicePrompt)| match per_character {
                true => score.log_likelihood / prompt.choice_length as f64,
                false => score.log_likelihood,
            };
            let best = first_largest(scores.iter().zip(&item.prompts).map(value));
            f64::from(u8::from(best == item.gold))
        });
        Estimate::of(outcomes)
    };
    Ok(TaskResult {
        task,
        items: items.len(),
        acc: correct(false),
        acc_norm: task.has_acc_norm().then(|| correct(true)),
        truncated: found.iter().filter(|s| s.iter().any(|s| s.truncated)).count(),
    })
}

/// The index of the largest value; ties go to the first.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let best = |best: Option<(usize, f64)>, (i, value): (usize, f64)| match best {
        Some((_, largest)) if value <= largest => best,
        _ => Some((i, value)),
    };
    values.enumerate().fold(None, best).map_or(0, |(i, _)| i)
}

/// The scores of all choices of some questions. The scores do not depend on which questions are computed together.
///
/// # Errors
/// The errors of [`zero_shot`].
///
/// # Panics
/// If there are fewer states than questions.
pub fn score_questions(
    engine: &Engine,
    states: &mut [State],
    tokenizer: &Tokenizer,
    items: &[Question],
    options: &ZeroShotOptions,
) -> Result<Vec<Vec<Score>>> {
    assert!(states.len() >= items.len(), "a state for each question");
    let inputs = |item: &Question| {
        let input = |prompt| ChoiceInput::new(tokenizer, prompt, options);
        item.prompts.iter().map(input).collect::<Result<Vec<ChoiceInput>>>()
    };
    let inputs: Vec<Vec<ChoiceInput>> = items.iter().map(inputs).collect::<Result<_>>()?;
    // The caches start empty, so that the result does not depend on the questions before.
    states.iter_mut().for_each(|state| state.truncate(0));
    let mut scores: Vec<Vec<Score>> = vec![Vec::new(); items.len()];
    let most = inputs.iter().map(Vec::len).max().unwrap_or(0);
    for choice in 0..most {
        let sums = log_likelihoods(engine, states, &inputs, choice)?;
        for ((scores, sum), inputs) in scores.iter_mut().zip(sums).zip(&inputs) {
            if let Some(input) = inputs.get(choice) {
                scores.push(Score { log_likelihood: sum, truncated: input.truncated });
            }
        }
    }
    Ok(scores)
}

/// ln p(continuation) of a choice of each question; 0 for questions with fewer choices. The states hold the choice
/// before, and the prefix that it shares with this one is not computed again.
fn log_likelihoods(
    engine: &Engine,
    states: &mut [State],
    questions: &[Vec<ChoiceInput>],
    choice: usize,
) -> Result<Vec<f64>> {
    let mut sequences = Vec::new();
    for (inputs, state) in questions.iter().zip(&mut *states) {
        let tokens = inputs.get(choice).map_or(&[][..], |input| {
            let seen = choice.checked_sub(1).map_or(&[][..], |last| &inputs[last].tokens);
            let start = input.start();
            let pairs = seen.iter().zip(&input.tokens[..start]);
            let common = pairs.take_while(|(a, b)| a == b).count();
            state.truncate(common);
            &input.tokens[common..start]
        });
        sequences.push((state, tokens));
    }
    prefill(engine, &mut sequences, OutputKind::CacheOnly, &mut |_, _, _| {})?;
    for ((_, tokens), inputs) in sequences.iter_mut().zip(questions) {
        *tokens = inputs.get(choice).map_or(&[], |input| &input.tokens[input.start()..]);
    }
    let vocab = engine.model.embeddings.rows();
    let (mut sums, mut failed) = (vec![0.0; questions.len()], Ok(()));
    let mut add = |question: usize, first: usize, logits: &[f32]| {
        let continuation = &questions[question][choice].continuation[first..];
        for (logits, token) in logits.chunks_exact(vocab).zip(continuation) {
            match Distribution::new(logits) {
                Ok(found) => sums[question] += found.log_probability(*token),
                Err(e) => failed = Err(e),
            }
        }
    };
    prefill(engine, &mut sequences, OutputKind::AllLogits, &mut add)?;
    failed?;
    Ok(sums)
}

/// The tokens of a choice.
struct ChoiceInput {
    /// Context and continuation without the last token, which is predicted but is not an input.
    tokens: Vec<u32>,
    continuation: Vec<u32>,
    /// Whether the context was truncated.
    truncated: bool,
}

impl ChoiceInput {
    fn new(
        tokenizer: &Tokenizer,
        prompt: &ChoicePrompt,
        options: &ZeroShotOptions,
    ) -> Result<Self> {
        let (context, continuation) = encode(tokenizer, prompt, options.begin)?;
        let limit = options.context;
        if continuation.len() > limit {
            return Err(Error::usage(format!(
                "a choice has {} tokens, the context only {limit}: give a larger --ctx",
                continuation.len()
            )));
        }
        let all = [&context[..], &continuation].concat();
        let tokens = all[all.len().saturating_sub(limit + 1)..all.len() - 1].to_vec();
        Ok(Self { tokens, continuation, truncated: all.len() > limit + 1 })
    }

    /// The logits after this token predict the first token of the continuation.
    fn start(&self) -> usize {
        self.tokens.len() - self.continuation.len()
    }
}

/// Appends tokens to sequences, as rows of prompts whatever their number, in as few passes as have room for them.
/// `sink` receives the index of a sequence, the index of the first of its tokens, and the logits, [n, vocab].
fn prefill(
    engine: &Engine,
    sequences: &mut [(&mut State, &[u32])],
    output: OutputKind<'_>,
    sink: &mut dyn FnMut(usize, usize, &[f32]),
) -> Result<()> {
    let size = engine.prefill_size(sequences.iter().map(|(_, tokens)| tokens.len()).sum());
    let mut done = vec![0; sequences.len()];
    loop {
        let mut room = size;
        let mut segments = Vec::new();
        for (id, ((state, tokens), done)) in sequences.iter_mut().zip(&done).enumerate() {
            let count = (tokens.len() - done).min(room);
            if count > 0 {
                room -= count;
                let tokens = &tokens[*done..done + count];
                let cache = &mut state.cache;
                segments.push(Segment::new(id, cache, tokens, RowKind::Prefill, output));
            }
        }
        if segments.is_empty() {
            return Ok(());
        }
        let taken: Vec<(usize, usize)> = segments.iter().map(|s| (s.id, s.count)).collect();
        engine.run_pass(&mut segments, &mut |output| {
            if let Output::Logits { id, first, logits } = output {
                sink(id, done[id] + first, logits);
            }
        })?;
        taken.into_iter().for_each(|(id, count)| done[id] += count);
    }
}

/// The tokens of context and continuation. As in `TemplateLM._encode_pair` of the harness, the context
/// has as many tokens as it has without the continuation, even if the tokenizer merges across the
/// boundary, and spaces at the end of the context belong to the continuation.
fn encode(
    tokenizer: &Tokenizer,
    prompt: &ChoicePrompt,
    begin: bool,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let encode = |text: &str| {
        if begin { tokenizer.encode_prompt(text) } else { tokenizer.encode(text) }
    };
    let context = prompt.context.trim_end();
    let whole = format!("{}{}", prompt.context, prompt.continuation);
    let (context, continuation) = if context.is_empty() {
        let first = tokenizer.bos.or(tokenizer.eos.first().copied()).ok_or_else(|| {
            Error::invalid("a question has no context, and the model has no begin or end token")
        })?;
        (vec![first], tokenizer.encode(&whole)?)
    } else {
        let (context, whole) = (encode(context)?, encode(&whole)?);
        let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
        (context, continuation)
    };
    if continuation.is_empty() {
        return Err(Error::invalid(format!(
            "the tokenizer gives no tokens for {:?} after the question",
            prompt.continuation
        )));
    }
    Ok((context, continuation))
}

#[cfg(test)]
mod tests {
    use super::first_largest;

    #[test]
    fn ties_go_to_the_first() {
        assert_eq!(first_largest([-2.0, -1.0, -1.0].into_iter()), 1);
        assert_eq!(first_largest([f64::NEG_INFINITY; 2].into_iter()), 0);
    }
}
