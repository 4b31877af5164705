//! Layers that are fitted to the dense model: statistics of inputs as they really are, and targets
//! from the dense model.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;
use stb_kernels::Isa;
use stb_runtime::{Half, Layer, LinearInput, Observer, Result};

use super::limits::{BATCH, KEPT_BYTES};
use super::run::{Hidden, Run};
use crate::engine::{Engine, Right};
use crate::hessian::{CrossMoments, Factor, Hessian};
use crate::interrupt::check_interrupt;
use crate::resume::States;

/// The ridge that inputs of as many features as there are tokens add to the recipe's: a regression on
/// few tokens finds what is not there.
const FEW_TOKENS: f64 = 4.0;

/// How the inputs of a linear layer differ from those in the dense model.
pub(super) struct Shift {
    /// (2/n) Σ (X̃ − X)ᵀ X, [in, in]: X̃ as in the dense model, X as they are.
    inputs: Vec<f32>,
    /// (2/n) Σ (R̃ − R)ᵀ X, [hidden, in]: the residual stream that the output is added to, in the dense
    /// model and as it is. Of linear layers that write to it.
    stream: Option<Vec<f32>>,
    /// Of the second moments with a ridge of their own.
    factor: Factor,
}

impl Shift {
    /// The weights that, from the inputs as they are, come closest to what the dense model has
    /// there: the ridge regression W + (W E + D) (H + Λ)⁻¹ with E, D the fields above, which minimizes
    /// ‖W X̃ + R̃ − R − W* X‖² + ‖(W* − W) Λ^½‖². `weights` is [rows, in].
    pub(super) fn apply(&self, engine: Engine<'_>, weights: &mut [f32]) -> Result<()> {
        let n = self.factor.size;
        let mut change = engine.product(weights, n, Right::Plain(&self.inputs), n)?;
        if let Some(stream) = &self.stream {
            change.par_iter_mut().zip(stream).for_each(|(c, s)| *c += s);
        }
        let change = engine.times_inverse(&self.factor, &change)?;
        weights.par_iter_mut().zip(change).for_each(|(w, c)| *w += c);
        Ok(())
    }
}

/// Second moments of one input of a decoder layer, damped and factored.
pub(super) struct Moments {
    pub(super) hessian: Hessian,
    pub(super) factor: Factor,
    pub(super) norms: Vec<f32>,
    /// How far the input is from that of the dense model, if that is the target.
    pub(super) shift: Option<Shift>,
}

/// Keeps one input; ends the layer there or not.
struct Keep {
    input: LinearInput,
    goes_on: bool,
    x: Vec<f32>,
}

impl Observer for Keep {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        if input == self.input {
            self.x = x.to_vec();
            return if self.goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
        }
        ControlFlow::Continue(())
    }
}

/// What a linear layer meets in one sequence.
struct Seen {
    /// Its input, [tokens, in].
    x: Vec<f32>,
    /// That in the dense model minus this one, if somebody wants it.
    inputs: Vec<f32>,
    /// The residual stream, [tokens, hidden], in the dense model minus the one here; the same.
    stream: Vec<f32>,
}

/// `wanted` minus what is.
fn difference(mut wanted: Vec<f32>, x: &[f32]) -> Vec<f32> {
    wanted.iter_mut().zip(x).for_each(|(w, x)| *w -= x);
    wanted
}

/// One field of all sequences of a batch.
fn joined(seen: &[Seen], of: fn(&Seen) -> &[f32]) -> Vec<f32> {
    seen.iter().map(of).collect::<Vec<_>>().concat()
}

/// How far residual streams are in the layer at work: what nothing later can change is not computed
/// again. They advance in place, by halves of the layer: attention, then MLP.
#[derive(Default)]
pub(super) struct Place {
    /// Halves behind them.
    halves: usize,
    /// What the linear layer reads that ends the next half: [tokens, in] for each sequence; or none.
    kept: States,
}

/// The places of the streams in [`Hidden`] that refreshed statistics come from.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) quantized: Place,
    pub(super) dense: Place,
}

/// Sums over the calibration sequences for one input of a layer.
pub(super) struct Summed {
    /// Finished, without damping.
    pub(super) hessian: Hessian,
    /// The first two fields of [`Shift`].
    pub(super) shift: Option<(Vec<f32>, Option<Vec<f32>>)>,
}

/// Features of an input of `layer`, and whether the linear layer behind it writes to the residual stream.
pub(super) fn shape(layer: &Layer, input: LinearInput) -> (usize, bool) {
    match input {
        LinearInput::Attention => (layer.q.cols(), false),
        LinearInput::AttentionOutput => (layer.o.cols(), true),
        LinearInput::Mlp => (layer.gate.cols(), false),
        LinearInput::MlpDown => (layer.down.cols(), true),
    }
}

/// Second moments for [`Shift`], from those without damping.
fn with_ridge(hessian: &Hessian, ridge: f64, tokens: usize) -> Hessian {
    let few = FEW_TOKENS * hessian.size as f64 / tokens.max(1) as f64;
    let mut hessian = hessian.clone();
    hessian.add_ridge(ridge + few);
    hessian
}

/// Sums for [`Shift`].
struct ShiftSums {
    inputs: CrossMoments,
    stream: Option<CrossMoments>,
}

impl ShiftSums {
    /// `x` is all inputs of `seen`.
    fn add(&mut self, isa: Isa, seen: &[Seen], x: &[f32]) {
        self.inputs.add(isa, &joined(seen, |s| &s.inputs), x, seen.len());
        if let Some(stream) = &mut self.stream {
            stream.add(isa, &joined(seen, |s| &s.stream), x, seen.len());
        }
    }

    fn finish(self) -> (Vec<f32>, Option<Vec<f32>>) {
        (self.inputs.finish(), self.stream.map(CrossMoments::finish))
    }
}

impl Run<'_> {
    /// What linear layers that read `input` need: second moments with `layer` as it is so far, and,
    /// if the recipe wants targets from the dense model, how far its inputs are from that.
    pub(super) fn refreshed_moments(
        &mut self,
        input: LinearInput,
        layer: &Layer,
        dense: &Layer,
        hidden: &mut Hidden,
        walk: &mut Walk,
    ) -> anyhow::Result<Moments> {
        if matches!(input, LinearInput::Mlp | LinearInput::MlpDown) {
            self.advance(1, layer, &mut hidden.quantized, &mut walk.quantized)?;
        }
        let ridge = self.job.recipe.calibration.ridge;
        let (_, to_stream) = shape(layer, input);
        let summed = match self.accelerator {
            Some(accelerator) => {
                // None of the dense model, if nobody wants them.
                let wanted = if ridge.is_some() { &mut hidden.dense[..] } else { &mut [] };
                let (streams, dense) = ((layer, &hidden.quantized[..]), (dense, wanted));
                self.summed_on_device(accelerator, input, streams, dense)?
            }
            None => self.summed(input, layer, dense, hidden, walk, ridge.is_some())?,
        };
        if to_stream && ridge.is_some() {
            walk.dense.halves += 1;
        }
        let features = self.model.norm.len();
        let tokens = hidden.quantized.iter().map(Vec::len).sum::<usize>() / features;
        let started = Instant::now();
        let Summed { mut hessian, shift } = summed;
        let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        let shift = match shift.zip(ridge) {
            Some(((inputs, stream), ridge)) => {
                let factor = self.engine().factor(&with_ridge(&hessian, ridge, tokens))?;
                Some(Shift { inputs, stream, factor })
            }
            None => None,
        };
        hessian.damp(self.job.recipe.calibration.damping);
        let factor = self.engine().factor(&hessian)?;
        self.stages.factors += started.elapsed().as_secs_f64();
        Ok(Moments { hessian, factor, norms, shift })
    }

    /// Sums over all sequences; `targets` if those of the dense model are wanted.
    fn summed(
        &mut self,
        input: LinearInput,
        layer: &Layer,
        dense: &Layer,
        hidden: &mut Hidden,
        walk: &mut Walk,
        targets: bool,
    ) -> anyhow::Result<Summed> {
        let isa = self.model.isa;
        let (width, to_stream) = shape(layer, input);
        let features = self.model.norm.len();
        let mut hessian = Hessian::new(width);
        let mut sums = targets.then(|| ShiftSums {
            inputs: CrossMoments::new(width, width),
            stream: to_stream.then(|| CrossMoments::new(features, width)),
        });
        let tokens = hidden.quantized.iter().map(Vec::len).sum::<usize>() / features;
        let keep = to_stream && tokens * width * size_of::<f32>() <= KEPT_BYTES;
        let mut dense_streams = hidden.dense.iter_mut();
        for states in hidden.quantized.chunks_mut(BATCH) {
            check_interrupt()?;
            let started = Instant::now();
            let dense_states: Vec<&mut Vec<f32>> = match &sums {
                Some(_) => dense_streams.by_ref().take(states.len()).collect(),
                None => Vec::new(),
            };
            let seen = self.seen(input, (layer, states), (dense, dense_states));
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            let x = joined(&seen, |s| &s.x);
            hessian.add(isa, &x);
            seen.iter().for_each(|_| hessian.count_sequence());
            if let Some(sums) = &mut sums {
                sums.add(isa, &seen, &x);
            }
            if keep {
                walk.quantized.kept.extend(seen.into_iter().map(|s| s.x));
            }
            self.stages.moments += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        hessian.finish();
        let shift = sums.map(ShiftSums::finish);
        self.stages.moments += started.elapsed().as_secs_f64();
        Ok(Summed { hessian, shift })
    }

    /// Runs sequences up to `input`, from where their streams stand. Those of the dense model, if
    /// there are any, pass the linear layer behind `input` if it ends a half: it is theirs already.
    fn seen(
        &self,
        input: LinearInput,
        (layer, states): (&Layer, &mut [Vec<f32>]),
        (dense, dense_states): (&Layer, Vec<&mut Vec<f32>>),
    ) -> Vec<Seen> {
        let run = |layer: &Layer, stream: &mut [f32], goes_on: bool| {
            let mut observer = Keep { input, goes_on, x: Vec::new() };
            let _ = match input {
                LinearInput::Attention | LinearInput::AttentionOutput => {
                    self.model.run_attention(layer, stream, &mut observer)
                }
                LinearInput::Mlp | LinearInput::MlpDown => {
                    self.model.run_mlp(layer, stream, &mut observer)
                }
            };
            observer.x
        };
        let to_stream = matches!(input, LinearInput::AttentionOutput | LinearInput::MlpDown);
        let mut wanted: Vec<Option<&mut Vec<f32>>> = dense_states.into_iter().map(Some).collect();
        wanted.resize_with(states.len(), || None);
        let pairs = states.par_iter_mut().zip(wanted);
        pairs
            .map(|(stream, wanted)| {
                let x = run(layer, stream, false);
                let Some(wanted) = wanted else {
                    return Seen { x, inputs: Vec::new(), stream: Vec::new() };
                };
                let shift = if to_stream { difference(wanted.clone(), stream) } else { Vec::new() };
                let inputs = difference(run(dense, wanted, to_stream), &x);
                Seen { x, inputs, stream: shift }
            })
            .collect()
    }

    /// Brings streams to the end of `halves` halves of `layer`, which must be finished so far.
    pub(super) fn advance(
        &mut self,
        halves: usize,
        layer: &Layer,
        streams: &mut States,
        place: &mut Place,
    ) -> anyhow::Result<()> {
        while place.halves < halves {
            let kept = std::mem::take(&mut place.kept);
            self.half(place.halves, layer, streams, &kept)?;
            place.halves += 1;
        }
        Ok(())
    }

    /// Half `half` of `layer`, of which `kept` may have what the last linear layer reads.
    fn half(
        &mut self,
        half: usize,
        layer: &Layer,
        streams: &mut States,
        kept: &[Vec<f32>],
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        if let Some(accelerator) = self.accelerator {
            let half = if half == 0 { Half::Attention } else { Half::Mlp };
            self.half_on_device(accelerator, half, layer, streams)?;
            self.stages.forward += started.elapsed().as_secs_f64();
            return Ok(());
        }
        for (batch, streams) in streams.chunks_mut(BATCH).enumerate() {
            check_interrupt()?;
            streams.par_iter_mut().enumerate().for_each(|(i, stream)| {
                match (half, kept.get(batch * BATCH + i)) {
                    (0, Some(x)) => self.model.add_linear(&layer.o, x, stream),
                    (_, Some(x)) => self.model.add_linear(&layer.down, x, stream),
                    (0, None) => drop(self.model.run_attention(layer, stream, &mut ())),
                    (_, None) => drop(self.model.run_mlp(layer, stream, &mut ())),
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
    fn shifted_weights_solve_the_normal_equations() {
        let (n, rows, tokens) = (21, 5, 60);
        let number = |k: usize| move |i: usize| ((i * i * k + 7 * i) % 101) as f32 / 50.0 - 1.0;
        let x: Vec<f32> = (0..tokens * n).map(number(31)).collect();
        let wanted: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + 0.3 * number(17)(i)).collect();
        let stream: Vec<f32> = (0..tokens * rows).map(number(13)).collect();
        let weights: Vec<f32> = (0..rows * n).map(number(11)).collect();
        let isa = Isa::detect().unwrap();
        let mut hessian = Hessian::new(n);
        hessian.add(isa, &x);
        hessian.count_sequence();
        hessian.finish();
        hessian.add_ridge(0.1);
        let cross = |a: &[f32], rows: usize| {
            let mut moments = CrossMoments::new(rows, n);
            moments.add(isa, a, &x, 1);
            moments.finish()
        };
        let difference: Vec<f32> = wanted.iter().zip(&x).map(|(w, x)| w - x).collect();
        let (e, d) = (cross(&difference, n), cross(&stream, rows));
        let mut shifted = weights.clone();
        let factor = Factor::new(&hessian).unwrap();
        let shift = Shift { inputs: e.clone(), stream: Some(d.clone()), factor };
        shift.apply(isa.into(), &mut shifted).unwrap();
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
