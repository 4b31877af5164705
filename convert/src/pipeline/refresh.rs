//! Layers that are fitted to the dense model: statistics of inputs as they really are, and targets
//! from the dense model.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;
use stb_kernels::{Isa, Panels};
use stb_runtime::{Layer, LinearInput, Observer, Result};

use super::{BATCH, Hidden, Moments, Run, check_interrupt};
use crate::hessian::{CrossMoments, Factor, Hessian, product_of};

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
    /// there: the ridge regression W + (W E + D) (H + Λ)⁻¹ with E, D the fields above, which minimises
    /// ‖W X̃ + R̃ − R − W* X‖² + ‖(W* − W) Λ^½‖². `weights` is [rows, in].
    pub(super) fn apply(&self, isa: Isa, weights: &mut [f32]) {
        let n = self.factor.size;
        let mut panels = Panels::default();
        panels.pack_transposed(&self.inputs, n, n, n);
        let mut change = product_of(isa, weights, n, &panels, n);
        if let Some(stream) = &self.stream {
            change.par_iter_mut().zip(stream).for_each(|(c, s)| *c += s);
        }
        let change = self.factor.times_inverse(isa, &change);
        weights.par_iter_mut().zip(change).for_each(|(w, c)| *w += c);
    }
}

/// Keeps one input and ends the layer there.
struct Until {
    input: LinearInput,
    x: Vec<f32>,
}

impl Observer for Until {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        if input == self.input {
            self.x = x.to_vec();
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

/// What a linear layer meets in one sequence.
struct Seen {
    /// Its input, [tokens, in].
    x: Vec<f32>,
    /// The residual stream there, [tokens, hidden].
    stream: Vec<f32>,
}

/// Of all tokens of a batch, the first minus the second.
fn difference(wanted: &[Seen], seen: &[Seen], of: fn(&Seen) -> &[f32]) -> Vec<f32> {
    let pairs = wanted.iter().zip(seen);
    pairs.flat_map(|(w, s)| of(w).iter().zip(of(s)).map(|(w, s)| w - s)).collect()
}

/// Sums over the calibration sequences for [`Shift`].
struct ShiftSums {
    inputs: CrossMoments,
    stream: Option<CrossMoments>,
    ridge: f64,
}

impl ShiftSums {
    /// `seen` is what is, `wanted` what is in the dense model, `x` all inputs of `seen`.
    fn add(&mut self, isa: Isa, wanted: &[Seen], seen: &[Seen], x: &[f32]) {
        let inputs = difference(wanted, seen, |s| &s.x);
        self.inputs.add(isa, &inputs, x, seen.len());
        if let Some(stream) = &mut self.stream {
            stream.add(isa, &difference(wanted, seen, |s| &s.stream), x, seen.len());
        }
    }

    /// `hessian` has no damping yet.
    fn finish(self, hessian: &Hessian, tokens: usize) -> Result<Shift> {
        let few = FEW_TOKENS * hessian.size as f64 / tokens.max(1) as f64;
        let mut hessian = hessian.clone();
        hessian.add_ridge(self.ridge + few);
        Ok(Shift {
            inputs: self.inputs.finish(),
            stream: self.stream.map(CrossMoments::finish),
            factor: Factor::new(&hessian)?,
        })
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
        hidden: &Hidden,
    ) -> anyhow::Result<Moments> {
        let isa = self.model.isa;
        let (width, to_stream) = match input {
            LinearInput::Attention => (layer.q.cols(), false),
            LinearInput::AttentionOutput => (layer.o.cols(), true),
            LinearInput::Mlp => (layer.gate.cols(), false),
            LinearInput::MlpDown => (layer.down.cols(), true),
        };
        let features = self.model.norm.len();
        let mut hessian = Hessian::new(width);
        let mut sums = self.job.recipe.calibration.ridge()?.map(|ridge| ShiftSums {
            inputs: CrossMoments::new(width, width),
            stream: to_stream.then(|| CrossMoments::new(features, width)),
            ridge,
        });
        for (batch, states) in hidden.quantised.chunks(BATCH).enumerate() {
            check_interrupt()?;
            let started = Instant::now();
            let seen = self.seen(input, layer, states);
            let wanted = match &sums {
                Some(_) => self.seen(input, dense, &hidden.dense[batch * BATCH..][..seen.len()]),
                None => Vec::new(),
            };
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            let x: Vec<f32> = seen.iter().flat_map(|s| s.x.iter().copied()).collect();
            hessian.add(isa, &x);
            seen.iter().for_each(|_| hessian.count_sequence());
            if let Some(sums) = &mut sums {
                sums.add(isa, &wanted, &seen, &x);
            }
            self.stages.moments += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        hessian.finish();
        let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        let tokens = hidden.quantised.iter().map(Vec::len).sum::<usize>() / features;
        let shift = sums.map(|sums| sums.finish(&hessian, tokens)).transpose()?;
        hessian.damp(self.job.recipe.calibration.damping);
        let factor = Factor::new(&hessian)?;
        self.stages.factors += started.elapsed().as_secs_f64();
        Ok(Moments { hessian, factor, norms, shift })
    }

    /// Runs sequences through `layer` up to `input`.
    fn seen(&self, input: LinearInput, layer: &Layer, states: &[Vec<f32>]) -> Vec<Seen> {
        let run = |states: &Vec<f32>| {
            let mut observer = Until { input, x: Vec::new() };
            let mut stream = states.clone();
            self.model.run_layer(layer, &mut stream, &mut observer);
            Seen { x: observer.x, stream }
        };
        states.par_iter().map(run).collect()
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
        Shift { inputs: e.clone(), stream: Some(d.clone()), factor }.apply(isa, &mut shifted);
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
