//! Decoder layers on a device for calibration: weights are decoded, everything is f32, and observers
//! see the inputs of the linear layers on the device.

use std::fmt;
use std::ops::ControlFlow;

use stb_format::arch::LinearInput;
use stb_kernels::cuda::{
    self, ActivationInput, ActivationOps, Attention, AttentionArgs, AttentionShape, Buffer, Device,
    GemmSize, KvCache, LinearAlgebra, Matrix, Operand, OperandMut, SlotMapping,
};
use stb_kernels::kv::KvKind;

use super::common::{
    attention_shape, kernel_input, matrix_only, missing_kernel, require_supported,
    residual_matrix_only, upload_norm,
};
use crate::block::{
    AttentionBuffers, AttentionLayer, BlockInput, BlockOps, BlockScratch, Flow, LinearWeights,
    NormWeights, ResidualLinear, run_sublayer,
};
use crate::error::{Error, Result};
use crate::experts::ExpertsLayer;
use crate::layer::Layer;
use crate::model::Model;
use crate::rope::Rope;
use crate::sublayer::Sublayer;
use crate::weights::Weight;

/// Observes the inputs of linear layers, [tokens, in features], on the device. `Break` stops the
/// sublayer before the linear layers that read the input.
pub type DeviceObserver<'a> =
    dyn FnMut(LinearInput, &LinearAlgebra, &Buffer<f32>) -> cuda::Result<ControlFlow<()>> + 'a;

/// A weight matrix in f32, [rows, cols].
#[derive(Debug)]
struct Decoded {
    values: Buffer<f32>,
    rows: usize,
    cols: usize,
}

/// A sublayer of a decoder layer with decoded weights on a device.
#[derive(Debug)]
pub struct DeviceSublayer {
    which: Sublayer,
    /// Only the weights of the sublayer.
    layer: Layer<Decoded, Buffer<f32>>,
}

/// Runs decoder layers of one model over whole sequences.
pub struct DeviceLayers {
    dense: LinearAlgebra,
    ops: ActivationOps,
    attention: AttentionShape,
    attend: Attention,
    /// One cache per sequence of a batch.
    caches: Vec<KvCache>,
    eps: f32,
    /// The input of a linear layer: a norm, or the product of gate and up.
    input: Buffer<f32>,
    scratch: BlockScratch<Buffer<f32>>,
    intermediate: usize,
}

impl fmt::Debug for DeviceLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceLayers on {:?}", self.dense.device())
    }
}

impl DeviceLayers {
    /// Prepares to run layers with the shapes of `model`.
    ///
    /// # Errors
    /// [`Error::Device`] if cuBLAS is missing or a shape has no kernel.
    pub fn new(device: &Device, model: &Model) -> Result<Self> {
        require_supported(model)?;
        let attention = attention_shape(model, 1, KvKind::F32);
        let make = || device.zeros("activations", 0);
        Ok(Self {
            dense: LinearAlgebra::new(device)?,
            ops: ActivationOps::new(device),
            attention,
            attend: Attention::new(device, attention, &Rope::new(&model.spec).global.frequencies)?,
            caches: Vec::new(),
            eps: model.spec.norm_eps as f32,
            input: make()?,
            scratch: BlockScratch {
                q: make()?,
                k: make()?,
                v: make()?,
                attn_out: make()?,
                gate: make()?,
                up: make()?,
            },
            intermediate: model.spec.block(0).mlp.intermediate_size as usize,
        })
    }

    /// Linear algebra on the device.
    pub fn dense(&mut self) -> &mut LinearAlgebra {
        &mut self.dense
    }

    /// Copies a sublayer to the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory.
    pub fn load(&self, layer: &Layer, which: Sublayer) -> Result<DeviceSublayer> {
        let device = self.dense.device();
        let upload = |weight: &Weight| -> Result<Decoded> {
            let (rows, cols) = (weight.rows(), weight.cols());
            let values = match decode(device, weight) {
                Ok(values) => values,
                // The encoding has no decoder on the device.
                Err(cuda::Error::Unsupported { .. }) => {
                    device.upload("a weight matrix", &weight.decode())?
                }
                Err(e) => return Err(e.into()),
            };
            Ok(Decoded { values, rows, cols })
        };
        let layer = layer.part(which).try_map(upload, |norm| upload_norm(device, norm))?;
        Ok(DeviceSublayer { which, layer })
    }

    /// Queues a sublayer for whole sequences with these lengths, concatenated in `hidden`, [tokens,
    /// hidden], which is updated. `observer` sees the inputs of the linear layers.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory, or the error of `observer`.
    ///
    /// # Panics
    /// If `hidden` is too small.
    pub fn run(
        &mut self,
        sublayer: &DeviceSublayer,
        lengths: &[usize],
        hidden: &mut Buffer<f32>,
        observer: &mut DeviceObserver<'_>,
    ) -> Result<ControlFlow<()>> {
        let tokens = lengths.iter().sum();
        self.reserve(sublayer.which, tokens)?;
        let slots = match sublayer.which {
            Sublayer::Attention => Some(self.slots(lengths)?),
            Sublayer::Mlp => None,
        };
        let Self { dense, ops, attend, input, scratch, eps, .. } = self;
        let slots = slots.as_ref();
        let mut ops = DecodedOps { dense, ops, attend, slots, input, eps: *eps, tokens, observer };
        run_sublayer(&mut ops, sublayer.which, &sublayer.layer, scratch, hidden)
    }

    /// Allocates buffers for the activations of `tokens` tokens.
    fn reserve(&mut self, which: Sublayer, tokens: usize) -> Result<()> {
        let BlockScratch { q, k, v, attn_out, gate, up } = &mut self.scratch;
        let q_width = self.attention.heads * self.attention.width;
        let kv_width = self.attention.kv_heads * self.attention.width;
        let needed = match which {
            Sublayer::Attention => {
                vec![(q, q_width), (k, kv_width), (v, kv_width), (attn_out, q_width)]
            }
            Sublayer::Mlp => vec![(gate, self.intermediate), (up, self.intermediate)],
        };
        for (buffer, width) in needed {
            if buffer.len() < tokens * width {
                *buffer = self.dense.device().zeros("activations", tokens * width)?;
            }
        }
        Ok(())
    }

    /// The cache slots of sequences with these lengths.
    fn slots(&mut self, lengths: &[usize]) -> Result<SlotMapping> {
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

/// Uploads the stored bytes of a matrix and decodes them on the device.
fn decode(device: &Device, weight: &Weight) -> cuda::Result<Buffer<f32>> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let matrix = Matrix::upload(device, weight.encoding(), rows, cols, weight.bytes())?;
    let mut values = device.zeros("a weight matrix", rows * cols)?;
    matrix.queue_dequantize(&mut values)?;
    Ok(values)
}

/// [`BlockOps`] with decoded matrices. An observer sees the inputs of the linear layers.
struct DecodedOps<'a, 'o> {
    dense: &'a LinearAlgebra,
    ops: &'a ActivationOps,
    attend: &'a mut Attention,
    /// The cache slots; `None` in the MLP.
    slots: Option<&'a SlotMapping>,
    input: &'a mut Buffer<f32>,
    eps: f32,
    tokens: usize,
    observer: &'a mut DeviceObserver<'o>,
}

impl DecodedOps<'_, '_> {
    /// Calls the observer with `x`, then queues `out[i] = beta · out[i] + x · matrices[i]ᵀ`.
    fn queue(
        &mut self,
        which: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        matrices: &[&Decoded],
        out: &mut [&mut Buffer<f32>],
        beta: f32,
    ) -> Flow<Error> {
        let (tokens, cols) = (self.tokens, matrices.first().map_or(0, |m| m.cols));
        let x = match kernel_input(x, self.eps)? {
            ActivationInput::Plain(x) => x,
            input => {
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
            let size = GemmSize { m: tokens, n: *rows, k: cols };
            let out = OperandMut::new(out, 0, *rows);
            self.dense.blas().multiply(size, 1.0, left, right, beta, out)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl BlockOps for DecodedOps<'_, '_> {
    type Matrix = Decoded;
    type Vector = Buffer<f32>;
    type Buffer = Buffer<f32>;
    type Residual = Buffer<f32>;
    type Error = Error;

    fn linear<const N: usize>(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        weights: [LinearWeights<'_, Decoded, Buffer<f32>>; N],
        mut out: [&mut Buffer<f32>; N],
    ) -> Flow<Error> {
        let matrices = weights.iter().map(matrix_only).collect::<Result<Vec<_>>>()?;
        self.queue(input, x, &matrices, &mut out, 0.0)
    }

    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        output: ResidualLinear<'_, Decoded, Buffer<f32>>,
        residual: &mut Buffer<f32>,
    ) -> Flow<Error> {
        self.queue(input, x, &[residual_matrix_only(&output)?], &mut [residual], 1.0)
    }

    fn experts(
        &mut self,
        _: NormWeights<'_, Buffer<f32>>,
        _: ExpertsLayer<'_, Decoded>,
        _: &mut Buffer<f32>,
    ) -> Flow<Error> {
        Err(missing_kernel("mixtures of experts"))
    }

    fn normalize(&mut self, _: &mut Buffer<f32>, _: NormWeights<'_, Buffer<f32>>) -> Result<()> {
        Err(missing_kernel("norms of the residual stream"))
    }

    fn attend(
        &mut self,
        _: AttentionLayer<'_, Buffer<f32>>,
        x: AttentionBuffers<'_, Buffer<f32>>,
    ) -> Result<()> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        let Some(slots) = self.slots else { return Ok(()) };
        Ok(self.attend.queue(AttentionArgs {
            slots,
            layer: 0,
            visible: slots.visible(),
            q,
            k,
            v,
            out: attn_out,
        })?)
    }
}
