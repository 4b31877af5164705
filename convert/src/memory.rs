//! An estimate of the memory that a conversion needs.

use stb_format::{Meta, ModelSpec};
use stb_runtime::{Checkpoint, PIECE_BYTES};

use crate::calibration::{HELD_OUT_TOKENS, HELD_OUT_WINDOW};
use crate::distill::memory::{DistilledStreams, layer_memory, model_memory};
use crate::plan::{Plan, TensorMethod, TensorPlan};
use crate::quantize::int_group::rounded_distill_memory;
use crate::recipe::Recipe;
use crate::tables::piece_weights;
use crate::{budget, hessian, pipeline, quantize};

/// Bytes of the hidden states of the windows on which the file is measured.
fn check_states(spec: &ModelSpec) -> u64 {
    HELD_OUT_TOKENS as u64 * spec.hidden_size * 4
}

/// Bytes needed to run the finished file: the hidden states, and the logits of both models for a piece of a window in
/// each thread.
fn check_memory(spec: &ModelSpec) -> u64 {
    let window = HELD_OUT_WINDOW as u64 * spec.vocab_size * 4;
    let piece = window.min(PIECE_BYTES).max(spec.vocab_size * 32 * 4);
    check_states(spec) + 3 * piece * rayon::current_num_threads() as u64
}

/// Bytes that a conversion needs at least whose encodings are still to be chosen: for that, and for the hidden states of
/// all sequences.
#[must_use]
pub fn memory_to_choose(checkpoint: &Checkpoint, recipe: &Recipe) -> u64 {
    let spec = &checkpoint.spec;
    let states = pipeline::memory::memory(spec, &recipe.calibration, false).states;
    checkpoint.owned_bytes().saturating_add(budget::memory(spec).max(states))
}

impl Plan {
    /// An upper estimate of the memory that conversion needs besides the mapped checkpoint, in bytes:
    /// dequantized weights, hidden states of all sequences, and one decoder layer's inputs, Hessians,
    /// factors and weights.
    #[must_use]
    pub fn peak_memory(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> u64 {
        // Distillation, budgets, Hessians of tables and allocations run the whole dense model.
        let needs_all = recipe.calibration.distill.is_some()
            || recipe.linear.goal().is_some()
            || self.quantizes_tables()
            || recipe.linear.method().is_some_and(|m| m.quantizer().kept_by_layer().is_some());
        let weights = match needs_all {
            true => checkpoint.owned_bytes(),
            false => checkpoint.owned_bytes_by_layer(),
        };
        weights + self.working_memory(checkpoint, recipe)
    }

    /// [`Plan::peak_memory`] without the weights.
    fn working_memory(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> u64 {
        let spec = &checkpoint.spec;
        let runs_backward = recipe.linear.goal().is_some() || self.quantizes_tables();
        let budget = if runs_backward { budget::memory(spec) } else { 0 };
        let budget = budget.max(check_memory(spec));
        if !self.needs_calibration() {
            let largest = self.tensors.iter().map(TensorPlan::elements).max().unwrap_or(0);
            return budget.max(largest * 12 + check_states(spec));
        }
        let calibration = &recipe.calibration;
        let calibrating = pipeline::memory::memory(spec, calibration, self.prunes_first());
        let inputs = pipeline::memory::input_sizes(spec);
        let hessians: u64 = inputs.into_iter().map(hessian::memory).sum();
        let factoring = inputs.into_iter().map(hessian::factoring_memory).max().unwrap_or(0);
        let first = self.tensors.iter().filter(|t| t.tensor.layer == Some(0));
        let packed: u64 = first.map(|t| t.bytes).sum();
        let layers =
            calibration.distill_layers.map_or(0, |_| layer_memory(spec, calibrating.activations));
        let step = calibrating.activations.max(factoring).max(self.quantizing_memory());
        let layer = hessians + calibrating.dense_target + packed + step.max(layers);
        let distill = calibration.distill.map_or(0, |_| {
            let sizes = DistilledStreams {
                batch: pipeline::memory::batch_tokens(spec, calibration),
                activations: calibrating.activations,
            };
            model_memory(spec, self.moving_memory(), &sizes)
        });
        budget.max(distill).max(calibrating.states + check_states(spec) + layer)
    }

    /// An upper estimate of the disk space that conversion needs, in bytes: the file, and with calibration the
    /// finished layers and the hidden states that let an interrupted conversion resume; while these are saved, those
    /// of the layer before are still there.
    #[must_use]
    pub fn disk_space(&self, checkpoint: &Checkpoint, recipe: &Recipe, meta: &Meta) -> u64 {
        let file = self.file_bytes(meta);
        // A search keeps the best file while it makes the next.
        let best = recipe.linear.max_kl().map_or(0, |_| file);
        if !self.needs_calibration() {
            return file + best;
        }
        let layers: u64 =
            self.tensors.iter().filter(|t| t.tensor.layer.is_some()).map(|t| t.bytes).sum();
        let spec = &checkpoint.spec;
        let streams =
            1 + u64::from(self.prunes_first()) + u64::from(recipe.calibration.follows_dense());
        let tokens = pipeline::memory::tokens(spec, &recipe.calibration);
        let states = streams * tokens * spec.hidden_size * 4 + check_states(spec);
        file + best + layers + 2 * states
    }

    /// Whether the embeddings or the lm_head are quantized with a Hessian.
    fn quantizes_tables(&self) -> bool {
        self.tensors.iter().any(|t| t.tensor.layer.is_none() && t.is_calibrated())
    }

    /// Bytes needed to quantize the largest linear layer, or piece of a table.
    fn quantizing_memory(&self) -> u64 {
        let scratch = self.tensors.iter().map(|t| match t.method {
            TensorMethod::Linear(method) => method.quantizer().scratch_memory(t.tensor.shape[1]),
            TensorMethod::Keep(_) | TensorMethod::Round(_) => 0,
        });
        let at_once = |t: &TensorPlan| match t.tensor.layer {
            Some(_) => t.elements(),
            None => piece_weights(t.elements(), t.tensor.shape[1]),
        };
        let largest = self.tensors.iter().filter(|t| t.is_calibrated()).map(at_once);
        quantize::memory(largest.max().unwrap_or(0)) + scratch.max().unwrap_or(0)
    }

    /// Bytes of codes and scales of all tensors that distillation trains.
    fn moving_memory(&self) -> u64 {
        let moving = self.tensors.iter().map(|t| match t.method {
            TensorMethod::Linear(method) => {
                method.quantizer().distill_memory(t.tensor.shape[0], t.tensor.shape[1])
            }
            TensorMethod::Round(options) => rounded_distill_memory(options.spec, t.elements()),
            TensorMethod::Keep(_) => 0,
        });
        moving.sum()
    }
}
