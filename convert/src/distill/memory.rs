//! Estimates of the memory that distillation needs.

use stb_format::ModelSpec;

/// The weights of a decoder layer and their gradients, in bytes.
fn layer_weights(spec: &ModelSpec) -> u64 {
    let attention = 4 * spec.hidden_size * spec.heads * spec.head_dim;
    (attention + 3 * spec.intermediate_size * spec.hidden_size) * 8
}

/// Bytes needed to distill a layer: its weights and gradients, and the activations of a batch with their gradients.
/// `activations` are the bytes of the activations of a batch.
pub(crate) fn layer_memory(spec: &ModelSpec, activations: u64) -> u64 {
    layer_weights(spec) + 2 * activations
}

/// Sizes of the batches during distillation of the whole model.
pub(crate) struct DistilledStreams {
    /// Tokens of a batch.
    pub batch: u64,
    /// Bytes of the activations of a batch in a layer.
    pub activations: u64,
}

/// Bytes needed to distill the whole model. `moving` are the bytes of the codes and scales of all layers.
pub(crate) fn model_memory(spec: &ModelSpec, moving: u64, sizes: &DistilledStreams) -> u64 {
    let DistilledStreams { batch, activations } = *sizes;
    let streams = batch * spec.hidden_size * (spec.layers + 2) * 4;
    let logits = batch * spec.vocab_size * 12;
    moving + streams + logits + layer_weights(spec) + activations
}
