//! Helpers that packed and decoded layers on a device share.

use stb_kernels::cuda::{ActivationInput, AttentionShape, Buffer, Device};
use stb_kernels::kv::KvKind;

use crate::block::BlockInput;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::rope::Rope;

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
) -> ActivationInput<&'x Buffer<f32>> {
    match x {
        BlockInput::Plain(x) => ActivationInput::Plain(x),
        BlockInput::Norm { x, weight } => ActivationInput::RmsNorm { x, weight, eps },
        BlockInput::Gated { gate, up } => ActivationInput::SwiGlu { gate, up },
    }
}
