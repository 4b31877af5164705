//! Decoder layers on a device as calibration wants them: weights decoded, everything in f32, and what the linear
//! layers read in sight, without leaving the device.

use std::fmt;
use std::ops::ControlFlow;

use stb_kernels::cuda::{
    self, ActivationInput, ActivationOps, Attention, AttentionShape, Buffer, Device, GemmSize,
    KvCache, LinearAlgebra, Matrix, Operand, OperandMut, SlotMapping,
};
use stb_kernels::kv::KvKind;

use super::layer::{AttentionHalf, AttentionWork, MlpHalf, Products};
use crate::error::Result;
use crate::forward::LinearInput;
use crate::model::{Layer, Model};
use crate::weights::Weight;

/// A half of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Up to the residual stream behind attention.
    Attention,
    /// The rest.
    Mlp,
}

/// Sees what linear layers read, [tokens, in features], as it is on the device. To break ends the half there, before that
/// linear layer.
pub type DeviceObserver<'a> =
    dyn FnMut(LinearInput, &LinearAlgebra, &Buffer<f32>) -> cuda::Result<ControlFlow<()>> + 'a;

/// A weight matrix in f32, [rows, cols].
#[derive(Debug)]
struct Decoded {
    values: Buffer<f32>,
    rows: usize,
    cols: usize,
}

/// A half of a decoder layer on a device, decoded.
#[derive(Debug)]
pub struct DeviceHalf(Loaded);

#[derive(Debug)]
enum Loaded {
    Attention(AttentionHalf<Decoded>),
    Mlp(MlpHalf<Decoded>),
}

/// Runs decoder layers of one model over whole sequences.
pub struct DeviceLayers {
    dense: LinearAlgebra,
    ops: ActivationOps,
    attention: AttentionShape,
    attend: Attention,
    /// One for each sequence of a batch.
    caches: Vec<KvCache>,
    eps: f32,
    /// Products of the norm or of gate and up.
    input: Buffer<f32>,
    /// Queries, keys, values, attention, gate, up: [tokens, width].
    work: [Buffer<f32>; 6],
    widths: [usize; 6],
}

impl fmt::Debug for DeviceLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceLayers on {:?}", self.dense.device())
    }
}

impl DeviceLayers {
    /// For layers of the shapes of `model`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the vendor's libraries are missing or a shape has no kernel.
    pub fn new(device: &Device, model: &Model) -> Result<Self> {
        let attention = AttentionShape { kind: KvKind::F32, ..model.device_attention(1) };
        let make = || device.zeros("activations", 0);
        let intermediate = model.layers.first().map_or(0, |layer| layer.gate.rows());
        let (q, k) = (attention.heads * attention.width, attention.kv_heads * attention.width);
        Ok(Self {
            dense: LinearAlgebra::new(device)?,
            ops: ActivationOps::new(device),
            attention,
            attend: Attention::new(device, attention, &model.frequencies)?,
            caches: Vec::new(),
            eps: model.spec.norm_eps as f32,
            input: make()?,
            work: [make()?, make()?, make()?, make()?, make()?, make()?],
            widths: [q, k, k, q, intermediate, intermediate],
        })
    }

    /// Matrices on its device.
    pub fn dense(&mut self) -> &mut LinearAlgebra {
        &mut self.dense
    }

    /// Copies half a layer to the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is too little memory.
    pub fn load(&self, layer: &Layer, half: Half) -> Result<DeviceHalf> {
        let device = self.dense.device();
        let upload = |weight: &Weight| -> Result<Decoded> {
            let (rows, cols) = (weight.rows(), weight.cols());
            let values = match decode(device, weight) {
                Ok(values) => values,
                // Of encodings that only the CPU has a decoder for.
                Err(cuda::Error::Unsupported { .. }) => {
                    device.upload("a weight matrix", &weight.decode())?
                }
                Err(e) => return Err(e.into()),
            };
            Ok(Decoded { values, rows, cols })
        };
        Ok(DeviceHalf(match half {
            Half::Attention => Loaded::Attention(AttentionHalf::load(device, layer, upload)?),
            Half::Mlp => Loaded::Mlp(MlpHalf::load(device, layer, upload)?),
        }))
    }

    /// Queues half a layer for sequences of these lengths, from their starts, one after another in
    /// `hidden`, [tokens, hidden], which is changed in place. `observer` sees the inputs of the linear layers.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is too little memory, or what `observer` returns.
    ///
    /// # Panics
    /// If `hidden` is too small.
    pub fn run(
        &mut self,
        half: &DeviceHalf,
        lengths: &[usize],
        hidden: &mut Buffer<f32>,
        observer: &mut DeviceObserver<'_>,
    ) -> Result<ControlFlow<()>> {
        let tokens = lengths.iter().sum();
        let used = if matches!(half.0, Loaded::Mlp(_)) { 4..6 } else { 0..4 };
        for (buffer, width) in self.work[used.clone()].iter_mut().zip(&self.widths[used]) {
            if buffer.len() < tokens * width {
                *buffer = self.dense.device().zeros("activations", tokens * width)?;
            }
        }
        let eps = self.eps;
        match &half.0 {
            Loaded::Attention(half) => {
                let slots = &self.places(lengths)?;
                let visible = slots.visible();
                let Self { dense, ops, attend, input, work: [q, k, v, attn_out, ..], .. } = self;
                let work = AttentionWork { attend, slots, layer: 0, visible, q, k, v, attn_out };
                let mut products = Decoding { dense, ops, input, tokens, observer };
                half.queue(&mut products, work, eps, hidden)
            }
            Loaded::Mlp(half) => {
                let Self { dense, ops, input, work: [.., gate, up], .. } = self;
                let mut products = Decoding { dense, ops, input, tokens, observer };
                half.queue(&mut products, [gate, up], eps, hidden)
            }
        }
    }

    /// The places of sequences in their caches.
    fn places(&mut self, lengths: &[usize]) -> Result<SlotMapping> {
        let device = self.dense.device().clone();
        while self.caches.len() < lengths.len() {
            self.caches.push(KvCache::new(&device, self.attention)?);
        }
        for (cache, length) in self.caches.iter_mut().zip(lengths) {
            cache.reserve(*length, *length)?;
        }
        let mut slots = SlotMapping::new(&device, lengths.iter().sum())?;
        let tokens = self.caches.iter().zip(lengths);
        slots.set(tokens.flat_map(|(cache, length)| (0..*length).map(move |at| (cache, at))))?;
        Ok(slots)
    }
}

/// Decodes a matrix on the device, from its stored bytes.
fn decode(device: &Device, weight: &Weight) -> cuda::Result<Buffer<f32>> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let matrix = Matrix::upload(device, weight.encoding(), rows, cols, weight.bytes())?;
    let mut values = device.zeros("a weight matrix", rows * cols)?;
    matrix.queue_dequantize(&mut values)?;
    Ok(values)
}

/// Products with decoded matrices, seen by an observer.
struct Decoding<'a, 'o> {
    dense: &'a LinearAlgebra,
    ops: &'a ActivationOps,
    input: &'a mut Buffer<f32>,
    tokens: usize,
    observer: &'a mut DeviceObserver<'o>,
}

impl Products for Decoding<'_, '_> {
    type Matrix = Decoded;

    fn queue(
        &mut self,
        which: LinearInput,
        matrices: &[&Decoded],
        input: ActivationInput<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Result<ControlFlow<()>> {
        let (tokens, cols) = (self.tokens, matrices.first().map_or(0, |m| m.cols));
        let x = match input {
            ActivationInput::Plain(x) => x,
            _ => {
                if self.input.len() < tokens * cols {
                    *self.input = self.dense.device().zeros("activations", tokens * cols)?;
                }
                self.ops.compute(input, self.input, cols, tokens)?;
                &*self.input
            }
        };
        if (self.observer)(which, self.dense, x)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for (matrix, out) in matrices.iter().zip(out) {
            let Decoded { values, rows, .. } = matrix;
            let left = Operand::new(x, 0, cols);
            let right = Operand::new(values, 0, cols).transposed();
            let before = if add { 1.0 } else { 0.0 };
            let size = GemmSize { m: tokens, n: *rows, k: cols };
            let out = OperandMut::new(out, 0, *rows);
            self.dense.blas().multiply(size, 1.0, left, right, before, out)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}
