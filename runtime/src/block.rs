//! The forward pass of a decoder layer, written once for all backends.
//!
//! [`run_block`] runs the two sublayers, attention and MLP; [`run_sublayer`] runs one of them. They call
//! the operations of a [`BlockOps`], which four backends implement: the CPU, the GPU, the GPU with decoded
//! weights (calibration), and the backward pass, which records activations.

use std::ops::ControlFlow;

use stb_format::arch::{Linear, LinearInput, NormSite};

use crate::layer::Layer;
use crate::sublayer::Sublayer;

/// The input of a linear layer. `B` is a buffer of activations, [tokens, width], `V` the weight of a
/// norm, `R` the residual stream, [tokens, hidden].
#[derive(Debug)]
pub enum BlockInput<'a, B, V, R: ?Sized = B> {
    /// Activations without an operation before the linear layer.
    Plain(&'a B),
    /// `x`, normalized with `weight`.
    Norm {
        /// The residual stream, [tokens, hidden].
        x: &'a R,
        /// The weight of the norm, `[hidden]`.
        weight: &'a V,
    },
    /// act(gate) ∘ up, both [tokens, intermediate]. The activation is that of the model, SiLU.
    Gated {
        /// The gate. May be overwritten with the result.
        gate: &'a mut B,
        /// The other factor.
        up: &'a B,
    },
}

/// `Break` if an observer stopped the layer: the rest of the layer is skipped and the residual stream
/// stays as it was. Nothing has failed.
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
    /// The error of an operation.
    type Error;

    /// `out[i] = x · matrices[i]ᵀ`, [tokens, out]. `site` says which activations of the
    /// layer `x` is, for observers. If an observer returns `Break`, no product is computed.
    ///
    /// # Errors
    /// Errors of the backend.
    fn linear<const N: usize>(
        &mut self,
        site: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        matrices: [&Self::Matrix; N],
        out: [&mut Self::Buffer; N],
    ) -> Flow<Self::Error>;

    /// `residual += x · matrixᵀ`, [tokens, hidden]. Otherwise like [`BlockOps::linear`].
    ///
    /// # Errors
    /// Errors of the backend.
    fn linear_residual(
        &mut self,
        site: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        matrix: &Self::Matrix,
        residual: &mut Self::Residual,
    ) -> Flow<Self::Error>;

    /// Rotates q and k by their positions, appends k and v to the KV cache and computes causal
    /// attention.
    ///
    /// # Errors
    /// Errors of the backend.
    fn attend(&mut self, x: AttentionBuffers<'_, Self::Buffer>) -> Result<(), Self::Error>;
}

/// The inputs and the output of attention.
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

/// Reusable buffers for the intermediate activations of a decoder layer.
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

/// Runs one sublayer of `layer` and updates `residual`, [tokens, hidden].
///
/// # Errors
/// Errors of the backend.
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

/// Runs both sublayers of `layer` and updates `residual`, [tokens, hidden].
///
/// # Errors
/// Errors of the backend.
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
    if ops.linear(LinearInput::Qkv, normed, matrices, [&mut *q, &mut *k, &mut *v])?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    ops.attend(AttentionBuffers { q, k, v, attn_out: &mut *attn_out })?;
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
    if ops.linear(LinearInput::GateUp, normed, matrices, [&mut *gate, &mut *up])?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let product = BlockInput::Gated { gate, up };
    ops.linear_residual(LinearInput::Down, product, layer.linear(Linear::Down), residual)
}
