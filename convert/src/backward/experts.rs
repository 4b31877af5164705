//! A mixture of experts forward and backward.

use rayon::prelude::*;
use stb_format::arch::{Experts, Linear};
use stb_runtime::block::ExpertsLayer;
use stb_runtime::{Assignment, Engine, LayerMatrix, route_experts};

use super::activation::{activate, gated_gradients};
use super::matrix::DenseMatrix;
use super::sink::{GradientSink, accumulate};

/// What the backward pass needs of the experts of a layer.
pub(crate) struct ExpertRecording {
    /// The probabilities of all experts, [tokens, experts].
    probabilities: Vec<f32>,
    /// The experts that have tokens, ascending.
    pub(crate) parts: Vec<ExpertPart>,
}

/// The tokens of one expert.
pub(crate) struct ExpertPart {
    pub(crate) expert: usize,
    tokens: Vec<Assignment>,
    /// The inputs, [its tokens, hidden].
    pub(crate) x: Vec<f32>,
    /// [its tokens, intermediate].
    gate: Vec<f32>,
    /// [its tokens, intermediate].
    up: Vec<f32>,
    /// act(gate) ∘ up, [its tokens, intermediate].
    pub(crate) product: Vec<f32>,
    /// The output before it is weighed, [its tokens, hidden].
    out: Vec<f32>,
}

/// Runs the experts for `x`, [tokens, hidden], and adds their output to `residual`, [tokens, hidden].
pub(super) fn record_experts(
    engine: &Engine,
    layer: &ExpertsLayer<'_, DenseMatrix>,
    x: &[f32],
    residual: &mut [f32],
) -> ExpertRecording {
    let (isa, hidden) = (engine.isa, layer.router.cols);
    let activation = engine.model.spec.activation;
    let mut probabilities = layer.router.apply(isa, x);
    let mut assignments = Vec::new();
    route_experts(isa, layer.spec, &mut probabilities, &mut assignments);
    let groups: Vec<&[Assignment]> = assignments.chunk_by(|a, b| a.expert == b.expert).collect();
    let parts: Vec<ExpertPart> = groups
        .into_iter()
        .map(|tokens| {
            let expert = tokens[0].expert;
            let matrix = |linear| expert_matrix(layer.experts, expert, linear);
            let rows = tokens.iter().flat_map(|t| &x[t.token * hidden..][..hidden]);
            let x: Vec<f32> = rows.copied().collect();
            let gate = matrix(Linear::Gate).apply(isa, &x);
            let up = matrix(Linear::Up).apply(isa, &x);
            let product: Vec<f32> =
                gate.par_iter().zip(&up).map(|(g, u)| activate(activation, *g) * u).collect();
            let out = matrix(Linear::Down).apply(isa, &product);
            ExpertPart { expert, tokens: tokens.to_vec(), x, gate, up, product, out }
        })
        .collect();
    let mut sum = vec![0.0; residual.len()];
    for part in &parts {
        for (token, out) in part.tokens.iter().zip(part.out.chunks_exact(hidden)) {
            let sum = &mut sum[token.token * hidden..][..hidden];
            sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += token.weight * out);
        }
    }
    accumulate(residual, &sum);
    ExpertRecording { probabilities, parts }
}

fn expert_matrix(
    experts: &[stb_format::arch::LinearMap<DenseMatrix>],
    expert: usize,
    linear: Linear,
) -> &DenseMatrix {
    experts[expert].get(linear).expect("a matrix of an expert")
}

impl ExpertRecording {
    /// The gradient of the input of the experts, given that of their output; both are [tokens, hidden].
    pub(super) fn backward(
        &self,
        engine: &Engine,
        layer: &ExpertsLayer<'_, DenseMatrix>,
        d_out: &[f32],
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        let (isa, hidden) = (engine.isa, layer.router.cols);
        let activation = engine.model.spec.activation;
        let mut d_input = vec![0.0; d_out.len()];
        // The gradients of the factors of the active experts, [tokens, experts].
        let mut d_weights = vec![0.0; self.probabilities.len()];
        let count = layer.spec.count as usize;
        for part in &self.parts {
            let matrix = |linear| expert_matrix(layer.experts, part.expert, linear);
            let mut d_part = Vec::with_capacity(part.out.len());
            for (token, out) in part.tokens.iter().zip(part.out.chunks_exact(hidden)) {
                let d_out = &d_out[token.token * hidden..][..hidden];
                d_weights[token.token * count + part.expert] =
                    d_out.iter().zip(out).map(|(d, o)| d * o).sum();
                d_part.extend(d_out.iter().map(|d| d * token.weight));
            }
            let key = |linear| LayerMatrix::Expert(part.expert, linear);
            sink.matrix(key(Linear::Down), &d_part, &part.product);
            let d_product = matrix(Linear::Down).apply_transposed(isa, &d_part);
            let (d_gate, d_up): (Vec<f32>, Vec<f32>) = d_product
                .par_iter()
                .zip(&part.gate)
                .zip(&part.up)
                .map(|((d, g), u)| gated_gradients(activation, *d, *g, *u))
                .unzip();
            sink.matrix(key(Linear::Gate), &d_gate, &part.x);
            sink.matrix(key(Linear::Up), &d_up, &part.x);
            let mut d_x = matrix(Linear::Gate).apply_transposed(isa, &d_gate);
            accumulate(&mut d_x, &matrix(Linear::Up).apply_transposed(isa, &d_up));
            for (token, d) in part.tokens.iter().zip(d_x.chunks_exact(hidden)) {
                let to = &mut d_input[token.token * hidden..][..hidden];
                to.iter_mut().zip(d).for_each(|(to, d)| *to += d);
            }
        }
        let d_logits = self.logit_gradients(layer.spec, &d_weights);
        accumulate(&mut d_input, &layer.router.apply_transposed(isa, &d_logits));
        d_input
    }

    /// The gradients of the router's logits, given those of the factors of the active experts; both are [tokens,
    /// experts].
    fn logit_gradients(&self, spec: Experts, d_weights: &[f32]) -> Vec<f32> {
        let count = spec.count as usize;
        let mut active = vec![false; self.probabilities.len()];
        for part in &self.parts {
            part.tokens.iter().for_each(|t| active[t.token * count + part.expert] = true);
        }
        let rows = self.probabilities.chunks_exact(count).zip(active.chunks_exact(count));
        let mut d_logits = Vec::with_capacity(d_weights.len());
        for ((p, active), d) in rows.zip(d_weights.chunks_exact(count)) {
            let chosen = || (0..count).filter(|e| active[*e]);
            // The factors are w = p / s, with s the sum of the active probabilities, or w = p.
            let total: f32 = if spec.normalize { chosen().map(|e| p[e]).sum() } else { 1.0 };
            let mean: f32 = chosen().map(|e| d[e] * p[e] / total).sum();
            let offset = if spec.normalize { mean } else { 0.0 };
            let d_p = |e: usize| if active[e] { (d[e] - offset) / total } else { 0.0 };
            let along: f32 = chosen().map(|e| d_p(e) * p[e]).sum();
            d_logits.extend((0..count).map(|e| p[e] * (d_p(e) - along)));
        }
        d_logits
    }
}
