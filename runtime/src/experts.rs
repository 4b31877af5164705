//! Mixtures of experts: which experts a token uses, and the MLP of each expert for its tokens.

use stb_format::Activation;
use stb_format::arch::{Experts, Linear, LinearInput, LinearMap};
use stb_kernels::{Isa, Pool, ops};

use crate::elementwise::add;
use crate::linear::{LinearScratch, Rows, apply};
use crate::observer::Observer;
use crate::weights::Weight;

/// A token of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assignment {
    /// The index of the expert.
    pub expert: usize,
    /// The index of the token.
    pub token: usize,
    /// The factor of the expert's output.
    pub weight: f32,
}

/// Reusable buffers for the tokens of one expert at a time.
#[derive(Debug, Default)]
pub(crate) struct ExpertScratch {
    /// The logits of the router, [tokens, experts].
    logits: Vec<f32>,
    assignments: Vec<Assignment>,
    /// The inputs of an expert, [its tokens, hidden].
    x: Vec<f32>,
    /// [its tokens, intermediate].
    gate: Vec<f32>,
    /// [its tokens, intermediate].
    up: Vec<f32>,
    /// The outputs of an expert, [its tokens, hidden].
    out: Vec<f32>,
    /// The sum over experts, [tokens, hidden].
    sum: Vec<f32>,
}

/// The weights of a mixture of experts.
#[derive(Debug)]
pub struct ExpertsLayer<'a, M> {
    /// Numbers of experts, and how outputs are weighed.
    pub spec: Experts,
    /// The router, [experts, hidden].
    pub router: &'a M,
    /// The matrices of each expert.
    pub experts: &'a [LinearMap<M>],
}

/// Experts on the CPU.
pub(crate) struct ExpertOps<'a> {
    pub isa: Isa,
    pub pool: &'a Pool,
    pub activation: Activation,
    pub linear: &'a mut LinearScratch,
    pub scratch: &'a mut ExpertScratch,
    pub observer: &'a mut dyn Observer,
    /// The number of prefill rows; decode rows follow.
    pub prefill: usize,
}

impl ExpertOps<'_> {
    /// Adds the weighed outputs of the active experts of each token to `residual`, [tokens, hidden]. `x` is the
    /// normalized input, [tokens, hidden]. Outputs are added in the order of the experts, so that a token gets
    /// the same sum in any batch.
    pub(crate) fn run(
        &mut self,
        layer: &ExpertsLayer<'_, Weight>,
        x: &[f32],
        residual: &mut [f32],
    ) {
        let Self { isa, pool, linear, scratch, prefill, .. } = self;
        let hidden = layer.router.cols();
        let ExpertScratch { logits, assignments, sum, .. } = &mut **scratch;
        let rows = Rows { x, prefill: *prefill };
        apply(*isa, pool, linear, [layer.router], rows, [&mut *logits]);
        route_experts(*isa, layer.spec, logits, assignments);
        sum.clear();
        sum.resize(x.len(), 0.0);
        let assignments = std::mem::take(&mut scratch.assignments);
        for tokens in assignments.chunk_by(|a, b| a.expert == b.expert) {
            let expert = tokens[0].expert;
            self.run_expert(expert, &layer.experts[expert], tokens, x);
            let ExpertScratch { out, sum, .. } = &mut *self.scratch;
            for (token, out) in tokens.iter().zip(out.chunks_exact(hidden)) {
                let sum = &mut sum[token.token * hidden..][..hidden];
                sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += token.weight * out);
            }
        }
        self.scratch.assignments = assignments;
        add(self.pool, residual, &self.scratch.sum);
    }

    /// The MLP of one expert for its tokens, into `scratch.out`.
    fn run_expert(
        &mut self,
        expert: usize,
        matrices: &LinearMap<Weight>,
        tokens: &[Assignment],
        all: &[f32],
    ) {
        let (isa, pool, activation) = (self.isa, self.pool, self.activation);
        let ExpertScratch { x, gate, up, out, .. } = &mut *self.scratch;
        let [gate_weight, up_weight, down] = expert_matrices(matrices);
        let hidden = gate_weight.cols();
        x.clear();
        for token in tokens {
            x.extend_from_slice(&all[token.token * hidden..][..hidden]);
        }
        self.observer.observe_expert(expert, LinearInput::GateUp, x);
        let weights = [gate_weight, up_weight];
        let prefill = tokens.iter().filter(|token| token.token < self.prefill).count();
        let rows = Rows { x, prefill };
        apply(isa, pool, self.linear, weights, rows, [&mut *gate, &mut *up]);
        ops::activate_mul(isa, activation, gate, up);
        self.observer.observe_expert(expert, LinearInput::Down, gate);
        apply(isa, pool, self.linear, [down], Rows { x: gate, prefill }, [out]);
    }
}

/// The matrices of an expert.
pub(crate) fn expert_matrices(matrices: &LinearMap<Weight>) -> [&Weight; 3] {
    let matrix = |linear| matrices.get(linear).expect("a matrix of an expert");
    [Linear::Gate, Linear::Up, Linear::Down].map(matrix)
}

/// Chooses the experts of each token from the `logits` of the router, [tokens, experts], which become
/// probabilities. The assignments are in the order of the experts, and of the tokens for each expert. Of equal
/// probabilities the lower expert counts as larger.
pub fn route_experts(
    isa: Isa,
    spec: Experts,
    logits: &mut [f32],
    assignments: &mut Vec<Assignment>,
) {
    let (count, active) = (spec.count as usize, spec.active as usize);
    assignments.clear();
    let mut order: Vec<usize> = Vec::with_capacity(count);
    for (token, probabilities) in logits.chunks_exact_mut(count).enumerate() {
        ops::softmax(isa, probabilities);
        order.clear();
        order.extend(0..count);
        order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
        order.truncate(active);
        order.sort_unstable();
        let total: f32 = match spec.normalize {
            true => order.iter().map(|expert| probabilities[*expert]).sum(),
            false => 1.0,
        };
        assignments.extend(order.iter().map(|expert| Assignment {
            expert: *expert,
            token,
            weight: probabilities[*expert] / total,
        }));
    }
    assignments.sort_by_key(|assignment| assignment.expert);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_with_the_largest_logits_are_weighed_by_their_share() {
        let isa = Isa::detect().unwrap();
        let spec = Experts { count: 4, active: 2, normalize: true };
        let mut logits = [1.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 9.0];
        let mut found = Vec::new();
        route_experts(isa, spec, &mut logits, &mut found);
        let places: Vec<(usize, usize)> = found.iter().map(|a| (a.expert, a.token)).collect();
        assert_eq!(places, [(0, 1), (1, 0), (2, 0), (3, 1)]);
        assert!((found[1].weight - 0.5).abs() < 1e-6 && (found[2].weight - 0.5).abs() < 1e-6);
        assert!((found[3].weight - 1.0 / (1.0 + (-9f32).exp())).abs() < 1e-6);
        let mut logits = [0.0; 4];
        route_experts(isa, Experts { normalize: false, ..spec }, &mut logits, &mut found);
        assert_eq!(
            found.iter().map(|a| (a.expert, a.weight)).collect::<Vec<_>>(),
            [(0, 0.25), (1, 0.25)]
        );
    }
}
