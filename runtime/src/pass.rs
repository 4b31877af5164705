//! One pass over the weights: its tokens and the outputs that its caller requests.

use stb_kernels::cuda::TopKRequest;

/// The output that the caller of a pass requests.
#[derive(Clone, Copy)]
pub(crate) enum OutputKind<'a> {
    /// No output: the pass only fills the KV cache.
    CacheOnly,
    /// The logits after the last token.
    LastLogits,
    /// The logits after every token.
    AllLogits,
    /// The most likely tokens after the last one. The CPU returns all logits instead.
    TopK(&'a TopKRequest<'a>),
}

/// An output of a pass.
pub(crate) enum Output<'a> {
    /// Logits of a batch of tokens. The receiver may swap the vector for another.
    Logits {
        /// Index of the first token in the tokens of the call.
        first: usize,
        /// [n, vocab].
        logits: &'a mut Vec<f32>,
    },
    /// The most likely tokens with their logits, best first.
    TopK(Vec<(u32, f32)>),
}

/// A batch of tokens that goes through all layers together.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub tokens: &'a [u32],
    /// Index of the first token in the tokens of the call.
    pub first: usize,
    pub output: OutputKind<'a>,
}
