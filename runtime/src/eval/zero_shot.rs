//! Multiple choice by likelihood, by the rules of lm-evaluation-harness (version 0.4.13,
//! `output_type: multiple_choice`): a choice's score is ln p(continuation | context). `acc` takes the
//! highest score, `acc_norm` the highest score per character of the choice; the first of equals wins.
//! Text that does not fit into the context is cut off at the left.

use rayon::prelude::*;

use super::distribution::Distribution;
use super::estimate::Estimate;
use super::open::is_small;
use super::tasks::{ChoicePrompt, Question, Task};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::state::State;
use crate::tokenizer::Tokenizer;

/// How questions are read.
#[derive(Clone, Copy, Debug)]
pub struct ZeroShotOptions {
    /// The most tokens that the model sees.
    pub context: usize,
    /// Whether a begin token is put before each context, if the model's tokenizer does so: the
    /// default of the harness since it asks the tokenizer (0.4.13 does, early 0.4 never put one).
    pub begin: bool,
}

/// The score of one choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// ln p(continuation | context).
    pub log_likelihood: f64,
    /// Whether some of the context was cut off.
    pub truncated: bool,
}

/// The accuracy of a model on a task.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// The task.
    pub task: Task,
    /// Questions.
    pub items: usize,
    /// Share answered right by likelihood.
    pub acc: Estimate,
    /// Share answered right by likelihood per character; `None` for tasks whose `acc_norm` the harness does not report.
    pub acc_norm: Option<Estimate>,
    /// Questions whose context was cut off to fit.
    pub truncated: usize,
}

/// Measures the accuracy of `model` on the questions of a task. `progress` is called with questions
/// done and all.
///
/// # Errors
/// [`Error::Usage`] if a choice does not fit into the context; [`Error::Invalid`] if the model computes
/// logits that are not finite.
pub fn zero_shot(
    model: &Engine,
    tokenizer: &Tokenizer,
    task: Task,
    items: &[Question],
    options: &ZeroShotOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<TaskResult> {
    let done = std::sync::atomic::AtomicUsize::new(0);
    let measure = |state: &mut State, item: &Question| {
        let scores = score_question(model, state, tokenizer, item, options)?;
        progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, items.len());
        Ok(scores)
    };
    let new_state = || State::new(model, options.context);
    let found: Vec<Vec<Score>> = if is_small(model) {
        items.par_iter().map_init(new_state, measure).collect::<Result<_>>()?
    } else {
        let mut state = new_state();
        items.iter().map(|item| measure(&mut state, item)).collect::<Result<_>>()?
    };
    let correct = |per_character: bool| {
        let right = items.iter().zip(&found).map(move |(item, scores)| {
            let value = |(score, prompt): (&Score, &ChoicePrompt)| match per_character {
                true => score.log_likelihood / prompt.choice_length as f64,
                false => score.log_likelihood,
            };
            let best = first_largest(scores.iter().zip(&item.prompts).map(value));
            f64::from(u8::from(best == item.gold))
        });
        Estimate::of(right)
    };
    Ok(TaskResult {
        task,
        items: items.len(),
        acc: correct(false),
        acc_norm: task.has_acc_norm().then(|| correct(true)),
        truncated: found.iter().filter(|s| s.iter().any(|s| s.truncated)).count(),
    })
}

fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let best = |best: Option<(usize, f64)>, (i, value): (usize, f64)| match best {
        Some((_, largest)) if value <= largest => best,
        _ => Some((i, value)),
    };
    values.enumerate().fold(None, best).map_or(0, |(i, _)| i)
}

/// The scores of all choices of a question. Tokens at the start that prompts share are computed once.
///
/// # Errors
/// As for [`zero_shot`].
pub fn score_question(
    model: &Engine,
    state: &mut State,
    tokenizer: &Tokenizer,
    item: &Question,
    options: &ZeroShotOptions,
) -> Result<Vec<Score>> {
    // Each question starts with an empty cache, so that its result does not depend on the question before.
    state.truncate(0);
    let mut seen = Vec::new();
    let score = |prompt: &ChoicePrompt| {
        let (context, continuation) = encode(tokenizer, prompt, options.begin)?;
        let most = options.context;
        if continuation.len() > most {
            return Err(Error::usage(format!(
                "a choice has {} tokens, the context only {most}: give a larger --ctx",
                continuation.len()
            )));
        }
        let all = [&context[..], &continuation].concat();
        // The last token is predicted, but it is no input.
        let input = &all[all.len().saturating_sub(most + 1)..all.len() - 1];
        let log_likelihood = score(model, state, &mut seen, input, &continuation)?;
        Ok(Score { log_likelihood, truncated: all.len() > most + 1 })
    };
    item.prompts.iter().map(score).collect()
}

/// ln p of `continuation`. All its tokens but the last are the end of `input`. `seen` are the tokens in `state`.
fn score(
    model: &Engine,
    state: &mut State,
    seen: &mut Vec<u32>,
    input: &[u32],
    continuation: &[u32],
) -> Result<f64> {
    let vocab = model.embeddings.rows();
    // The logits after this token predict the first one of the continuation.
    let start = input.len() - continuation.len();
    let common = seen.iter().zip(input).take_while(|(a, b)| a == b).count().min(start);
    state.truncate(common);
    if common < start {
        model.forward(state, &input[common..start])?;
    }
    let mut sum = Ok(0.0);
    model.forward_all(state, &input[start..], |first, logits| {
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

/// Tokens of context and continuation. The boundary is where the context alone ends, even if the
/// tokenizer would put a token across it; spaces at the end of the context belong to the
/// continuation (`TemplateLM._encode_pair`).
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
            Error::invalid("a question has no context, and the model neither begin nor end token")
        })?;
        (vec![first], tokenizer.encode(&whole)?)
    } else {
        let (context, whole) = (encode(context)?, encode(&whole)?);
        let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
        (context, continuation)
    };
    if continuation.is_empty() {
        return Err(Error::invalid(format!(
            "the tokenizer makes no token of {:?} after the question",
            prompt.continuation
        )));
    }
    Ok((context, continuation))
}

#[cfg(test)]
mod tests {
    use super::first_largest;

    #[test]
    fn the_first_of_equals_wins() {
        assert_eq!(first_largest([-2.0, -1.0, -1.0].into_iter()), 1);
        assert_eq!(first_largest([f64::NEG_INFINITY; 2].into_iter()), 0);
    }
}
