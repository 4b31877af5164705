//! Distillation: gradients move what is continuous in a quantized model, the scales of quantized linear
//! layers and the weights of norms; codes stay. Layer by layer (`layer`), or the whole model at once
//! (`model`).

pub(crate) mod layer;
pub(crate) mod memory;
pub(crate) mod model;
mod moving;

/// Sequences of a step.
const BATCH: usize = 8;

/// How much is tuned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistillOptions {
    /// Passes over the calibration sequences.
    pub epochs: usize,
    /// The largest step of a parameter, relative to it; falls to a tenth over the steps.
    pub rate: f64,
}

impl DistillOptions {
    /// The largest step of a parameter in step `step` of `steps`, from 0.
    fn rate_at(&self, step: usize, steps: usize) -> f64 {
        let done = step as f64 / steps.max(1) as f64;
        self.rate * (0.55 + 0.45 * (std::f64::consts::PI * done).cos())
    }
}

/// An error before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// With the weights as they were quantized.
    pub before: f64,
    /// With what is kept: never more than before.
    pub after: f64,
}
