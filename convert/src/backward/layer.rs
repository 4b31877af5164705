//! A decoder layer forward and backward.

use rayon::prelude::*;
use stb_format::arch::{InputMap, Linear, LinearInput, LinearMap, NormSite};
use stb_kernels::{Isa, ops};
use stb_runtime::Engine;
use stb_runtime::block::BlockScratch;

use super::attention::Attention;
use super::matrix::DenseLayer;
use super::record::{self, Recording, record, sigmoid};
use crate::products::add_cross_products;

/// The inputs of the linear layers of a decoder layer and the Fisher diagonal of their outputs.
pub(crate) struct LayerFisher {
    /// The inputs, [tokens, in].
    pub inputs: InputMap<Vec<f32>>,
    /// The mean square of the gradient of each output, `[out]`.
    pub outputs: LinearMap<Vec<f32>>,
}

/// Receives the gradients of a backward pass.
trait GradientSink {
    /// The gradient of the output of a linear layer, `d` [tokens, out], and its input `x` [tokens, in].
    fn linear(&mut self, linear: Linear, d: &[f32], x: &[f32]);

    /// The gradient of the weight of a norm, `[hidden]`.
    fn norm(&mut self, site: NormSite, d: &[f32]);
}

/// Sums the gradients of weights over all calls.
struct WeightGradients<'a> {
    isa: Isa,
    sums: &'a mut DenseLayer,
}

impl GradientSink for WeightGradients<'_> {
    fn linear(&mut self, linear: Linear, d: &[f32], x: &[f32]) {
        let sum = self.sums.linear_mut(linear);
        if !sum.values.is_empty() {
            add_cross_products(self.isa, d, sum.rows, x, sum.cols, &mut sum.values);
        }
    }

    fn norm(&mut self, site: NormSite, d: &[f32]) {
        accumulate(self.sums.norm_mut(site), d);
    }
}

/// The mean squares of the gradients of the outputs of linear layers.
struct OutputSquares<'a> {
    weights: &'a DenseLayer,
    squares: Vec<(Linear, Vec<f32>)>,
}

impl GradientSink for OutputSquares<'_> {
    fn linear(&mut self, linear: Linear, d: &[f32], _: &[f32]) {
        self.squares.push((linear, mean_squares(d, self.weights.linear(linear).rows)));
    }

    fn norm(&mut self, _: NormSite, _: &[f32]) {}
}

/// The forward and backward pass of a decoder layer for sequences of one length.
pub(crate) struct Pass<'a> {
    pub engine: &'a Engine,
    /// Tokens of each sequence.
    pub length: usize,
}

impl Pass<'_> {
    /// Σ (out − target)², for sequences `x`, [sequences · length, hidden].
    pub fn error(&self, weights: &DenseLayer, x: Vec<f32>, target: &[f32]) -> f64 {
        squared_distance(&self.forward(weights, x).out, target)
    }

    /// The layer's output for sequences `x`; both are [sequences · length, hidden].
    pub fn output(&self, weights: &DenseLayer, x: Vec<f32>) -> Vec<f32> {
        self.forward(weights, x).out
    }

    /// Adds the gradient of ½ Σ (out − target)² to `gradient`, for all norms and for the linear layers
    /// whose matrices in it are not empty. Returns Σ (out − target)².
    pub fn gradient(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        target: &[f32],
        gradient: &mut DenseLayer,
    ) -> f64 {
        let recording = self.forward(weights, x);
        let error = squared_distance(&recording.out, target);
        let d_out: Vec<f32> =
            recording.out.par_iter().zip(target).map(|(out, target)| out - target).collect();
        let mut sink = WeightGradients { isa: self.engine.isa, sums: gradient };
        self.backward(weights, &recording, d_out, &mut sink);
        error
    }

    /// The gradient of a loss with respect to the input `x`, given `d_out`, the gradient with respect to the
    /// output; all are [tokens, hidden]. Adds the gradient of the weights to `gradient`, as
    /// [`Pass::gradient`] does.
    pub fn input_gradient(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        d_out: Vec<f32>,
        gradient: &mut DenseLayer,
    ) -> Vec<f32> {
        let recording = self.forward(weights, x);
        let mut sink = WeightGradients { isa: self.engine.isa, sums: gradient };
        self.backward(weights, &recording, d_out, &mut sink)
    }

    /// The Fisher diagonal of the linear layers, and the gradient of the loss with respect to the input `x`,
    /// given `d_out`, the gradient with respect to the output; all are [tokens, hidden].
    pub fn fisher(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        d_out: Vec<f32>,
    ) -> (LayerFisher, Vec<f32>) {
        let recording = self.forward(weights, x);
        let mut sink = OutputSquares { weights, squares: Vec::new() };
        let d_in = self.backward(weights, &recording, d_out, &mut sink);
        let outputs = sink.squares.into_iter().collect();
        (LayerFisher { inputs: recording.inputs, outputs }, d_in)
    }

    fn forward(&self, weights: &DenseLayer, x: Vec<f32>) -> Recording {
        record(self.engine, self.length, weights, x)
    }

    /// Hands the gradients of norms and linear layers to `sink`, from the last to the first. Returns the
    /// gradient of the input, [tokens, hidden].
    fn backward(
        &self,
        weights: &DenseLayer,
        recording: &Recording,
        d_out: Vec<f32>,
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        let [before_attention, before_mlp] = &recording.residuals[..] else {
            unreachable!("a layer has two sublayers");
        };
        // A sublayer adds its output to its input: the gradient passes unchanged and through the sublayer.
        let mut d_residual = d_out;
        let d_normed = self.mlp_backward(weights, recording, &d_residual, sink);
        self.norm_site_backward(
            weights,
            NormSite::Mlp,
            before_mlp,
            &d_normed,
            &mut d_residual,
            sink,
        );
        let d_normed = self.attention_backward(weights, recording, &d_residual, sink);
        let site = NormSite::Attention;
        self.norm_site_backward(weights, site, before_attention, &d_normed, &mut d_residual, sink);
        d_residual
    }

    /// The gradient of the MLP's normalized input, given that of its output; both are [tokens, hidden].
    fn mlp_backward(
        &self,
        weights: &DenseLayer,
        recording: &Recording,
        d_out: &[f32],
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        let isa = self.engine.isa;
        sink.linear(Linear::Down, d_out, &recording.inputs[LinearInput::Down]);
        let d_product = weights.linear(Linear::Down).apply_transposed(isa, d_out);
        let (d_gate, d_up): (Vec<f32>, Vec<f32>) = d_product
            .par_iter()
            .zip(&recording.block.gate)
            .zip(&recording.block.up)
            .map(|((d, g), u)| {
                let s = sigmoid(*g);
                (d * u * s * (1.0 + g * (1.0 - s)), d * g * s)
            })
            .unzip();
        let normed = &recording.inputs[LinearInput::GateUp];
        sink.linear(Linear::Gate, &d_gate, normed);
        sink.linear(Linear::Up, &d_up, normed);
        let mut d_normed = weights.linear(Linear::Gate).apply_transposed(isa, &d_gate);
        accumulate(&mut d_normed, &weights.linear(Linear::Up).apply_transposed(isa, &d_up));
        d_normed
    }

    /// The gradient of the normalized input of attention, given that of `o`'s output; both are
    /// [tokens, hidden].
    fn attention_backward(
        &self,
        weights: &DenseLayer,
        recording: &Recording,
        d_out: &[f32],
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        let isa = self.engine.isa;
        let BlockScratch { q, k, v, .. } = &recording.block;
        sink.linear(Linear::O, d_out, &recording.inputs[LinearInput::AttentionOutput]);
        let d_attn_out = weights.linear(Linear::O).apply_transposed(isa, d_out);
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![0.0; x.len()]);
        let [q_width, kv_width] = [Linear::Q, Linear::K].map(|l| weights.linear(l).rows);
        let (q_size, kv_size) = (self.length * q_width, self.length * kv_width);
        let sequences = q
            .par_chunks_exact(q_size)
            .zip(k.par_chunks_exact(kv_size))
            .zip(v.par_chunks_exact(kv_size));
        dq.par_chunks_exact_mut(q_size)
            .zip(dk.par_chunks_exact_mut(kv_size))
            .zip(dv.par_chunks_exact_mut(kv_size))
            .zip(d_attn_out.par_chunks_exact(q_size))
            .zip(sequences)
            .for_each(|((((dq, dk), dv), d_attn_out), ((q, k), v))| {
                let sequence = Attention::new(self.engine, self.length, [q, k, v]);
                sequence.backward(d_attn_out, dq, dk, dv);
                self.engine.rotate(dq, q_width, true);
                self.engine.rotate(dk, kv_width, true);
            });
        let normed = &recording.inputs[LinearInput::Qkv];
        let mut d_normed = weights.linear(Linear::Q).apply_transposed(isa, &dq);
        for (linear, d) in [(Linear::Q, &dq), (Linear::K, &dk), (Linear::V, &dv)] {
            sink.linear(linear, d, normed);
            if linear != Linear::Q {
                accumulate(&mut d_normed, &weights.linear(linear).apply_transposed(isa, d));
            }
        }
        d_normed
    }

    /// [`Pass::norm_backward`] of a norm of the layer; hands the gradient of its weight to `sink`.
    fn norm_site_backward(
        &self,
        weights: &DenseLayer,
        site: NormSite,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        sink: &mut dyn GradientSink,
    ) {
        let weight = weights.norm(site);
        let mut d_weight = vec![0.0; weight.len()];
        self.norm_backward(x, weight, dy, dx, &mut d_weight);
        sink.norm(site, &d_weight);
    }

    /// RMSNorm of each row of `x`, [tokens, hidden].
    pub fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        record::norm(self.engine, x, weight)
    }

    /// The backward pass of RMSNorm, y = w ∘ x·r with r = (mean x² + ε)^−½: adds r·(w∘dy − x·r²·mean(w∘dy∘x)) to
    /// `dx` and Σ dy ∘ x·r to `dw`.
    pub fn norm_backward(
        &self,
        x: &[f32],
        weight: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        dw: &mut [f32],
    ) {
        let (isa, n) = (self.engine.isa, weight.len());
        let eps = self.engine.model.spec.norm_eps as f32;
        for ((x, dy), dx) in x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
            let r = 1.0 / (ops::dot(isa, x, x) / n as f32 + eps).sqrt();
            let terms = x.iter().zip(dy).zip(weight).map(|((x, dy), w)| x * dy * w);
            let along = terms.sum::<f32>() * r * r / n as f32;
            for (((dx, dw), (x, dy)), w) in
                dx.iter_mut().zip(&mut *dw).zip(x.iter().zip(dy)).zip(weight)
            {
                *dx += r * (w * dy - x * along);
                *dw += dy * x * r;
            }
        }
    }
}

fn accumulate(to: &mut [f32], from: &[f32]) {
    to.par_iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// Σ x² / tokens of each column of `x`, [tokens, width].
pub(crate) fn mean_squares(x: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for x in x.chunks_exact(width) {
        sums.iter_mut().zip(x).for_each(|(s, x)| *s += x * x);
    }
    let tokens = (x.len() / width).max(1) as f32;
    sums.iter_mut().for_each(|s| *s /= tokens);
    sums
}

/// Σ (a − b)² in f64, added in order so that threads do not change the result.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let part = |(a, b): (&[f32], &[f32])| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    a.par_chunks(4096).zip(b.par_chunks(4096)).map(part).collect::<Vec<f64>>().into_iter().sum()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use stb_runtime::Checkpoint;

    use super::super::matrix::{DenseMatrix, decode_layer};
    use super::*;

    /// Calls `f` with a layer of the bundled model, the inputs of two sequences and the runtime's outputs.
    fn with_example(f: impl FnOnce(&Pass<'_>, &DenseLayer, Vec<f32>, Vec<f32>)) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
        let engine = Engine::from_checkpoint(&Checkpoint::open(&folder, true).unwrap()).unwrap();
        let layer = &engine.model.layers[1];
        let (length, sequences) = (11, 2);
        let mut x = Vec::new();
        let tokens: Vec<u32> = (0..length * sequences).map(|i| (i * 37 % 400) as u32).collect();
        engine.embed(&tokens, &mut x).unwrap();
        let mut expected = x.clone();
        for sequence in expected.chunks_exact_mut(length * engine.model.hidden_size()) {
            engine.run_layer(layer, sequence, &mut ());
        }
        f(&Pass { engine: &engine, length }, &decode_layer(layer), x, expected);
    }

    #[test]
    fn forward_is_the_forward_pass_of_the_runtime() {
        with_example(|pass, weights, x, expected| {
            let energy: f64 = expected.iter().map(|v| f64::from(*v).powi(2)).sum();
            assert!(pass.error(weights, x, &expected) < 1e-9 * energy);
        });
    }

    #[test]
    fn gradients_match_finite_differences() {
        with_example(|pass, weights, x, expected| {
            let target: Vec<f32> =
                expected.iter().enumerate().map(|(i, v)| v + (i as f32).sin()).collect();
            let mut gradient =
                weights.map(|_, m| DenseMatrix::new(m.rows, m.cols), |_, n| vec![0.0; n.len()]);
            let error = pass.gradient(weights, x.clone(), &target, &mut gradient);
            assert!((error - pass.error(weights, x.clone(), &target)).abs() < 1e-6 * error);
            // The direction of the check: the gradient, with every third component reversed and halved.
            let check = |name: &str, of: &dyn Fn(&mut DenseLayer) -> &mut Vec<f32>| {
                let slope = of(&mut gradient.clone()).clone();
                let largest = slope.iter().fold(0f32, |m, g| m.max(g.abs()));
                let size = of(&mut weights.clone()).iter().fold(0f32, |m, w| m.max(w.abs()));
                let turned = |i: usize| if i.is_multiple_of(3) { -0.5 } else { 1.0 };
                let direction: Vec<f32> =
                    slope.iter().enumerate().map(|(i, g)| turned(i) * g / largest * size).collect();
                let at = |step: f32| {
                    let mut moved = weights.clone();
                    of(&mut moved).iter_mut().zip(&direction).for_each(|(w, d)| *w += step * d);
                    pass.error(&moved, x.clone(), &target)
                };
                let step = 2e-3;
                let found = (at(step) - at(-step)) / (4.0 * f64::from(step));
                let expected: f64 =
                    slope.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                assert!((found - expected).abs() < 0.02 * expected, "{name}: {found} {expected}");
            };
            for (linear, _) in weights.linears().iter() {
                check(linear.short_name(), &|w| &mut w.linear_mut(linear).values);
            }
            for (key, _) in weights.vectors() {
                check(&format!("{key:?}"), &|w| w.vector_mut(key).unwrap());
            }
        });
    }
}
