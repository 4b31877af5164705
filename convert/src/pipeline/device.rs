//! Calibration on a GPU. The residual streams of a batch of sequences are copied to the GPU, run through a sublayer and
//! copied back. The inputs of linear layers are summed up on the GPU and never copied.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;
use stb_format::arch::{InputMap, LinearInput};
use stb_kernels::cuda::{Buffer, GemmSize, LinearAlgebra, MatrixSize, Operand, OperandMut};
use stb_runtime::{Layer, Result, Sublayer};

use super::refresh::{InputSums, LayerPair};
use super::run::{Hidden, Run};
use crate::compute::{Accelerator, download};
use crate::hessian::Hessian;
use crate::interrupt::check_interrupt;
use crate::resume::States;

/// Tokens per batch on the device: activations of up to about 4 GB for a model of 7B parameters.
const TOKENS: usize = 16_384;

/// Sequences per batch.
fn batch_size(streams: &[Vec<f32>], features: usize) -> usize {
    let longest = streams.iter().map(Vec::len).max().unwrap_or(0) / features;
    (TOKENS / longest.max(1)).max(1)
}

/// Tokens of each sequence.
fn lengths(streams: &[Vec<f32>], features: usize) -> Vec<usize> {
    streams.iter().map(|stream| stream.len() / features).collect()
}

/// Copies streams to the device, concatenated.
fn upload_streams(dense: &LinearAlgebra, streams: &[Vec<f32>]) -> Result<Buffer<f32>> {
    let mut buffer = zeros(dense, streams.iter().map(Vec::len).sum())?;
    let mut at = 0;
    for stream in streams {
        buffer.write_at(at, stream)?;
        at += stream.len();
    }
    Ok(buffer)
}

/// Copies concatenated streams back from the device.
fn download_streams(from: &Buffer<f32>, streams: &mut [Vec<f32>]) -> Result<()> {
    let mut at = 0;
    for stream in streams {
        from.read_at(at, stream)?;
        at += stream.len();
    }
    Ok(())
}

impl Run<'_> {
    /// Runs all streams through a sublayer of `layer`.
    pub(super) fn sublayer_on_device(
        &self,
        accelerator: &Accelerator,
        sublayer: Sublayer,
        layer: &Layer,
        streams: &mut States,
    ) -> anyhow::Result<()> {
        let features = self.engine.model.hidden_size();
        let mut layers = accelerator.layers();
        let loaded = layers.load(layer, sublayer)?;
        let count = batch_size(streams, features);
        for streams in streams.chunks_mut(count) {
            check_interrupt()?;
            let mut hidden = upload_streams(layers.dense(), streams)?;
            let mut nothing = |_, _: &LinearAlgebra, _: &Buffer<f32>| Ok(ControlFlow::Continue(()));
            let lengths = lengths(streams, features);
            let _ = layers.run(&loaded, &lengths, &mut hidden, &mut nothing)?;
            download_streams(&hidden, streams)?;
        }
        Ok(())
    }

    /// The Hessians of the inputs of `layer`, finished but not damped.
    pub(super) fn hessians_on_device(
        &mut self,
        accelerator: &Accelerator,
        layer: &Layer,
        streams: &[Vec<f32>],
    ) -> anyhow::Result<InputMap<Hessian>> {
        let features = self.engine.model.hidden_size();
        let started = Instant::now();
        let mut layers = accelerator.layers();
        let sublayers =
            [layers.load(layer, Sublayer::Attention)?, layers.load(layer, Sublayer::Mlp)?];
        let size = |input: LinearInput| layer.input_width(input);
        let device = layers.dense().device().clone();
        let mut sums = InputMap::try_from_fn(|input| {
            device.zeros::<f32>("a Hessian", size(input) * size(input))
        })?;
        let mut summing = 0.0;
        for streams in streams.chunks(batch_size(streams, features)) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = upload_streams(layers.dense(), streams)?;
            let mut add = |input: LinearInput, dense: &LinearAlgebra, x: &Buffer<f32>| {
                summing += timed(dense, || {
                    dense.blas().add_gram(x, tokens, size(input), &mut sums[input])
                })?;
                Ok(ControlFlow::Continue(()))
            };
            for sublayer in &sublayers {
                let _ = layers.run(sublayer, &lengths, &mut hidden, &mut add)?;
            }
        }
        let scale = 2.0 / streams.len().max(1) as f32;
        let all = InputMap::try_from_fn(|input| -> Result<Hessian> {
            let (sum, size) = (&mut sums[input], size(input));
            layers.dense().finish_hessian(sum, size, scale)?;
            Ok(Hessian::from_matrix(download(sum, size * size)?, size))
        })?;
        self.stages.hessian += summing;
        self.stages.forward += started.elapsed().as_secs_f64() - summing;
        Ok(all)
    }

    /// The sums over all sequences for [`Run::refreshed_hessian`], with those for targets from the dense model if
    /// `targets` is set. The streams of the dense model then pass the last linear layer of the sublayer if its input
    /// is `input`.
    pub(super) fn input_sums_on_device(
        &mut self,
        accelerator: &Accelerator,
        input: LinearInput,
        pair: LayerPair<'_>,
        hidden: &mut Hidden,
        targets: bool,
    ) -> anyhow::Result<InputSums> {
        let features = self.engine.model.hidden_size();
        let (width, writes_residual) = (pair.partial.input_width(input), input.writes_residual());
        let started = Instant::now();
        let mut layers = accelerator.layers();
        let mut sums = DeviceSums::new(
            layers.dense(),
            input,
            [width, features],
            targets.then_some(writes_residual),
        )?;
        let sublayer = layers.load(pair.partial, Sublayer::of(input))?;
        let original = match targets {
            true => Some(layers.load(pair.dense, Sublayer::of(input))?),
            false => None,
        };
        let streams = &hidden.quantized;
        let count = batch_size(streams, features);
        let mut dense_streams = hidden.dense.chunks_mut(count);
        for streams in streams.chunks(count) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = upload_streams(layers.dense(), streams)?;
            let mut observer =
                |which, dense: &LinearAlgebra, x: &Buffer<f32>| sums.add(which, dense, x, tokens);
            let _ = layers.run(&sublayer, &lengths, &mut hidden, &mut observer)?;
            let Some(original) = &original else { continue };
            let Some(streams) = dense_streams.next() else { continue };
            let mut dense_hidden = upload_streams(layers.dense(), streams)?;
            sums.add_residual_target(layers.dense(), &dense_hidden, &hidden, tokens)?;
            let mut observer = |which, dense: &LinearAlgebra, x: &Buffer<f32>| {
                sums.add_input_target(which, dense, x, tokens)
            };
            let _ = layers.run(original, &lengths, &mut dense_hidden, &mut observer)?;
            if writes_residual {
                download_streams(&dense_hidden, streams)?;
            }
        }
        let (summed, seconds) = sums.finish(layers.dense(), streams.len())?;
        self.stages.hessian += seconds;
        self.stages.forward += started.elapsed().as_secs_f64() - seconds;
        Ok(summed)
    }
}

fn zeros(dense: &LinearAlgebra, count: usize) -> Result<Buffer<f32>> {
    Ok(dense.device().zeros("sums over tokens", count)?)
}

/// Seconds that the device takes for the operations queued by `queue`.
fn timed(
    dense: &LinearAlgebra,
    queue: impl FnOnce() -> stb_kernels::cuda::Result<()>,
) -> stb_kernels::cuda::Result<f64> {
    dense.device().synchronize()?;
    let started = Instant::now();
    queue()?;
    dense.device().synchronize()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Sums over tokens for one input of a layer.
struct DeviceSums {
    input: LinearInput,
    /// Features of the input.
    width: usize,
    /// Features of the residual stream.
    features: usize,
    /// Seconds that the sums took.
    summing: f64,
    /// Σ Xᵀ X, [width, width].
    h: Buffer<f32>,
    target: Option<DeviceTargetSums>,
}

/// Sums over tokens for targets from the dense model.
struct DeviceTargetSums {
    /// Whether the output is added to the residual stream.
    writes_residual: bool,
    /// X of the batch, [tokens, width].
    x: Buffer<f32>,
    /// Scratch for X̃ − X, [tokens, width], or R̃ − R, [tokens, features].
    difference: Buffer<f32>,
    /// Σ (X̃ − X)ᵀ X, [width, width].
    inputs: Buffer<f32>,
    /// Σ (R̃ − R)ᵀ X, [features, width].
    stream: Buffer<f32>,
}

type DeviceFlow = stb_kernels::cuda::Result<ControlFlow<()>>;

impl DeviceSums {
    /// Zero sums for `input`. `widths` are the features of the input and of the residual stream. `target`, for targets
    /// from the dense model, is whether the output is added to the residual stream.
    fn new(
        dense: &LinearAlgebra,
        input: LinearInput,
        widths: [usize; 2],
        target: Option<bool>,
    ) -> Result<Self> {
        let [width, features] = widths;
        let target = match target {
            Some(writes_residual) => Some(DeviceTargetSums {
                writes_residual,
                x: zeros(dense, 0)?,
                difference: zeros(dense, 0)?,
                inputs: zeros(dense, width * width)?,
                stream: zeros(dense, if writes_residual { features * width } else { 0 })?,
            }),
            None => None,
        };
        let h = zeros(dense, width * width)?;
        Ok(Self { input, width, features, summing: 0.0, h, target })
    }

    /// Adds the inputs of the layer in its present state.
    fn add(
        &mut self,
        which: LinearInput,
        dense: &LinearAlgebra,
        x: &Buffer<f32>,
        tokens: usize,
    ) -> DeviceFlow {
        if which != self.input {
            return Ok(ControlFlow::Continue(()));
        }
        let (width, h) = (self.width, &mut self.h);
        self.summing += timed(dense, || dense.blas().add_gram(x, tokens, width, h))?;
        if let Some(target) = &mut self.target {
            grow(dense, &mut target.x, tokens * width)?;
            target.x.copy_part(0, x, 0, tokens * width)?;
        }
        Ok(ControlFlow::Break(()))
    }

    /// Adds the difference of the residual stream from that of the dense model, `dense_stream`.
    fn add_residual_target(
        &mut self,
        dense: &LinearAlgebra,
        dense_stream: &Buffer<f32>,
        stream: &Buffer<f32>,
        tokens: usize,
    ) -> stb_kernels::cuda::Result<()> {
        let (width, features) = (self.width, self.features);
        let Some(target) = self.target.as_mut().filter(|target| target.writes_residual) else {
            return Ok(());
        };
        let DeviceTargetSums { x, difference, stream: sum, .. } = target;
        self.summing += timed(dense, || {
            add_difference_product(
                dense,
                [features, width, tokens],
                [dense_stream, stream],
                x,
                difference,
                sum,
            )
        })?;
        Ok(())
    }

    /// Adds the difference of the inputs from those in the dense model, `dense_x`.
    fn add_input_target(
        &mut self,
        which: LinearInput,
        dense: &LinearAlgebra,
        dense_x: &Buffer<f32>,
        tokens: usize,
    ) -> DeviceFlow {
        let width = self.width;
        let Some(target) = self.target.as_mut().filter(|_| which == self.input) else {
            return Ok(ControlFlow::Continue(()));
        };
        let DeviceTargetSums { x, difference, inputs, writes_residual, .. } = target;
        self.summing += timed(dense, || {
            add_difference_product(
                dense,
                [width, width, tokens],
                [dense_x, x],
                x,
                difference,
                inputs,
            )
        })?;
        Ok(if *writes_residual { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    }

    /// The finished sums, and the seconds they took.
    fn finish(self, dense: &LinearAlgebra, sequences: usize) -> Result<(InputSums, f64)> {
        let Self { width, summing, mut h, target, features, .. } = self;
        let scale = 2.0 / sequences.max(1) as f32;
        dense.finish_hessian(&mut h, width, scale)?;
        let hessian = Hessian::from_matrix(download(&h, width * width)?, width);
        let scaled = |from: &Buffer<f32>, count| -> Result<Vec<f32>> {
            let mut values = download(from, count)?;
            values.par_iter_mut().for_each(|v| *v *= scale);
            Ok(values)
        };
        let target = match target {
            Some(DeviceTargetSums { writes_residual, inputs, stream, .. }) => {
                let stream = match writes_residual {
                    true => Some(scaled(&stream, features * width)?),
                    false => None,
                };
                Some((scaled(&inputs, width * width)?, stream))
            }
            None => None,
        };
        Ok((InputSums { hessian, target }, summing))
    }
}

/// Adds (A − B)ᵀ X to `sum`, [rows, width]: A and B are [tokens, rows], X [tokens, width]; `difference` is
/// scratch.
fn add_difference_product(
    dense: &LinearAlgebra,
    [rows, width, tokens]: [usize; 3],
    [a, b]: [&Buffer<f32>; 2],
    x: &Buffer<f32>,
    difference: &mut Buffer<f32>,
    sum: &mut Buffer<f32>,
) -> stb_kernels::cuda::Result<()> {
    grow(dense, difference, tokens * rows)?;
    let size = MatrixSize { rows: tokens, cols: rows };
    let to = OperandMut::new(difference, 0, rows);
    dense.copy_submatrix(size, Operand::new(a, 0, rows), Some(b), to)?;
    let left = Operand::new(difference, 0, rows).transposed();
    let (size, right) = (GemmSize { m: rows, n: width, k: tokens }, Operand::new(x, 0, width));
    dense.blas().multiply(size, 1.0, left, right, 1.0, OperandMut::new(sum, 0, width))
}

/// Enlarges `buffer` to at least `count` values; its content is lost then.
fn grow(
    dense: &LinearAlgebra,
    buffer: &mut Buffer<f32>,
    count: usize,
) -> stb_kernels::cuda::Result<()> {
    if buffer.len() < count {
        *buffer = dense.device().zeros("activations", count)?;
    }
    Ok(())
}
