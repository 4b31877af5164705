//! What goes through all layers together, and what shall come out.

use stb_kernels::cuda::TopKRequest;

/// What a forward pass shall give.
#[derive(Clone, Copy)]
pub(crate) enum Want<'a> {
    /// Nothing but keys and values.
    Cache,
    /// The logits behind the last token.
    LastLogits,
    /// The logits behind every token.
    AllLogits,
    /// The most likely tokens behind the last one; the CPU gives all logits instead.
    TopK(&'a TopKRequest<'a>),
}

/// What a forward pass gives.
pub(crate) enum Output<'a> {
    /// Logits of some tokens. The receiver may keep the vector and leave another.
    Logits {
        /// Index of the first token in the call.
        first: usize,
        /// [n, vocab].
        logits: &'a mut Vec<f32>,
    },
    /// The most likely tokens with their logits, best first.
    TopK(Vec<(u32, f32)>),
}

/// Tokens that go through all layers together.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub tokens: &'a [u32],
    /// Index of the first token in the call.
    pub first: usize,
    pub want: Want<'a>,
}
