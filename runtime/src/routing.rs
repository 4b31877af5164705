//! Mixtures of experts for calibration: the experts of tokens, and the products of one expert.

use stb_kernels::ops;

use crate::engine::Engine;
use crate::experts::{Assignment, expert_matrices, route_experts};
use crate::layer::Layer;
use crate::linear::{LinearScratch, Rows, apply};

impl Engine {
    /// The experts of the tokens of `x`, the normalized input of the mixture of experts of `layer`, [tokens,
    /// hidden]; none if the layer has no experts. Runs on the calling thread.
    #[must_use]
    pub fn route(&self, layer: &Layer, x: &[f32]) -> Vec<Assignment> {
        let (Some(spec), Some(router)) = (layer.block.mlp.experts, layer.router()) else {
            return Vec::new();
        };
        let (pool, mut logits) = (self.pool.or_serial(false), Vec::new());
        let rows = Rows::alone(x, router.cols());
        apply(self.isa, pool, &mut LinearScratch::default(), [router], rows, [&mut logits]);
        let mut assignments = Vec::new();
        route_experts(self.isa, spec, &mut logits, &mut assignments);
        assignments
    }

    /// act(gate(x)) ∘ up(x) of an expert of `layer`, [tokens, intermediate]: the input of its last linear layer.
    ///
    /// # Panics
    /// If the layer has no such expert.
    #[must_use]
    pub fn expert_product(&self, layer: &Layer, expert: usize, x: &[f32]) -> Vec<f32> {
        let [gate_weight, up_weight, _] = expert_matrices(&layer.experts()[expert]);
        let (mut gate, mut up) = (Vec::new(), Vec::new());
        if x.is_empty() {
            return gate;
        }
        let scratch = &mut LinearScratch::default();
        let rows = Rows::alone(x, gate_weight.cols());
        apply(self.isa, &self.pool, scratch, [gate_weight, up_weight], rows, [&mut gate, &mut up]);
        ops::activate_mul(self.isa, self.model.spec.activation, &mut gate, &up);
        gate
    }
}
