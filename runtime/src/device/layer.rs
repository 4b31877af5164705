//! A decoder layer on a device: its weights, and the order of what happens in it, for any kind of matrix.

use std::ops::ControlFlow;

use stb_kernels::cuda::{ActivationInput, Attention, AttentionArgs, Buffer, Device, SlotMapping};

use crate::error::{Error, Result};
use crate::forward::LinearInput;
use crate::model::Layer;
use crate::weights::Weight;

/// The half of a layer up to the residual stream behind attention.
#[derive(Debug)]
pub(super) struct AttentionHalf<M> {
    norm: Buffer<f32>,
    q: M,
    k: M,
    v: M,
    o: M,
}

/// The other half.
#[derive(Debug)]
pub(super) struct MlpHalf<M> {
    norm: Buffer<f32>,
    gate: M,
    up: M,
    down: M,
}

/// Products with one kind of matrix.
pub(super) trait Products {
    /// A matrix on the device.
    type Matrix;

    /// Queues `out[i]` (+)= `input` · `matrices[i]`ᵀ; to break ends the half before that.
    fn queue(
        &mut self,
        which: LinearInput,
        matrices: &[&Self::Matrix],
        input: ActivationInput<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Result<ControlFlow<()>>;
}

/// What attention needs beside its products, and where its intermediate results go, all [tokens, width].
pub(super) struct AttentionWork<'a> {
    pub attend: &'a mut Attention,
    pub slots: &'a SlotMapping,
    /// Which of the caches' layers this is.
    pub layer: usize,
    /// Tokens that the last one may see.
    pub visible: usize,
    pub q: &'a mut Buffer<f32>,
    pub k: &'a mut Buffer<f32>,
    pub v: &'a mut Buffer<f32>,
    pub attn_out: &'a mut Buffer<f32>,
}

fn vector(device: &Device, values: &[f32]) -> Result<Buffer<f32>> {
    device.upload("a norm", values).map_err(Error::from)
}

impl<M> AttentionHalf<M> {
    /// Copies the half to the device, matrices by `upload`.
    pub(super) fn load(
        device: &Device,
        layer: &Layer,
        upload: impl Fn(&Weight) -> Result<M>,
    ) -> Result<Self> {
        Ok(Self {
            norm: vector(device, &layer.attention_norm)?,
            q: upload(&layer.q)?,
            k: upload(&layer.k)?,
            v: upload(&layer.v)?,
            o: upload(&layer.o)?,
        })
    }

    /// Queues it: `hidden` is [tokens, hidden], changed in place.
    pub(super) fn queue(
        &self,
        products: &mut impl Products<Matrix = M>,
        work: AttentionWork<'_>,
        eps: f32,
        hidden: &mut Buffer<f32>,
    ) -> Result<ControlFlow<()>> {
        let AttentionWork { attend, slots, layer, visible, q, k, v, attn_out } = work;
        let normed = ActivationInput::RmsNorm { x: &*hidden, weight: &self.norm, eps };
        let matrices = [&self.q, &self.k, &self.v];
        let which = LinearInput::Attention;
        if products.queue(which, &matrices, normed, &mut [q, k, v], false)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        attend.queue(AttentionArgs { slots, layer, visible, q, k, v, out: attn_out })?;
        let which = LinearInput::AttentionOutput;
        products.queue(which, &[&self.o], ActivationInput::Plain(attn_out), &mut [hidden], true)
    }
}

impl<M> MlpHalf<M> {
    /// Copies the half to the device, matrices by `upload`.
    pub(super) fn load(
        device: &Device,
        layer: &Layer,
        upload: impl Fn(&Weight) -> Result<M>,
    ) -> Result<Self> {
        Ok(Self {
            norm: vector(device, &layer.mlp_norm)?,
            gate: upload(&layer.gate)?,
            up: upload(&layer.up)?,
            down: upload(&layer.down)?,
        })
    }

    /// Queues it: `hidden` is [tokens, hidden], changed in place.
    pub(super) fn queue(
        &self,
        products: &mut impl Products<Matrix = M>,
        [gate, up]: [&mut Buffer<f32>; 2],
        eps: f32,
        hidden: &mut Buffer<f32>,
    ) -> Result<ControlFlow<()>> {
        let normed = ActivationInput::RmsNorm { x: &*hidden, weight: &self.norm, eps };
        let matrices = [&self.gate, &self.up];
        if products.queue(LinearInput::Mlp, &matrices, normed, &mut [gate, up], false)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let product = ActivationInput::SwiGlu { gate: &*gate, up: &*up };
        products.queue(LinearInput::MlpDown, &[&self.down], product, &mut [hidden], true)
    }
}
