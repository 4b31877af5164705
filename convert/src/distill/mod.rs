//! Distillation: gradient descent trains the scales of quantized linear layers and the weights of norms; codes do
//! not change. It runs layer by layer (`layer`) or on the whole model at once (`model`).

pub(crate) mod layer;
pub(crate) mod memory;
pub(crate) mod model;
mod moving;

/// Sequences per step.
const BATCH: usize = 8;

/// Length and learning rate of a distillation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistillOptions {
    /// Passes over the calibration sequences; for the whole model, training sequences per calibration sequence.
    pub epochs: usize,
    /// The learning rate: the largest relative change of a parameter in a step. Falls to a tenth over the steps
    /// (cosine).
    pub rate: f64,
}

impl DistillOptions {
    /// The learning rate of step `step` of `steps`, from 0.
    fn rate_at(&self, step: usize, steps: usize) -> f64 {
        let done = step as f64 / steps.max(1) as f64;
        self.rate * (0.55 + 0.45 * (std::f64::consts::PI * done).cos())
    }
}

/// The error before and after distillation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// With the weights as they were quantized.
    pub before: f64,
    /// With the weights that are kept: never more than `before`.
    pub after: f64,
}
