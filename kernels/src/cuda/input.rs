//! The input of a product, with the operation that the kernel fuses into reading it.

use super::device::Buffer;

/// The activations of a product: `InputKind` of common.cuh. `A` is a buffer or an address.
#[derive(Clone, Copy, Debug)]
pub enum ActivationInput<A> {
    /// x, [tokens, cols].
    Plain(A),
    /// RMSNorm: x · weight / sqrt(mean(x²) + eps).
    RmsNorm {
        /// [tokens, cols].
        x: A,
        /// One weight per column, `[cols]`.
        weight: A,
        /// Added to the mean.
        eps: f32,
    },
    /// silu(gate) · up.
    SwiGlu {
        /// [tokens, cols].
        gate: A,
        /// [tokens, cols].
        up: A,
    },
}

/// The input as the kernels' parameters hold it.
#[derive(Clone, Copy, Debug)]
pub(super) struct InputFields {
    /// The address of x or gate.
    pub x: u64,
    /// The address of the norm's weight or of up; 0 for plain activations.
    pub with: u64,
    /// The kind, as numbered in common.cuh.
    pub kind: u32,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl<A> ActivationInput<A> {
    /// Replaces each `A`.
    fn map<B>(self, f: impl Fn(A) -> B) -> ActivationInput<B> {
        match self {
            Self::Plain(x) => ActivationInput::Plain(f(x)),
            Self::RmsNorm { x, weight, eps } => {
                ActivationInput::RmsNorm { x: f(x), weight: f(weight), eps }
            }
            Self::SwiGlu { gate, up } => ActivationInput::SwiGlu { gate: f(gate), up: f(up) },
        }
    }
}

impl ActivationInput<u64> {
    /// The fields of the kernels' parameters.
    pub(super) fn fields(self) -> InputFields {
        match self {
            Self::Plain(x) => InputFields { x, with: 0, kind: 0, eps: 0.0 },
            Self::RmsNorm { x, weight, eps } => InputFields { x, with: weight, kind: 1, eps },
            Self::SwiGlu { gate, up } => InputFields { x: gate, with: up, kind: 2, eps: 0.0 },
        }
    }
}

impl ActivationInput<&Buffer<f32>> {
    /// # Panics
    /// If a buffer does not hold `tokens` tokens of `cols` numbers.
    pub(super) fn check(self, cols: usize, tokens: usize) {
        let fits = match self {
            Self::Plain(x) => x.len() >= tokens * cols,
            Self::RmsNorm { x, weight, .. } => x.len() >= tokens * cols && weight.len() == cols,
            Self::SwiGlu { gate, up } => gate.len().min(up.len()) >= tokens * cols,
        };
        assert!(fits, "whole tokens");
    }

    /// The addresses of the buffers.
    pub(super) fn addresses(self) -> ActivationInput<u64> {
        self.map(Buffer::address)
    }
}
