//! The forward pass of a decoder layer, once for all backends.
//!
//! [`attention`] and [`mlp`] are the two sublayers. They call a [`BlockOps`]: the CPU, a GPU, the
//! calibration pass of a conversion, and the backward pass, which records what it needs.

use std::ops::ControlFlow;

use stb_format::arch::{Linear, LinearInput, NormSite};

use crate::layer::Layer;
use crate::sublayer::Sublayer;

/// What a linear layer reads; `B` are activations, [tokens, width].
#[derive(Debug)]
pub enum BlockInput<'a, B, V, R: ?Sized = B> {
    /// The activations as they are.
    Plain(&'a B),
    /// The norm of `x` with the weight `weight`.
    Norm {
        /// The residual stream, [tokens, hidden].
        x: &'a R,
        /// `[hidden]`.
        weight: &'a V,
    },
    /// act(gate) ∘ up, both [tokens, intermediate].
    Gated {
        /// May be overwritten with the result.
        gate: &'a mut B,
        /// The other factor.
        up: &'a B,
    },
}

/// Whether the layer goes on; `Break` ends it where an observer asked for that.
pub type Flow<E> = Result<ControlFlow<()>, E>;

/// The operations of a decoder layer on one backend.
pub trait BlockOps {
    /// A weight matrix, [out, in].
    type Matrix;
    /// The weight of a norm.
    type Vector;
    /// Activations, [tokens, width].
    type Buffer;
    /// The residual stream, [tokens, hidden].
    type Residual: ?Sized;
    /// What can go wrong.
    type Error;

    /// `out[i] = x · matrices[i]ᵀ`, [tokens, out]. `input` says which activations x are. `Break` is
    /// returned before the products.
    ///
    /// # Errors
    /// Those of the backend.
    fn linear<const N: usize>(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        matrices: [&Self::Matrix; N],
        out: [&mut Self::Buffer; N],
    ) -> Flow<Self::Error>;

    /// `residual += x · matrixᵀ`, [tokens, hidden]. As [`BlockOps::linear`] otherwise.
    ///
    /// # Errors
    /// Those of the backend.
    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        matrix: &Self::Matrix,
        residual: &mut Self::Residual,
    ) -> Flow<Self::Error>;

    /// Rotates q and k by their positions, appends k and v to the KV cache and computes causal
    /// attention.
    ///
    /// # Errors
    /// Those of the backend.
    fn attention(&mut self, x: AttentionBuffers<'_, Self::Buffer>) -> Result<(), Self::Error>;
}

/// The activations of attention.
#[derive(Debug)]
pub struct AttentionBuffers<'a, B> {
    /// Queries, [tokens, heads · head_dim].
    pub q: &'a mut B,
    /// Keys, [tokens, kv_heads · head_dim].
    pub k: &'a mut B,
    /// Values, [tokens, kv_heads · head_dim].
    pub v: &'a mut B,
    /// The output, [tokens, heads · head_dim].
    pub attn_out: &'a mut B,
}

/// Buffers for what a decoder layer computes in between.
#[derive(Debug, Default)]
pub struct BlockScratch<B> {
    /// Queries, [tokens, heads · head_dim].
    pub q: B,
    /// Keys, [tokens, kv_heads · head_dim].
    pub k: B,
    /// Values, [tokens, kv_heads · head_dim].
    pub v: B,
    /// Attention output, [tokens, heads · head_dim].
    pub attn_out: B,
    /// Gate, [tokens, intermediate].
    pub gate: B,
    /// Up, [tokens, intermediate].
    pub up: B,
}

/// One sublayer of `layer`: `residual`, [tokens, hidden], is changed in place.
///
/// # Errors
/// Those of the backend.
pub fn run_sublayer<O: BlockOps>(
    ops: &mut O,
    sublayer: Sublayer,
    layer: &Layer<O::Matrix, O::Vector>,
    scratch: &mut BlockScratch<O::Buffer>,
    residual: &mut O::Residual,
) -> Flow<O::Error> {
    match sublayer {
        Sublayer::Attention => attention(ops, layer, scratch, residual),
        Sublayer::Mlp => mlp(ops, layer, scratch, residual),
    }
}

/// Both sublayers of `layer`: `residual`, [tokens, hidden], is changed in place.
///
/// # Errors
/// Those of the backend.
pub fn run_block<O: BlockOps>(
    ops: &mut O,
    layer: &Layer<O::Matrix, O::Vector>,
    scratch: &mut BlockScratch<O::Buffer>,
    residual: &mut O::Residual,
) -> Flow<O::Error> {
    match attention(ops, layer, scratch, residual)? {
        ControlFlow::Continue(()) => mlp(ops, layer, scratch, residual),
        stopped => Ok(stopped),
    }
}

fn attention<O: BlockOps>(
    ops: &mut O,
    layer: &Layer<O::Matrix, O::Vector>,
    scratch: &mut BlockScratch<O::Buffer>,
    residual: &mut O::Residual, // [tokens, hidden]
) -> Flow<O::Error> {
    let BlockScratch { q, k, v, attn_out, .. } = scratch;
    let normed = BlockInput::Norm { x: &*residual, weight: layer.norm(NormSite::Attention) };
    let matrices = [Linear::Q, Linear::K, Linear::V].map(|linear| layer.linear(linear));
    if ops.linear(LinearInput::Attention, normed, matrices, [&mut *q, &mut *k, &mut *v])?.is_break()
    {
        return Ok(ControlFlow::Break(()));
    }
    ops.attention(AttentionBuffers { q, k, v, attn_out: &mut *attn_out })?;
    let output = layer.linear(Linear::O);
    ops.linear_residual(LinearInput::AttentionOutput, BlockInput::Plain(attn_out), output, residual)
}

fn mlp<O: BlockOps>(
    ops: &mut O,
    layer: &Layer<O::Matrix, O::Vector>,
    scratch: &mut BlockScratch<O::Buffer>,
    residual: &mut O::Residual, // [tokens, hidden]
) -> Flow<O::Error> {
    let BlockScratch { gate, up, .. } = scratch;
    let normed = BlockInput::Norm { x: &*residual, weight: layer.norm(NormSite::Mlp) };
    let matrices = [Linear::Gate, Linear::Up].map(|linear| layer.linear(linear));
    if ops.linear(LinearInput::Mlp, normed, matrices, [&mut *gate, &mut *up])?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let product = BlockInput::Gated { gate, up };
    ops.linear_residual(LinearInput::MlpDown, product, layer.linear(Linear::Down), residual)
}
