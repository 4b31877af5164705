//! The costs of experts.

use stb_format::arch::LinearInput;
use stb_runtime::{Checkpoint, Engine, LayerMatrix};

use super::{HessianChunk, TokenShare, linear_candidates};
use crate::backward::LayerFisher;
use crate::budget::candidate::Candidate;
use crate::interrupt::check_interrupt;
use crate::plan::Plan;

/// What the costs of the experts of a layer follow from.
pub(super) struct LayerCosts<'a> {
    pub plan: &'a Plan,
    pub checkpoint: &'a Checkpoint,
    /// The index of the layer.
    pub index: usize,
    pub fisher: &'a LayerFisher,
    pub damping: f64,
}

impl LayerCosts<'_> {
    /// Stores the candidates of all experts in `found`, by tensor of the plan. An expert counts by the share of
    /// the tokens that it computes with; one without tokens as the mean of the others does, so that it does not
    /// look free.
    pub(super) fn add(&self, engine: &Engine, found: &mut [Vec<Candidate>]) -> anyhow::Result<()> {
        let inputs = &self.fisher.inputs[LinearInput::GateUp];
        let all_tokens = inputs.len() / engine.model.hidden_size();
        for part in &self.fisher.experts {
            let tokens = part.x.len() / engine.model.hidden_size();
            let share = TokenShare(tokens as f64 / all_tokens.max(1) as f64);
            for (input, x) in [(LinearInput::GateUp, &part.x), (LinearInput::Down, &part.product)] {
                let cols = x.len() / tokens.max(1);
                let hessians = HessianChunk::all(engine.isa, x, cols, self.damping)?;
                for (tensor, key, found) in self.experts(found) {
                    let LayerMatrix::Expert(expert, linear) = key else { continue };
                    if expert != part.expert || linear.input() != input {
                        continue;
                    }
                    let Some(outputs) = self.fisher.outputs_of(key) else { continue };
                    let weight = self.checkpoint.weight(&self.plan.tensors[tensor].tensor.name)?;
                    let plan = &self.plan.tensors[tensor];
                    *found = linear_candidates(plan, &weight, outputs, &hessians, share)?;
                }
            }
            check_interrupt()?;
        }
        self.fill_experts_without_tokens(found);
        Ok(())
    }

    /// The tensors of experts of this layer: index in the plan, matrix, candidates.
    fn experts<'f>(
        &self,
        found: &'f mut [Vec<Candidate>],
    ) -> impl Iterator<Item = (usize, LayerMatrix, &'f mut Vec<Candidate>)> {
        let tensors = self.plan.tensors.iter().zip(found).enumerate();
        tensors.filter_map(|(i, (tensor, found))| match tensor.matrix() {
            Some((layer, key @ LayerMatrix::Expert(..))) if layer == self.index => {
                Some((i, key, found))
            }
            _ => None,
        })
    }

    /// Gives experts without tokens the mean errors of the others with the same linear layer.
    fn fill_experts_without_tokens(&self, found: &mut [Vec<Candidate>]) {
        let measured: Vec<(LayerMatrix, Vec<Candidate>)> = self
            .experts(found)
            .filter(|(_, _, candidates)| !candidates.is_empty())
            .map(|(_, key, candidates)| (key, candidates.clone()))
            .collect();
        let is_alike = |a: LayerMatrix, b: LayerMatrix| match (a, b) {
            (LayerMatrix::Expert(_, a), LayerMatrix::Expert(_, b)) => a == b,
            _ => false,
        };
        for (_, key, candidates) in self.experts(found).filter(|(_, _, c)| c.is_empty()) {
            let others: Vec<_> = measured.iter().filter(|(k, _)| is_alike(*k, key)).collect();
            let Some((_, first)) = others.first() else { continue };
            *candidates = first.clone();
            for (i, candidate) in candidates.iter_mut().enumerate() {
                let errors = others.iter().filter_map(|(_, c)| Some(c.get(i)?.error));
                candidate.error = errors.sum::<f64>() / others.len() as f64;
            }
        }
    }
}
