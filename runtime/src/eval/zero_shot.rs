//! Multiple-choice accuracy with the rules of lm-evaluation-harness (version 0.4.13,
//! `output_type: multiple_choice`). The score of a choice is ln p(continuation | context). `acc` selects
//! the highest score, `acc_norm` the highest score per character of the choice; ties go to the first
//! choice. Text that does not fit into the context is truncated at the left.

use rayon::prelude::*;

use super::distribution::Distribution;
use super::estimate::Estimate;
use super::open::is_small;
use super::tasks::{ChoicePrompt, Question, Task};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::state::State;
use crate::tokenizer::Tokenizer;

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
/// after each question.
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
    let done = std::sync::atomic::AtomicUsize::new(0);
    let measure = |state: &mut State, item: &Question| {
        let scores = score_question(engine, state, tokenizer, item, options)?;
        progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, items.len());
        Ok(scores)
    };
    let new_state = || State::new(engine, options.context);
    let found: Vec<Vec<Score>> = if is_small(engine) {
        items.par_iter().map_init(new_state, measure).collect::<Result<_>>()?
    } else {
        let mut state = new_state();
        items.iter().map(|item| measure(&mut state, item)).collect::<Result<_>>()?
    };
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

/// The scores of all choices of a question. A prefix that consecutive prompts share is computed once.
///
/// # Errors
/// The errors of [`zero_shot`].
pub fn score_question(
    engine: &Engine,
    state: &mut State,
    tokenizer: &Tokenizer,
    item: &Question,
    options: &ZeroShotOptions,
) -> Result<Vec<Score>> {
    // The cache starts empty, so that the result does not depend on the previous question.
    state.truncate(0);
    let mut seen = Vec::new();
    let score = |prompt: &ChoicePrompt| {
        let (context, continuation) = encode(tokenizer, prompt, options.begin)?;
        let limit = options.context;
        if continuation.len() > limit {
            return Err(Error::usage(format!(
                "a choice has {} tokens, the context only {limit}: give a larger --ctx",
                continuation.len()
            )));
        }
        let all = [&context[..], &continuation].concat();
        // The last token is predicted but is not an input.
        let input = &all[all.len().saturating_sub(limit + 1)..all.len() - 1];
        let log_likelihood = score(engine, state, &mut seen, input, &continuation)?;
        Ok(Score { log_likelihood, truncated: all.len() > limit + 1 })
    };
    item.prompts.iter().map(score).collect()
}

/// ln p(`continuation`). `input` ends with all its tokens but the last. `seen` are the tokens in `state`.
fn score(
    engine: &Engine,
    state: &mut State,
    seen: &mut Vec<u32>,
    input: &[u32],
    continuation: &[u32],
) -> Result<f64> {
    let vocab = engine.model.embeddings.rows();
    // The logits after this token predict the first token of the continuation.
    let start = input.len() - continuation.len();
    let common = seen.iter().zip(input).take_while(|(a, b)| a == b).count().min(start);
    state.truncate(common);
    if common < start {
        engine.forward(state, &input[common..start])?;
    }
    let mut sum = Ok(0.0);
    engine.forward_all(state, &input[start..], |first, logits| {
        for (logits, token) in logits.chunks_exact(vocab).zip(&continuation[first..]) {
            if let Ok(so_far) = &mut sum {
                match Distribution::new(logits) {
                    Ok(found) => *so_far += found.log_probability(*token),
                    Err(e) => sum = Err(e),
                }
            }
        }
    })?;
    seen.clear();
    seen.extend_from_slice(input);
    sum
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
