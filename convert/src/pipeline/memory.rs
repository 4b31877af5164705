//! An estimate of the memory that calibration needs.

use stb_format::ModelSpec;
use stb_format::arch::LayerSet;

use super::limits::{BATCH, KEPT_BYTES};
use crate::recipe::Calibration;

/// Bytes that calibration needs in its phases.
pub(crate) struct CalibrationMemory {
    /// Always: hidden states of all sequences, and kept inputs.
    pub states: u64,
    /// While a linear layer is quantized: the sums for its target from the dense model.
    pub dense_target: u64,
    /// During a forward pass: the activations of a batch.
    pub activations: u64,
}

/// Tokens of all calibration sequences.
pub(crate) fn tokens(spec: &ModelSpec, calibration: &Calibration) -> u64 {
    calibration.samples as u64 * (calibration.length as u64).min(spec.context_length)
}

/// Tokens that run through a layer together.
pub(crate) fn batch_tokens(spec: &ModelSpec, calibration: &Calibration) -> u64 {
    BATCH as u64 * (calibration.length as u64).min(spec.context_length)
}

/// Features of the four inputs of a decoder layer, the widest of all layers. Of the experts of a layer, one is
/// quantized at a time.
pub(crate) fn input_sizes(spec: &ModelSpec) -> [u64; 4] {
    [spec.hidden_size, spec.heads * spec.head_dim, spec.hidden_size, intermediate_size(spec)]
}

/// The widest MLP of the model, or expert.
fn intermediate_size(spec: &ModelSpec) -> u64 {
    match &spec.experts {
        Some(experts) if experts.layers == LayerSet::All => experts.intermediate_size,
        Some(experts) => experts.intermediate_size.max(spec.intermediate_size),
        None => spec.intermediate_size,
    }
}

/// Estimates the memory. `prunes_first`: masks come from a pruning pass over the whole model.
pub(crate) fn memory(
    spec: &ModelSpec,
    calibration: &Calibration,
    prunes_first: bool,
) -> CalibrationMemory {
    let tokens = tokens(spec, calibration);
    let dense = calibration.follows_dense();
    // A separate pruning pass and the dense model have hidden states of their own; distillation of a layer keeps
    // its inputs.
    let streams = 1
        + u64::from(prunes_first)
        + u64::from(dense)
        + u64::from(calibration.distill_layers.is_some());
    let kept = if calibration.refreshed { KEPT_BYTES as u64 } else { 0 };
    let intermediate = intermediate_size(spec);
    let widest = intermediate.max(spec.heads * spec.head_dim);
    let features = input_sizes(spec).iter().sum::<u64>() + 4 * intermediate;
    // The inputs of the experts, and what one of them may read.
    let routed = spec.experts.as_ref().map_or(0, |_| 3 * spec.hidden_size + 3 * intermediate);
    CalibrationMemory {
        states: tokens * 4 * (spec.hidden_size * streams + routed) + kept.min(tokens * 4 * widest),
        dense_target: if dense { (intermediate + spec.hidden_size) * intermediate * 4 } else { 0 },
        activations: batch_tokens(spec, calibration) * features * 4,
    }
}
