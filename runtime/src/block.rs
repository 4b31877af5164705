//! The forward pass of a decoder layer, written once for all backends.
//!
//! [`run_block`] runs the two sublayers, attention and MLP; [`run_sublayer`] runs one of them. They call
//! the operations of a [`BlockOps`], which four backends implement: the CPU, the GPU, the GPU with decoded
//! weights (calibration), and the backward pass, which records activations.

use std::ops::ControlFlow;

use stb_format::arch::{Attention, Linear, LinearInput, MlpKind, NormPlacement, NormSite};

pub use crate::experts::ExpertsLayer;
use crate::layer::{Layer, LayerVector};
use crate::sublayer::Sublayer;

/// The weights of a norm: the weight and, for LayerNorm, the bias, `[hidden]`.
#[derive(Debug)]
pub struct NormWeights<'a, V> {
    /// The weight.
    pub weight: &'a V,
    /// The bias.
    pub bias: Option<&'a V>,
}

impl<V> Clone for NormWeights<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for NormWeights<'_, V> {}

/// The input of a linear layer. `B` is a buffer of activations, [tokens, width], `V` a vector of weights, `R`
/// the residual stream, [tokens, hidden].
#[derive(Debug)]
pub enum BlockInput<'a, B, V, R: ?Sized = B> {
    /// Activations without an operation before the linear layer.
    Plain(&'a B),
    /// The residual stream without a norm.
    Residual(&'a R),
    /// `x`, normalized.
    Norm {
        /// The residual stream, [tokens, hidden].
        x: &'a R,
        /// The weights of the norm.
        norm: NormWeights<'a, V>,
    },
    /// act(x), [tokens, intermediate], with the activation of the model. May be overwritten with the result.
    Activated(&'a mut B),
    /// act(gate) ∘ up, both [tokens, intermediate], with the activation of the model.
    Gated {
        /// The gate. May be overwritten with the result.
        gate: &'a mut B,
        /// The other factor.
        up: &'a B,
    },
}

/// The weights of a linear layer.
#[derive(Debug)]
pub struct LinearWeights<'a, M, V> {
    /// The matrix, [out, in].
    pub matrix: &'a M,
    /// The bias, `[out]`.
    pub bias: Option<&'a V>,
}

/// A linear layer that adds its output to the residual stream.
#[derive(Debug)]
pub struct ResidualLinear<'a, M, V> {
    /// The matrix, [hidden, in].
    pub matrix: &'a M,
    /// The bias, `[hidden]`.
    pub bias: Option<&'a V>,
    /// The norm of the output before it is added.
    pub norm: Option<NormWeights<'a, V>>,
}

/// The attention of a decoder layer.
#[derive(Debug)]
pub struct AttentionLayer<'a, V> {
    /// Heads, RoPE, scale, window, soft cap.
    pub spec: &'a Attention,
    /// The weight of the norm of queries, if there is one.
    pub q_norm: Option<&'a V>,
    /// The weight of the norm of keys, if there is one.
    pub k_norm: Option<&'a V>,
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

    /// `out[i] = x · matrices[i]ᵀ + biases[i]`, [tokens, out]. `site` says which activations of the
    /// layer `x` is, for observers. If an observer returns `Break`, no product is computed.
    ///
    /// # Errors
    /// Errors of the backend.
    fn linear<const N: usize>(
        &mut self,
        site: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        matrices: [LinearWeights<'_, Self::Matrix, Self::Vector>; N],
        out: [&mut Self::Buffer; N],
    ) -> Flow<Self::Error>;

    /// `residual += norm(x · matrixᵀ + bias)`, [tokens, hidden]; without the norm in most models. Otherwise like
    /// [`BlockOps::linear`].
    ///
    /// # Errors
    /// Errors of the backend.
    fn linear_residual(
        &mut self,
        site: LinearInput,
        x: BlockInput<'_, Self::Buffer, Self::Vector, Self::Residual>,
        output: ResidualLinear<'_, Self::Matrix, Self::Vector>,
        residual: &mut Self::Residual,
    ) -> Flow<Self::Error>;

    /// Adds the output of a mixture of experts, which reads the residual stream normalized with `norm`, to the
    /// residual stream. For observers, its input is that of gate and up.
    ///
    /// # Errors
    /// Errors of the backend.
    fn experts(
        &mut self,
        norm: NormWeights<'_, Self::Vector>,
        layer: ExpertsLayer<'_, Self::Matrix>,
        residual: &mut Self::Residual,
    ) -> Flow<Self::Error>;

    /// Normalizes the residual stream, [tokens, hidden], in place.
    ///
    /// # Errors
    /// Errors of the backend.
    fn normalize(
        &mut self,
        residual: &mut Self::Residual,
        norm: NormWeights<'_, Self::Vector>,
    ) -> Result<(), Self::Error>;

    /// Normalizes q and k if the layer does, rotates them by their positions, appends k and v to the KV cache
    /// and computes causal attention.
    ///
    /// # Errors
    /// Errors of the backend.
    fn attend(
        &mut self,
        layer: AttentionLayer<'_, Self::Vector>,
        x: AttentionBuffers<'_, Self::Buffer>,
    ) -> Result<(), Self::Error>;
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
    let input = sublayer_input(layer, NormSite::Attention, &*residual);
    let matrices = [Linear::Q, Linear::K, Linear::V].map(|linear| weights(layer, linear));
    if ops.linear(LinearInput::Qkv, input, matrices, [&mut *q, &mut *k, &mut *v])?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let attention = AttentionLayer {
        spec: &layer.block.attention,
        q_norm: layer.vector(LayerVector::Norm(NormSite::Query)),
        k_norm: layer.vector(LayerVector::Norm(NormSite::Key)),
    };
    ops.attend(attention, AttentionBuffers { q, k, v, attn_out: &mut *attn_out })?;
    finish_sublayer(ops, Sublayer::Attention, layer, BlockInput::Plain(attn_out), residual)
}

fn mlp<O: BlockOps>(
    ops: &mut O,
    layer: &Layer<O::Matrix, O::Vector>,
    scratch: &mut BlockScratch<O::Buffer>,
    residual: &mut O::Residual, // [tokens, hidden]
) -> Flow<O::Error> {
    if let (Some(spec), Some(router)) = (layer.block.mlp.experts, layer.router()) {
        let experts = ExpertsLayer { spec, router, experts: layer.experts() };
        return ops.experts(norm_weights(layer, NormSite::Mlp), experts, residual);
    }
    let BlockScratch { gate, up, .. } = scratch;
    let input = sublayer_input(layer, NormSite::Mlp, &*residual);
    let up_weights = weights(layer, Linear::Up);
    let (flow, product) = match layer.block.mlp.kind {
        MlpKind::Gated => {
            let matrices = [weights(layer, Linear::Gate), up_weights];
            let flow = ops.linear(LinearInput::GateUp, input, matrices, [&mut *gate, &mut *up])?;
            (flow, BlockInput::Gated { gate, up })
        }
        MlpKind::Plain => {
            let flow = ops.linear(LinearInput::GateUp, input, [up_weights], [&mut *up])?;
            (flow, BlockInput::Activated(up))
        }
    };
    if flow.is_break() {
        return Ok(flow);
    }
    finish_sublayer(ops, Sublayer::Mlp, layer, product, residual)
}

/// The last linear layer of `sublayer`, which reads `x`, and what follows it: the norm of its output or of the
/// residual stream, in models that have one.
///
/// # Errors
/// Errors of the backend.
pub fn finish_sublayer<O: BlockOps>(
    ops: &mut O,
    sublayer: Sublayer,
    layer: &Layer<O::Matrix, O::Vector>,
    x: BlockInput<'_, O::Buffer, O::Vector, O::Residual>,
    residual: &mut O::Residual, // [tokens, hidden]
) -> Flow<O::Error> {
    let (input_norm, output_norm) = match sublayer {
        Sublayer::Attention => (NormSite::Attention, NormSite::AttentionOutput),
        Sublayer::Mlp => (NormSite::Mlp, NormSite::MlpOutput),
    };
    let linear = sublayer.last_linear();
    let placement = layer.block.norm.placement;
    let LinearWeights { matrix, bias } = weights(layer, linear);
    let norm = match placement {
        NormPlacement::Sandwich => Some(norm_weights(layer, output_norm)),
        NormPlacement::Pre | NormPlacement::Post => None,
    };
    let output = ResidualLinear { matrix, bias, norm };
    let flow = ops.linear_residual(linear.input(), x, output, residual)?;
    if flow.is_continue() && placement == NormPlacement::Post {
        ops.normalize(residual, norm_weights(layer, input_norm))?;
    }
    Ok(flow)
}

/// The input of a sublayer: the residual stream, normalized unless the norm comes after the sublayer.
fn sublayer_input<'a, B, M, V, R: ?Sized>(
    layer: &'a Layer<M, V>,
    site: NormSite,
    residual: &'a R,
) -> BlockInput<'a, B, V, R> {
    match layer.block.norm.placement {
        NormPlacement::Post => BlockInput::Residual(residual),
        NormPlacement::Pre | NormPlacement::Sandwich => {
            BlockInput::Norm { x: residual, norm: norm_weights(layer, site) }
        }
    }
}

fn norm_weights<M, V>(layer: &Layer<M, V>, site: NormSite) -> NormWeights<'_, V> {
    NormWeights { weight: layer.norm(site), bias: layer.vector(LayerVector::NormBias(site)) }
}

fn weights<M, V>(layer: &Layer<M, V>, linear: Linear) -> LinearWeights<'_, M, V> {
    LinearWeights { matrix: layer.linear(linear), bias: layer.vector(LayerVector::Bias(linear)) }
}
