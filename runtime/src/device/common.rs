//! Helpers that packed and decoded layers on a device share.

use stb_kernels::cuda::{ActivationInput, AttentionShape, Buffer, Device};
use stb_kernels::kv::KvKind;

use crate::block::{BlockInput, LinearWeights, ResidualLinear};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::rope::Rope;

/// Refuses models with features that the kernels of the device lack.
pub(super) fn require_supported(model: &Model) -> Result<()> {
    if model.spec.is_llama() {
        return Ok(());
    }
    Err(Error::unsupported(
        "CUDA runs models that compute as LLaMA does, and this one does not; use --device cpu"
            .to_owned(),
    ))
}

/// An operation that [`require_supported`] rules out.
pub(super) fn missing_kernel(what: &str) -> Error {
    Error::Internal { what: format!("a CUDA kernel for {what}") }
}

/// The matrix of a linear layer without bias.
pub(super) fn matrix_only<'a, M, V>(weights: &LinearWeights<'a, M, V>) -> Result<&'a M> {
    match weights.bias {
        None => Ok(weights.matrix),
        Some(_) => Err(missing_kernel("biases")),
    }
}

/// The matrix of a linear layer without bias and norm.
pub(super) fn residual_matrix_only<'a, M, V>(output: &ResidualLinear<'a, M, V>) -> Result<&'a M> {
    match (output.bias, output.norm) {
        (None, None) => Ok(output.matrix),
        _ => Err(missing_kernel("biases and norms of outputs")),
    }
}

/// Copies the weight of a norm to the device.
pub(super) fn upload_norm(device: &Device, values: &[f32]) -> Result<Buffer<f32>> {
    device.upload("a norm", values).map_err(Error::from)
}

/// The shape of attention for `layers` layers of `model`.
pub(super) fn attention_shape(model: &Model, layers: usize, kind: KvKind) -> AttentionShape {
    let attention = model.spec.block(0).attention;
    AttentionShape {
        heads: attention.heads as usize,
        kv_heads: attention.kv_heads as usize,
        width: attention.head_dim as usize,
        layers,
        kind,
        interleaved: Rope::new(&model.spec).interleaved,
    }
}

/// Converts the input of a linear layer to the type of the kernels.
pub(super) fn kernel_input<'x>(
    x: BlockInput<'x, Buffer<f32>, Buffer<f32>>,
    eps: f32,
) -> Result<ActivationInput<&'x Buffer<f32>>> {
    match x {
        BlockInput::Plain(x) | BlockInput::Residual(x) => Ok(ActivationInput::Plain(x)),
        BlockInput::Norm { x, norm } => {
            Ok(ActivationInput::RmsNorm { x, weight: norm.weight, eps })
        }
        BlockInput::Gated { gate, up } => Ok(ActivationInput::SwiGlu { gate, up }),
        BlockInput::Activated(_) => Err(missing_kernel("an MLP without gate")),
    }
}
