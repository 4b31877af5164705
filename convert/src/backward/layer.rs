//! A decoder layer forward and backward.

use rayon::prelude::*;
use stb_kernels::{Isa, Panels, ops};
use stb_runtime::{Layer, Model};

use super::attention::Attention;
use crate::products::{add_cross_products, product_of};

// Places in `Layer::PARTS`.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// A matrix, [rows, cols].
#[derive(Clone, Debug, Default)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f32>,
}

impl Matrix {
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, values: vec![0.0; rows * cols] }
    }

    /// x · Wᵀ: [tokens, rows].
    fn apply(&self, isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack(&self.values, self.cols);
        product_of(isa, x, self.cols, &panels, self.rows)
    }

    /// dy · W: [tokens, cols].
    fn apply_back(&self, isa: Isa, dy: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack_transposed(&self.values, self.cols, self.rows, self.cols);
        product_of(isa, dy, self.rows, &panels, self.cols)
    }
}

/// The weights of a decoder layer, or gradients with respect to them.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerWeights {
    /// In the order of `Layer::PARTS`.
    pub linear: [Matrix; 7],
    /// Before attention and before the feed-forward network, `[hidden]`.
    pub norms: [Vec<f32>; 2],
}

/// What the linear layers of a decoder layer meet.
pub(crate) struct LayerSlopes {
    /// Their inputs in the order of `LinearInput::ALL`, [tokens, in].
    pub inputs: [Vec<f32>; 4],
    /// The mean square of the gradient of each output, in the order of `Layer::PARTS`, `[out]`.
    pub slopes: [Vec<f32>; 7],
}

impl LayerWeights {
    /// Those of `layer`.
    pub fn new(layer: &Layer) -> Self {
        let mut weights = Self::default();
        for (matrix, weight) in weights.linear.iter_mut().zip(layer.matrices()) {
            let (rows, cols) = (weight.rows(), weight.cols());
            *matrix = Matrix { rows, cols, values: weight.decode() };
        }
        weights.norms = [layer.attention_norm.clone(), layer.mlp_norm.clone()];
        weights
    }
}

/// What backward needs of forward; all [tokens, width].
struct Memory {
    /// Input, and after attention.
    streams: [Vec<f32>; 2],
    normed: [Vec<f32>; 2],
    /// Rotated.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    product: Vec<f32>,
    out: Vec<f32>,
}

/// Sees a linear layer: its place in `Layer::PARTS`, the gradient of its output, [tokens, out], and its
/// input, [tokens, in].
type See<'a> = dyn FnMut(usize, &[f32], &[f32]) + 'a;

/// Sequences of one length through a decoder layer.
pub(crate) struct Pass<'a> {
    pub model: &'a Model,
    /// Tokens of each sequence.
    pub length: usize,
}

impl Pass<'_> {
    /// Σ (out − target)², for sequences `x`, [sequences · length, hidden].
    pub fn error(&self, weights: &LayerWeights, x: Vec<f32>, target: &[f32]) -> f64 {
        squared(&self.forward(weights, x).out, target)
    }

    /// The output for sequences `x`, [sequences · length, hidden].
    pub fn output(&self, weights: &LayerWeights, x: Vec<f32>) -> Vec<f32> {
        self.forward(weights, x).out
    }

    /// Adds the gradient of ½ Σ (out − target)² to `gradient`: of all norms, and of the linear layers
    /// whose matrices are not empty. Returns Σ (out − target)².
    pub fn gradient(
        &self,
        weights: &LayerWeights,
        x: Vec<f32>,
        target: &[f32],
        gradient: &mut LayerWeights,
    ) -> f64 {
        let memory = self.forward(weights, x);
        let error = squared(&memory.out, target);
        let d_out: Vec<f32> =
            memory.out.par_iter().zip(target).map(|(out, target)| out - target).collect();
        self.add_gradient(weights, &memory, d_out, gradient);
        error
    }

    /// From the gradient of a loss with respect to the output, [tokens, hidden], to that with respect to the
    /// input `x`; adds that of the weights to `gradient`, as [`Pass::gradient`] does.
    pub fn back(
        &self,
        weights: &LayerWeights,
        x: Vec<f32>,
        d_out: Vec<f32>,
        gradient: &mut LayerWeights,
    ) -> Vec<f32> {
        let memory = self.forward(weights, x);
        self.add_gradient(weights, &memory, d_out, gradient)
    }

    fn add_gradient(
        &self,
        weights: &LayerWeights,
        memory: &Memory,
        d_out: Vec<f32>,
        gradient: &mut LayerWeights,
    ) -> Vec<f32> {
        let LayerWeights { linear, norms } = gradient;
        self.backward(weights, memory, d_out, norms, &mut |part, d, x| {
            let to = &mut linear[part];
            if !to.values.is_empty() {
                add_cross_products(self.model.isa, d, to.rows, x, to.cols, &mut to.values);
            }
        })
    }

    /// From the gradient of a loss with respect to the output, [tokens, hidden], to that with respect to the
    /// input `x`, and what the linear layers between them meet.
    pub fn slopes(
        &self,
        weights: &LayerWeights,
        x: Vec<f32>,
        d_out: Vec<f32>,
    ) -> (LayerSlopes, Vec<f32>) {
        let memory = self.forward(weights, x);
        let mut slopes = [(); 7].map(|()| Vec::new());
        let mut norms = weights.norms.each_ref().map(|norm| vec![0.0; norm.len()]);
        let d_in = self.backward(weights, &memory, d_out, &mut norms, &mut |part, d, _| {
            slopes[part] = mean_squares(d, weights.linear[part].rows);
        });
        let Memory { normed: [attention, mlp], mixed, product, .. } = memory;
        (LayerSlopes { inputs: [attention, mixed, mlp, product], slopes }, d_in)
    }

    fn forward(&self, weights: &LayerWeights, x: Vec<f32>) -> Memory {
        let isa = self.model.isa;
        let linear = &weights.linear;
        let normed = self.norm(&x, &weights.norms[0]);
        let [mut q, mut k, v] = [Q, K, V].map(|i| linear[i].apply(isa, &normed));
        for (heads, rows) in [(&mut q, linear[Q].rows), (&mut k, linear[K].rows)] {
            heads
                .par_chunks_exact_mut(self.length * rows)
                .for_each(|sequence| self.model.rotate(sequence, rows, false));
        }
        let mut mixed = vec![0.0; q.len()];
        mixed
            .par_chunks_exact_mut(self.length * linear[Q].rows)
            .zip(self.sequences(linear, [&q, &k, &v]))
            .for_each(|(mixed, sequence)| sequence.forward(mixed));
        let mut stream = linear[O].apply(isa, &mixed);
        stream.par_iter_mut().zip(&x).for_each(|(o, x)| *o += x);
        let normed_mlp = self.norm(&stream, &weights.norms[1]);
        let [gate, up] = [GATE, UP].map(|i| linear[i].apply(isa, &normed_mlp));
        let product: Vec<f32> =
            gate.par_iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u).collect();
        let mut out = linear[DOWN].apply(isa, &product);
        out.par_iter_mut().zip(&stream).for_each(|(o, x)| *o += x);
        let (streams, normed) = ([x, stream], [normed, normed_mlp]);
        Memory { streams, normed, q, k, v, mixed, gate, up, product, out }
    }

    /// Adds the gradients of norms to `d_norms` and shows `see` each linear layer: which, the gradient of
    /// its output and its input. Returns the gradient of the input.
    fn backward(
        &self,
        weights: &LayerWeights,
        memory: &Memory,
        d_out: Vec<f32>,
        d_norms: &mut [Vec<f32>; 2],
        see: &mut See<'_>,
    ) -> Vec<f32> {
        let isa = self.model.isa;
        let linear = &weights.linear;
        let [d_norm, d_norm_mlp] = d_norms;
        see(DOWN, &d_out, &memory.product);
        let d_product = linear[DOWN].apply_back(isa, &d_out);
        let (d_gate, d_up): (Vec<f32>, Vec<f32>) = d_product
            .par_iter()
            .zip(&memory.gate)
            .zip(&memory.up)
            .map(|((d, g), u)| {
                let s = sigmoid(*g);
                (d * u * s * (1.0 + g * (1.0 - s)), d * g * s)
            })
            .unzip();
        see(GATE, &d_gate, &memory.normed[1]);
        see(UP, &d_up, &memory.normed[1]);
        let mut d_normed = linear[GATE].apply_back(isa, &d_gate);
        accumulate(&mut d_normed, &linear[UP].apply_back(isa, &d_up));
        // The residual stream after attention: straight on, and through the feed-forward network.
        let mut d_stream = d_out;
        let norm = &weights.norms[1];
        self.norm_back(&memory.streams[1], norm, &d_normed, &mut d_stream, d_norm_mlp);

        see(O, &d_stream, &memory.mixed);
        let d_mixed = linear[O].apply_back(isa, &d_stream);
        let [mut dq, mut dk, mut dv] =
            [Q, K, V].map(|i| vec![0.0; d_mixed.len() / linear[Q].rows * linear[i].rows]);
        let (q_size, kv_size) = (self.length * linear[Q].rows, self.length * linear[K].rows);
        dq.par_chunks_exact_mut(q_size)
            .zip(dk.par_chunks_exact_mut(kv_size))
            .zip(dv.par_chunks_exact_mut(kv_size))
            .zip(d_mixed.par_chunks_exact(q_size))
            .zip(self.sequences(linear, [&memory.q, &memory.k, &memory.v]))
            .for_each(|((((dq, dk), dv), d_mixed), sequence)| {
                sequence.backward(d_mixed, dq, dk, dv);
                self.model.rotate(dq, linear[Q].rows, true);
                self.model.rotate(dk, linear[K].rows, true);
            });
        let mut d_normed = linear[Q].apply_back(isa, &dq);
        for (part, d) in [(Q, &dq), (K, &dk), (V, &dv)] {
            see(part, d, &memory.normed[0]);
            if part != Q {
                accumulate(&mut d_normed, &linear[part].apply_back(isa, d));
            }
        }
        let norm = &weights.norms[0];
        self.norm_back(&memory.streams[0], norm, &d_normed, &mut d_stream, d_norm);
        d_stream
    }

    /// RMSNorm of each row of `x`.
    pub fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let (isa, eps) = (self.model.isa, self.model.spec.norm_eps as f32);
        let mut out = vec![0.0; x.len()];
        out.par_chunks_exact_mut(weight.len())
            .zip(x.par_chunks_exact(weight.len()))
            .for_each(|(out, x)| ops::rms_norm(isa, x, weight, eps, out));
        out
    }

    /// With y = w ∘ x·r, r = (mean x² + ε)^−½: adds to `dx` r·(w∘dy − x·r²·mean(w∘dy∘x)), and to `dw`
    /// Σ dy ∘ x·r.
    pub fn norm_back(&self, x: &[f32], weight: &[f32], dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        let (isa, n) = (self.model.isa, weight.len());
        let eps = self.model.spec.norm_eps as f32;
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

    /// Attention of each sequence; `heads` are q, k and v.
    fn sequences<'s>(
        &'s self,
        linear: &[Matrix; 7],
        heads: [&'s [f32]; 3],
    ) -> impl IndexedParallelIterator<Item = Attention<'s>> {
        let (q_width, kv_width) = (linear[Q].rows, linear[K].rows);
        let width = self.model.spec.head_dim as usize;
        let [q, k, v] = heads;
        q.par_chunks_exact(self.length * q_width)
            .zip(k.par_chunks_exact(self.length * kv_width))
            .zip(v.par_chunks_exact(self.length * kv_width))
            .map(move |((q, k), v)| Attention {
                isa: self.model.isa,
                q_width,
                kv_width,
                width,
                q,
                k,
                v,
            })
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

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Σ (a − b)², in f64 and in order.
fn squared(a: &[f32], b: &[f32]) -> f64 {
    let part = |(a, b): (&[f32], &[f32])| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    a.par_chunks(4096).zip(b.par_chunks(4096)).map(part).collect::<Vec<f64>>().into_iter().sum()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use stb_runtime::Checkpoint;

    use super::*;

    /// A layer of the bundled model, inputs of two sequences, and what they become.
    fn example(f: impl FnOnce(&Pass<'_>, &LayerWeights, Vec<f32>, Vec<f32>)) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
        let model = Model::from_checkpoint(&Checkpoint::open(&folder, true).unwrap()).unwrap();
        let layer = &model.layers[1];
        let (length, sequences) = (11, 2);
        let mut x = Vec::new();
        let tokens: Vec<u32> = (0..length * sequences).map(|i| (i * 37 % 400) as u32).collect();
        model.embed(&tokens, &mut x).unwrap();
        let mut expected = x.clone();
        for sequence in expected.chunks_exact_mut(length * model.norm.len()) {
            model.run_layer(layer, sequence, &mut ());
        }
        f(&Pass { model: &model, length }, &LayerWeights::new(layer), x, expected);
    }

    #[test]
    fn forward_is_the_forward_pass_of_the_runtime() {
        example(|pass, weights, x, expected| {
            let energy: f64 = expected.iter().map(|v| f64::from(*v).powi(2)).sum();
            assert!(pass.error(weights, x, &expected) < 1e-9 * energy);
        });
    }

    #[test]
    fn gradients_are_slopes() {
        example(|pass, weights, x, expected| {
            let target: Vec<f32> =
                expected.iter().enumerate().map(|(i, v)| v + (i as f32).sin()).collect();
            let empty = |m: &Matrix| Matrix::new(m.rows, m.cols);
            let mut gradient = LayerWeights {
                linear: weights.linear.each_ref().map(empty),
                norms: weights.norms.each_ref().map(|n| vec![0.0; n.len()]),
            };
            let error = pass.gradient(weights, x.clone(), &target, &mut gradient);
            assert!((error - pass.error(weights, x.clone(), &target)).abs() < 1e-6 * error);
            // Along a direction that mixes signs: the gradient's own, with a part turned round.
            let check = |name: &str, of: &dyn Fn(&mut LayerWeights) -> &mut Vec<f32>| {
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
            for (i, name) in Layer::PARTS.iter().enumerate() {
                check(name, &|w| &mut w.linear[i].values);
            }
            check("norm before attention", &|w| &mut w.norms[0]);
            check("norm before the feed-forward network", &|w| &mut w.norms[1]);
        });
    }
}
