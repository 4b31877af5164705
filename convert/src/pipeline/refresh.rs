//! Hessians of the inputs computed with the layers quantized so far, and targets from the dense model.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;
use stb_format::arch::{LinearInput, NormPlacement};
use stb_kernels::Isa;
use stb_runtime::{Layer, Observer, Result, Sublayer};

use super::limits::{BATCH, KEPT_BYTES};
use super::run::{Hidden, Run};
use crate::compute::{Compute, Right};
use crate::hessian::{CrossHessian, Factor, Hessian};
use crate::interrupt::check_interrupt;
use crate::resume::States;

/// Extra ridge against overfitting short calibration sets; its value where an input has as many features as there are
/// calibration tokens.
const SHORT_TEXT_RIDGE: f64 = 4.0;
/// The sublayers of a decoder layer: attention and MLP.
pub(super) const ALL_SUBLAYERS: usize = 2;

/// The output of a linear layer in the dense model as a target, in the form of sums over the differences between the
/// inputs here and in the dense model.
pub(super) struct DenseTarget {
    /// E = (2/n) Σ (X̃ − X)ᵀ X, [in, in]; X̃ are the inputs in the dense model, X those here.
    inputs: Vec<f32>,
    /// D = (2/n) Σ (R̃ − R)ᵀ X, [hidden, in]; R̃ is the residual stream in the dense model, R that here. `None` where
    /// [`corrects_stream`] is false.
    stream: Option<Vec<f32>>,
    /// The factors of the Hessian with the ridge Λ.
    factor: Factor,
}

impl DenseTarget {
    /// Replaces `weights` W, [rows, in], by the weights W* whose output for the present inputs is closest to that of the
    /// dense model: the ridge regression W* = W + (W E + D) (H + Λ)⁻¹, which minimizes
    /// ‖W X̃ + R̃ − R − W* X‖² + ‖(W* − W) Λ^½‖².
    pub(super) fn apply(&self, compute: Compute<'_>, weights: &mut [f32]) -> Result<()> {
        let n = self.factor.size;
        let mut change = compute.product(weights, n, Right::Plain(&self.inputs), n)?;
        if let Some(stream) = &self.stream {
            change.par_iter_mut().zip(stream).for_each(|(c, s)| *c += s);
        }
        let change = compute.times_inverse(&self.factor, &change)?;
        weights.par_iter_mut().zip(change).for_each(|(w, c)| *w += c);
        Ok(())
    }
}

/// The Hessian of one input of a decoder layer, damped and factored.
pub(super) struct InputHessian {
    pub(super) hessian: Hessian,
    pub(super) factor: Factor,
    pub(super) norms: Vec<f32>,
    /// The output of the dense model, if that is the target.
    pub(super) target: Option<DenseTarget>,
}

/// Whether the target of the linear layer that reads `input` makes up for the difference of the residual stream from
/// the dense model: if the output is added to the stream as it is. Where a norm comes between (Gemma 2), a change of
/// the output does not change the sum by as much, and the target is the output of the dense model alone.
fn corrects_stream(layer: &Layer, input: LinearInput) -> bool {
    input.writes_residual() && layer.block.norm.placement != NormPlacement::Sandwich
}

/// Keeps one input of the layer; stops there unless `proceed` is set.
pub(super) struct KeepInput {
    input: LinearInput,
    proceed: bool,
    pub(super) x: Vec<f32>,
}

impl KeepInput {
    /// Keeps `input` and stops there.
    pub(super) fn up_to(input: LinearInput) -> Self {
        Self { input, proceed: false, x: Vec::new() }
    }
}

impl Observer for KeepInput {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        if input == self.input {
            self.x = x.to_vec();
            return if self.proceed { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
        }
        ControlFlow::Continue(())
    }
}

/// The input of a linear layer in one sequence, and its difference from the dense model.
struct ActivationPair {
    /// The input, [tokens, in].
    x: Vec<f32>,
    /// X̃ − X: the input in the dense model minus `x`; empty without a target from the dense model.
    inputs: Vec<f32>,
    /// R̃ − R: the residual stream in the dense model minus that here, [tokens, hidden]; or empty.
    stream: Vec<f32>,
}

/// A decoder layer with the linear layers quantized so far, and the same layer of the dense model.
#[derive(Clone, Copy)]
pub(super) struct LayerPair<'a> {
    pub(super) partial: &'a Layer,
    pub(super) dense: &'a Layer,
}

/// `a` − `b`.
fn difference(mut a: Vec<f32>, b: &[f32]) -> Vec<f32> {
    a.iter_mut().zip(b).for_each(|(a, b)| *a -= b);
    a
}

/// One field of all sequences of a batch, concatenated.
fn concatenate(pairs: &[ActivationPair], field: fn(&ActivationPair) -> &[f32]) -> Vec<f32> {
    pairs.iter().map(field).collect::<Vec<_>>().concat()
}

/// The position of residual streams in a layer. They advance in place, sublayer by sublayer, so that finished
/// sublayers are not computed again.
#[derive(Default)]
pub(super) struct StreamPosition {
    /// Sublayers that the streams have passed.
    sublayers: usize,
    /// The input of the last linear layer of the next sublayer, [tokens, in] for each sequence; empty if not kept.
    kept: States,
}

/// The positions of the streams in [`Hidden`] from which Hessians are computed.
#[derive(Default)]
pub(super) struct StreamPositions {
    pub(super) quantized: StreamPosition,
    pub(super) dense: StreamPosition,
}

/// Sums over the calibration sequences for one input of a layer.
pub(super) struct InputSums {
    /// The Hessian, finished but not damped.
    pub(super) hessian: Hessian,
    /// The first two fields of [`DenseTarget`].
    pub(super) target: Option<(Vec<f32>, Option<Vec<f32>>)>,
}

/// The undamped Hessian with the ridge of [`DenseTarget`] added.
fn with_ridge(hessian: &Hessian, ridge: f64, tokens: usize) -> Hessian {
    let extra = SHORT_TEXT_RIDGE * hessian.size as f64 / tokens.max(1) as f64;
    let mut hessian = hessian.clone();
    hessian.add_ridge(ridge + extra);
    hessian
}

/// Sums for [`DenseTarget`].
struct TargetSums {
    inputs: CrossHessian,
    stream: Option<CrossHessian>,
}

impl TargetSums {
    /// Adds a batch. `x` are the inputs of all `pairs`.
    fn add(&mut self, isa: Isa, pairs: &[ActivationPair], x: &[f32]) {
        self.inputs.add(isa, &concatenate(pairs, |s| &s.inputs), x, pairs.len());
        if let Some(stream) = &mut self.stream {
            stream.add(isa, &concatenate(pairs, |s| &s.stream), x, pairs.len());
        }
    }

    fn finish(self) -> (Vec<f32>, Option<Vec<f32>>) {
        (self.inputs.finish(), self.stream.map(CrossHessian::finish))
    }
}

impl Run<'_> {
    /// The Hessian of `input` with the linear layers quantized so far, and the target from the dense model if the
    /// recipe has a ridge for it.
    pub(super) fn refreshed_hessian(
        &mut self,
        input: LinearInput,
        layers: LayerPair<'_>,
        hidden: &mut Hidden,
        progress: &mut StreamPositions,
    ) -> anyhow::Result<InputHessian> {
        if Sublayer::of(input) == Sublayer::Mlp {
            self.advance(1, layers.partial, &mut hidden.quantized, &mut progress.quantized)?;
        }
        let ridge = self.job.recipe.calibration.ridge;
        let sums = match self.accelerator {
            Some(accelerator) => {
                self.input_sums_on_device(accelerator, input, layers, hidden, ridge.is_some())?
            }
            None => self.input_sums(input, layers, hidden, progress, ridge.is_some())?,
        };
        if input.writes_residual() && ridge.is_some() {
            progress.dense.sublayers += 1;
        }
        let features = self.engine.model.hidden_size();
        let tokens = hidden.quantized.iter().map(Vec::len).sum::<usize>() / features;
        let started = Instant::now();
        let InputSums { mut hessian, target } = sums;
        let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        let target = match target.zip(ridge) {
            Some(((inputs, stream), ridge)) => {
                let factor = self.compute().factor(&with_ridge(&hessian, ridge, tokens))?;
                Some(DenseTarget { inputs, stream, factor })
            }
            None => None,
        };
        hessian.damp(self.job.recipe.calibration.damping);
        let factor = self.compute().factor(&hessian)?;
        self.stages.factors += started.elapsed().as_secs_f64();
        Ok(InputHessian { hessian, factor, norms, target })
    }

    /// The sums over all sequences, with those for targets from the dense model if `targets` is set.
    fn input_sums(
        &mut self,
        input: LinearInput,
        layers: LayerPair<'_>,
        hidden: &mut Hidden,
        progress: &mut StreamPositions,
        targets: bool,
    ) -> anyhow::Result<InputSums> {
        let isa = self.engine.isa;
        let (width, writes_residual) = (layers.partial.input_width(input), input.writes_residual());
        let features = self.engine.model.hidden_size();
        let mut hessian = Hessian::new(width);
        let mut sums = targets.then(|| TargetSums {
            inputs: CrossHessian::new(width, width),
            stream: corrects_stream(layers.partial, input)
                .then(|| CrossHessian::new(features, width)),
        });
        let tokens = hidden.quantized.iter().map(Vec::len).sum::<usize>() / features;
        let keep = writes_residual && tokens * width * size_of::<f32>() <= KEPT_BYTES;
        let mut dense_streams = hidden.dense.iter_mut();
        for states in hidden.quantized.chunks_mut(BATCH) {
            check_interrupt()?;
            let started = Instant::now();
            let dense_states: Vec<&mut Vec<f32>> = match &sums {
                Some(_) => dense_streams.by_ref().take(states.len()).collect(),
                None => Vec::new(),
            };
            let pairs = self.activations(input, layers, states, dense_states);
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            let x = concatenate(&pairs, |s| &s.x);
            hessian.add(isa, &x);
            pairs.iter().for_each(|_| hessian.count_sequence());
            if let Some(sums) = &mut sums {
                sums.add(isa, &pairs, &x);
            }
            if keep {
                progress.quantized.kept.extend(pairs.into_iter().map(|s| s.x));
            }
            self.stages.hessian += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        hessian.finish();
        let target = sums.map(TargetSums::finish);
        self.stages.hessian += started.elapsed().as_secs_f64();
        Ok(InputSums { hessian, target })
    }

    /// Runs sequences from their position up to `input`. Streams of the dense model, if any, also pass the last linear
    /// layer of the sublayer if its input is `input`: its weights are final in the dense model.
    fn activations(
        &self,
        input: LinearInput,
        layers: LayerPair<'_>,
        states: &mut [Vec<f32>],
        dense_states: Vec<&mut Vec<f32>>,
    ) -> Vec<ActivationPair> {
        let run = |layer: &Layer, stream: &mut [f32], proceed: bool| {
            let mut observer = KeepInput { input, proceed, x: Vec::new() };
            let _ = self.engine.run_sublayer(Sublayer::of(input), layer, stream, &mut observer);
            observer.x
        };
        let writes_residual = input.writes_residual();
        let corrects_stream = corrects_stream(layers.partial, input);
        let mut dense: Vec<Option<&mut Vec<f32>>> = dense_states.into_iter().map(Some).collect();
        dense.resize_with(states.len(), || None);
        let pairs = states.par_iter_mut().zip(dense);
        pairs
            .map(|(stream, dense)| {
                let x = run(layers.partial, stream, false);
                let Some(dense) = dense else {
                    return ActivationPair { x, inputs: Vec::new(), stream: Vec::new() };
                };
                let residual =
                    if corrects_stream { difference(dense.clone(), stream) } else { Vec::new() };
                let inputs = difference(run(layers.dense, dense, writes_residual), &x);
                ActivationPair { x, inputs, stream: residual }
            })
            .collect()
    }

    /// Advances streams to the end of the first `sublayers` sublayers of `layer`, which must be finished.
    pub(super) fn advance(
        &mut self,
        sublayers: usize,
        layer: &Layer,
        streams: &mut States,
        position: &mut StreamPosition,
    ) -> anyhow::Result<()> {
        while position.sublayers < sublayers {
            let kept = std::mem::take(&mut position.kept);
            let sublayer =
                if position.sublayers == 0 { Sublayer::Attention } else { Sublayer::Mlp };
            self.run_sublayer_batches(sublayer, layer, streams, &kept)?;
            position.sublayers += 1;
        }
        Ok(())
    }

    /// Runs streams through a sublayer of `layer`; `kept` are the inputs of its last linear layer, or empty.
    fn run_sublayer_batches(
        &mut self,
        sublayer: Sublayer,
        layer: &Layer,
        streams: &mut States,
        kept: &[Vec<f32>],
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        if let Some(accelerator) = self.accelerator {
            self.sublayer_on_device(accelerator, sublayer, layer, streams)?;
            self.stages.forward += started.elapsed().as_secs_f64();
            return Ok(());
        }
        for (batch, streams) in streams.chunks_mut(BATCH).enumerate() {
            check_interrupt()?;
            streams.par_iter_mut().enumerate().for_each(|(i, stream)| {
                match kept.get(batch * BATCH + i) {
                    Some(x) => self.engine.finish_sublayer(sublayer, layer, x, stream),
                    None => drop(self.engine.run_sublayer(sublayer, layer, stream, &mut ())),
                }
            });
        }
        self.stages.forward += started.elapsed().as_secs_f64();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// W* (H + Λ) = W (H + Λ + E) + D.
    #[test]
    fn target_weights_solve_the_normal_equations() {
        let (n, rows, tokens) = (21, 5, 60);
        let number = |k: usize| move |i: usize| ((i * i * k + 7 * i) % 101) as f32 / 50.0 - 1.0;
        let x: Vec<f32> = (0..tokens * n).map(number(31)).collect();
        let dense_x: Vec<f32> =
            x.iter().enumerate().map(|(i, x)| x + 0.3 * number(17)(i)).collect();
        let stream: Vec<f32> = (0..tokens * rows).map(number(13)).collect();
        let weights: Vec<f32> = (0..rows * n).map(number(11)).collect();
        let isa = Isa::detect().unwrap();
        let mut hessian = Hessian::new(n);
        hessian.add(isa, &x);
        hessian.count_sequence();
        hessian.finish();
        hessian.add_ridge(0.1);
        let cross = |a: &[f32], rows: usize| {
            let mut cross = CrossHessian::new(rows, n);
            cross.add(isa, a, &x, 1);
            cross.finish()
        };
        let difference: Vec<f32> = dense_x.iter().zip(&x).map(|(w, x)| w - x).collect();
        let (e, d) = (cross(&difference, n), cross(&stream, rows));
        let mut shifted = weights.clone();
        let factor = Factor::new(&hessian).unwrap();
        let target = DenseTarget { inputs: e.clone(), stream: Some(d.clone()), factor };
        target.apply(isa.into(), &mut shifted).unwrap();
        let h = hessian.matrix();
        for r in 0..rows {
            for j in 0..n {
                let row = |w: &[f32], m: &[f32]| -> f32 {
                    (0..n).map(|k| w[r * n + k] * m[k * n + j]).sum()
                };
                let left = row(&shifted, h);
                let right = row(&weights, h) + row(&weights, &e) + d[r * n + j];
                assert!(
                    (left - right).abs() < 1e-3 * (1.0 + right.abs()),
                    "{r} {j}: {left} {right}"
                );
            }
        }
        // The definition of E, once.
        let sum: f32 = (0..tokens).map(|t| difference[t * n + 3] * x[t * n + 8]).sum();
        assert!((e[3 * n + 8] - 2.0 * sum).abs() < 1e-3 * sum.abs().max(1.0));
    }
}
