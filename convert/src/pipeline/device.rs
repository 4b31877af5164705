//! Calibration on a GPU: streams of several sequences go to it together, through half a layer, and come back;
//! what linear layers read is summed up there and never leaves it.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;
use stb_kernels::cuda::{Buffer, GemmSize, LinearAlgebra, MatrixSize, Operand, OperandMut};
use stb_runtime::{Half, Layer, LinearInput, Result};

use super::refresh::Summed;
use super::{Run, check_interrupt};
use crate::engine::{Accelerator, download};
use crate::hessian::Hessian;
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

/// The half of a layer that ends with the linear layer behind `input`, or has it inside.
fn half_of(input: LinearInput) -> Half {
    match input {
        LinearInput::Attention | LinearInput::AttentionOutput => Half::Attention,
        LinearInput::Mlp | LinearInput::MlpDown => Half::Mlp,
    }
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
    /// Half `half` of `layer` over all streams.
    pub(super) fn half_on_device(
        &self,
        accelerator: &Accelerator,
        half: Half,
        layer: &Layer,
        streams: &mut States,
    ) -> anyhow::Result<()> {
        let features = self.model.norm.len();
        let mut layers = accelerator.layers();
        let loaded = layers.load(layer, half)?;
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

    /// Second moments of the four inputs of `layer` as it is, finished.
    pub(super) fn sums_on_device(
        &mut self,
        accelerator: &Accelerator,
        layer: &Layer,
        streams: &[Vec<f32>],
    ) -> anyhow::Result<Vec<Hessian>> {
        let features = self.model.norm.len();
        let started = Instant::now();
        let mut layers = accelerator.layers();
        let halves = [layers.load(layer, Half::Attention)?, layers.load(layer, Half::Mlp)?];
        let sizes = [layer.q.cols(), layer.o.cols(), layer.gate.cols(), layer.down.cols()];
        let device = layers.dense().device().clone();
        let mut sums = Vec::new();
        for size in sizes {
            sums.push(device.zeros::<f32>("second moments", size * size)?);
        }
        let mut summing = 0.0;
        for streams in streams.chunks(batch(streams, features)) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = send(layers.dense(), streams)?;
            let mut add = |which: LinearInput, dense: &LinearAlgebra, x: &Buffer<f32>| {
                let place = which.index();
                summing += timed(dense, || {
                    dense.blas().add_gram(x, tokens, sizes[place], &mut sums[place])
                })?;
                Ok(ControlFlow::Continue(()))
            };
            for half in &halves {
                let _ = layers.run(half, &lengths, &mut hidden, &mut add)?;
            }
        }
        let scale = 2.0 / streams.len().max(1) as f32;
        let mut all = Vec::new();
        for (size, mut sum) in sizes.into_iter().zip(sums) {
            layers.dense().finish_hessian(&mut sum, size, scale)?;
            all.push(Hessian::from_matrix(download(&sum, size * size)?, size));
        }
        self.stages.moments += summing;
        self.stages.forward += started.elapsed().as_secs_f64() - summing;
        Ok(all)
    }

    /// What [`Run::refreshed_moments`] sums up, for linear layers that read `input`. The `dense_streams`, if there are any,
    /// pass the linear layer behind `input` if it ends a half.
    pub(super) fn summed_on_device(
        &mut self,
        accelerator: &Accelerator,
        input: LinearInput,
        (layer, streams): (&Layer, &[Vec<f32>]),
        (original, dense_streams): (&Layer, &mut [Vec<f32>]),
    ) -> anyhow::Result<Summed> {
        let features = self.model.norm.len();
        let (width, to_stream) = super::refresh::shape(layer, input);
        let started = Instant::now();
        let mut layers = accelerator.layers();
        let mut sums = Sums {
            input,
            width,
            features,
            summing: 0.0,
            h: zeros(layers.dense(), width * width)?,
            shift: None,
        };
        if !dense_streams.is_empty() {
            sums.shift = Some(ShiftSums {
                to_stream,
                x: zeros(layers.dense(), 0)?,
                difference: zeros(layers.dense(), 0)?,
                inputs: zeros(layers.dense(), width * width)?,
                stream: zeros(layers.dense(), if to_stream { features * width } else { 0 })?,
            });
        }
        let half = layers.load(layer, half_of(input))?;
        let original = match sums.shift {
            Some(_) => Some(layers.load(original, half_of(input))?),
            None => None,
        };
        let count = batch(streams, features);
        let mut wanted = dense_streams.chunks_mut(count);
        for streams in streams.chunks(count) {
            check_interrupt()?;
            let lengths = lengths(streams, features);
            let tokens = lengths.iter().sum();
            let mut hidden = send(layers.dense(), streams)?;
            let mut seen =
                |which, dense: &LinearAlgebra, x: &Buffer<f32>| sums.add(which, dense, x, tokens);
            let _ = layers.run(&half, &lengths, &mut hidden, &mut seen)?;
            let (Some(original), Some(streams)) = (&original, wanted.next()) else { continue };
            let mut wanted = send(layers.dense(), streams)?;
            sums.add_streams(layers.dense(), &wanted, &hidden, tokens)?;
            let mut seen = |which, dense: &LinearAlgebra, x: &Buffer<f32>| {
                sums.add_shift(which, dense, x, tokens)
            };
            let _ = layers.run(original, &lengths, &mut wanted, &mut seen)?;
            if to_stream {
                fetch(&wanted, streams)?;
            }
        }
        let summed = sums.finish(layers.dense(), streams.len())?;
        self.stages.moments += summed.1;
        self.stages.forward += started.elapsed().as_secs_f64() - summed.1;
        Ok(summed.0)
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
struct Sums {
    input: LinearInput,
    /// Features of the input and of the residual stream.
    width: usize,
    features: usize,
    /// Seconds.
    summing: f64,
    /// Σ Xᵀ X, [width, width].
    h: Buffer<f32>,
    shift: Option<ShiftSums>,
}

/// Those for targets from the dense model.
struct ShiftSums {
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

impl Sums {
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
        if let Some(shift) = &mut self.shift {
            grow(dense, &mut shift.x, tokens * width)?;
            shift.x.copy_part(0, x, 0, tokens * width)?;
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
        let Some(shift) = self.shift.as_mut().filter(|shift| shift.to_stream) else {
            return Ok(());
        };
        let ShiftSums { x, difference, stream: sum, .. } = shift;
        self.summing += timed(dense, || {
            add_cross(dense, [features, width, tokens], [wanted, stream], x, difference, sum)
        })?;
        Ok(())
    }

    /// Adds how far the inputs are from those in the dense model, `wanted`.
    fn add_shift(
        &mut self,
        which: LinearInput,
        dense: &LinearAlgebra,
        wanted: &Buffer<f32>,
        tokens: usize,
    ) -> Flow {
        let width = self.width;
        let Some(shift) = self.shift.as_mut().filter(|_| which == self.input) else {
            return Ok(ControlFlow::Continue(()));
        };
        let ShiftSums { x, difference, inputs, to_stream, .. } = shift;
        self.summing += timed(dense, || {
            add_cross(dense, [width, width, tokens], [wanted, x], x, difference, inputs)
        })?;
        Ok(if *to_stream { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    }

    /// The finished sums, and the seconds they took.
    fn finish(self, dense: &LinearAlgebra, sequences: usize) -> Result<(Summed, f64)> {
        let Self { width, summing, mut h, shift, features, .. } = self;
        let scale = 2.0 / sequences.max(1) as f32;
        dense.finish_hessian(&mut h, width, scale)?;
        let hessian = Hessian::from_matrix(download(&h, width * width)?, width);
        let scaled = |from: &Buffer<f32>, count| -> Result<Vec<f32>> {
            let mut values = download(from, count)?;
            values.par_iter_mut().for_each(|v| *v *= scale);
            Ok(values)
        };
        let shift = match shift {
            Some(ShiftSums { to_stream, inputs, stream, .. }) => {
                let stream = match to_stream {
                    true => Some(scaled(&stream, features * width)?),
                    false => None,
                };
                Some((scaled(&inputs, width * width)?, stream))
            }
            None => None,
        };
        Ok((Summed { hessian, shift }, summing))
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
