//! Calibration on a GPU: streams of several sequences go to it together, through half a layer, and come back;
//! what linear layers read is summed up there and never leaves it.

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

/// Tokens that are on the device together: their activations take up to some 4 GB for a model of 7B parameters.
const TOKENS: usize = 16_384;

/// Sequences for one step.
fn batch(streams: &[Vec<f32>], features: usize) -> usize {
    let longest = streams.iter().map(Vec::len).max().unwrap_or(0) / features;
    (TOKENS / longest.max(1)).max(1)
}

/// Tokens of each sequence.
fn lengths(streams: &[Vec<f32>], features: usize) -> Vec<usize> {
    streams.iter().map(|stream| stream.len() / features).collect()
}

/// Streams one after another on the device.
fn send(dense: &LinearAlgebra, streams: &[Vec<f32>]) -> Result<Buffer<f32>> {
    let mut to = zeros(dense, streams.iter().map(Vec::len).sum())?;
    let mut at = 0;
    for stream in streams {
        to.write_at(at, stream)?;
        at += stream.len();
    }
    Ok(to)
}

/// From the device back to the streams.
fn fetch(from: &Buffer<f32>, streams: &mut [Vec<f32>]) -> Result<()> {
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
        let count = batch(streams, features);
        for streams in streams.chunks_mut(count) {
            check_interrupt()?;
            let mut hidden = send(layers.dense(), streams)?;
            let mut nothing = |_, _: &LinearAlgebra, _: &Buffer<f32>| Ok(ControlFlow::Continue(()));
            let lengths = lengths(streams, features);
            let _ = layers.run(&loaded, &lengths, &mut hidden, &mut nothing)?;
            fetch(&hidden, streams)?;
        }
        Ok(())
    }

    /// The Hessians of the inputs of `layer` as it is, finished but not damped.
    pub(super) fn sums_on_device(
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
        for streams in streams.chunks(batch(streams, features)) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = send(layers.dense(), streams)?;
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

    /// What [`Run::refreshed_hessian`] sums up over all sequences; `targets` if those of the dense model are
    /// wanted. The streams of the dense model then pass the last linear layer of the sublayer if that reads
    /// `input`.
    pub(super) fn sum_on_device(
        &mut self,
        accelerator: &Accelerator,
        input: LinearInput,
        pair: LayerPair<'_>,
        hidden: &mut Hidden,
        targets: bool,
    ) -> anyhow::Result<InputSums> {
        let features = self.engine.model.hidden_size();
        let (width, to_stream) = (pair.now.input_width(input), input.writes_residual());
        let started = Instant::now();
        let mut layers = accelerator.layers();
        let mut sums = DeviceSums::new(
            layers.dense(),
            input,
            [width, features],
            targets.then_some(to_stream),
        )?;
        let sublayer = layers.load(pair.now, Sublayer::of(input))?;
        let original = match targets {
            true => Some(layers.load(pair.dense, Sublayer::of(input))?),
            false => None,
        };
        let streams = &hidden.quantized;
        let count = batch(streams, features);
        let mut wanted = hidden.dense.chunks_mut(count);
        for streams in streams.chunks(count) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = send(layers.dense(), streams)?;
            let mut observer =
                |which, dense: &LinearAlgebra, x: &Buffer<f32>| sums.add(which, dense, x, tokens);
            let _ = layers.run(&sublayer, &lengths, &mut hidden, &mut observer)?;
            let Some(original) = &original else { continue };
            let Some(streams) = wanted.next() else { continue };
            let mut wanted = send(layers.dense(), streams)?;
            sums.add_streams(layers.dense(), &wanted, &hidden, tokens)?;
            let mut observer = |which, dense: &LinearAlgebra, x: &Buffer<f32>| {
                sums.add_target(which, dense, x, tokens)
            };
            let _ = layers.run(original, &lengths, &mut wanted, &mut observer)?;
            if to_stream {
                fetch(&wanted, streams)?;
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

/// Seconds that the device takes for what `queue` queues.
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
    /// Features of the input and of the residual stream.
    width: usize,
    features: usize,
    /// Seconds.
    summing: f64,
    /// Σ Xᵀ X, [width, width].
    h: Buffer<f32>,
    target: Option<DeviceTargetSums>,
}

/// Those for targets from the dense model.
struct DeviceTargetSums {
    /// Whether the output is added to the residual stream.
    to_stream: bool,
    /// X of the batch, [tokens, width].
    x: Buffer<f32>,
    /// What is subtracted from one another, [tokens, width] or [tokens, features].
    difference: Buffer<f32>,
    /// Σ (X̃ − X)ᵀ X, [width, width].
    inputs: Buffer<f32>,
    /// Σ (R̃ − R)ᵀ X, [features, width].
    stream: Buffer<f32>,
}

type Flow = stb_kernels::cuda::Result<ControlFlow<()>>;

impl DeviceSums {
    /// Zeros for an input: `widths` are those of the input and of the residual stream. With `target`, sums for
    /// targets from the dense model too; it says whether the output is added to the residual stream.
    fn new(
        dense: &LinearAlgebra,
        input: LinearInput,
        widths: [usize; 2],
        target: Option<bool>,
    ) -> Result<Self> {
        let [width, features] = widths;
        let target = match target {
            Some(to_stream) => Some(DeviceTargetSums {
                to_stream,
                x: zeros(dense, 0)?,
                difference: zeros(dense, 0)?,
                inputs: zeros(dense, width * width)?,
                stream: zeros(dense, if to_stream { features * width } else { 0 })?,
            }),
            None => None,
        };
        let h = zeros(dense, width * width)?;
        Ok(Self { input, width, features, summing: 0.0, h, target })
    }

    /// Adds the inputs of the layer as it is.
    fn add(
        &mut self,
        which: LinearInput,
        dense: &LinearAlgebra,
        x: &Buffer<f32>,
        tokens: usize,
    ) -> Flow {
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

    /// Adds how far the residual stream is from that of the dense model.
    fn add_streams(
        &mut self,
        dense: &LinearAlgebra,
        wanted: &Buffer<f32>,
        stream: &Buffer<f32>,
        tokens: usize,
    ) -> stb_kernels::cuda::Result<()> {
        let (width, features) = (self.width, self.features);
        let Some(target) = self.target.as_mut().filter(|target| target.to_stream) else {
            return Ok(());
        };
        let DeviceTargetSums { x, difference, stream: sum, .. } = target;
        self.summing += timed(dense, || {
            add_cross(dense, [features, width, tokens], [wanted, stream], x, difference, sum)
        })?;
        Ok(())
    }

    /// Adds how far the inputs are from those in the dense model, `wanted`.
    fn add_target(
        &mut self,
        which: LinearInput,
        dense: &LinearAlgebra,
        wanted: &Buffer<f32>,
        tokens: usize,
    ) -> Flow {
        let width = self.width;
        let Some(target) = self.target.as_mut().filter(|_| which == self.input) else {
            return Ok(ControlFlow::Continue(()));
        };
        let DeviceTargetSums { x, difference, inputs, to_stream, .. } = target;
        self.summing += timed(dense, || {
            add_cross(dense, [width, width, tokens], [wanted, x], x, difference, inputs)
        })?;
        Ok(if *to_stream { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
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
            Some(DeviceTargetSums { to_stream, inputs, stream, .. }) => {
                let stream = match to_stream {
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
fn add_cross(
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
