//! Evaluation: perplexity and distance to a reference on a text, accuracy on tasks.

mod distribution;
mod perplexity;
mod reference;
mod tasks;
mod text;
mod zero_shot;

pub use perplexity::{Divergence, Perplexity, PerplexityOptions, perplexity};
pub use reference::{KeptLogits, Reference};
pub use tasks::{ChoicePrompt, Question, Task};
pub use text::TextLayout;
pub use zero_shot::{Score, TaskResult, ZeroShotOptions, score_question, zero_shot};

use std::path::Path;

use stb_kernels::kv::KvKind;

use crate::error::Result;
use crate::model::{Model, OpenOptions, Verify};

/// Models below this number of parameters run with one thread per window or question.
const SMALL_MODEL: u64 = 50_000_000;

/// Opens a model for evaluation. Activations, keys and values are not rounded. Small models get one thread per window or
/// question; all threads compute one window or question of a larger model.
///
/// # Errors
/// As for [`Model::open`].
pub fn open_to_measure(path: &Path, options: &OpenOptions) -> Result<Model> {
    let one = OpenOptions { exact: true, kv: KvKind::F32, threads: Some(1), ..*options };
    let model = Model::open(path, &one)?;
    // A device computes one sequence at a time, whatever the size of the model.
    if is_small(&model) || model.device_name().is_some() {
        return Ok(model);
    }
    Model::open(path, &OpenOptions { threads: options.threads, verify: Verify::Off, ..one })
}

fn is_small(model: &Model) -> bool {
    model.parameters() < SMALL_MODEL
}

/// A mean over independent samples with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Sample standard deviation over √n; NaN for a single sample.
    pub standard_error: f64,
}

impl Estimate {
    /// The mean of `samples`, NaN if there are none.
    #[must_use]
    pub fn of(samples: impl Iterator<Item = f64> + Clone) -> Self {
        let n = samples.clone().count() as f64;
        let value = samples.clone().sum::<f64>() / n;
        let variance = samples.map(|x| (x - value).powi(2)).sum::<f64>() / (n - 1.0);
        Self { value, standard_error: (variance / n).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_are_those_of_the_textbook() {
        // Mean 2.5, sample variance 5/3.
        let e = Estimate::of([1.0, 2.0, 3.0, 4.0].into_iter());
        assert_eq!(e.value, 2.5);
        assert!((e.standard_error - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
        let one = Estimate::of([7.0].into_iter());
        assert!(one.value == 7.0 && one.standard_error.is_nan());
    }
}
