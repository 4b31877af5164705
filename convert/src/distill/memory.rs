//! Estimates of the memory that distillation takes.

use stb_format::ModelSpec;

/// The weights of a decoder layer and their gradients, in bytes.
fn layer_weights(spec: &ModelSpec) -> u64 {
    let attention = 4 * spec.hidden_size * spec.heads * spec.head_dim;
    (attention + 3 * spec.intermediate_size * spec.hidden_size) * 8
}

/// Bytes that distilling a layer takes: its weights and gradients, and all that a batch computes, forward and
/// backward. `activations` are the bytes of the activations of a batch.
pub(crate) fn layer_memory(spec: &ModelSpec, activations: u64) -> u64 {
    layer_weights(spec) + 2 * activations
}

/// What goes through the model while it is distilled.
pub(crate) struct DistilledStreams {
    /// Tokens of all sequences, and of a batch.
    pub tokens: u64,
    pub batch: u64,
    /// Bytes of the activations of a batch in a layer.
    pub activations: u64,
}

/// Bytes that distilling the whole model takes. `moving` are those of the codes and scales of all layers.
pub(crate) fn model_memory(spec: &ModelSpec, moving: u64, through: &DistilledStreams) -> u64 {
    let DistilledStreams { tokens, batch, activations } = *through;
    let streams = batch * spec.hidden_size * (spec.layers + 2) * 4;
    let logits = batch * spec.vocab_size * 12;
    let model = moving + tokens * spec.hidden_size * 4 + streams + logits;
    model + layer_weights(spec) + activations
}
