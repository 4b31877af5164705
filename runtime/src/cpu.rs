//! [`BlockOps`] on the CPU.

use std::convert::Infallible;
use std::ops::ControlFlow;

use stb_format::Activation;
use stb_format::arch::{LinearInput, Norm};
use stb_kernels::{Isa, Pool};

use crate::attention::{AttentionSettings, QkvRows};
use crate::block::{
    AttentionBuffers, AttentionLayer, BlockInput, BlockOps, Flow, LinearWeights, NormWeights,
    ResidualLinear,
};
use crate::elementwise::{Elementwise, add};
use crate::experts::{ExpertOps, ExpertScratch, ExpertsLayer};
use crate::linear::{LinearScratch, Rows, apply};
use crate::observer::Observer;
use crate::rope::RopeAngles;
use crate::weights::Weight;

/// The operations of a decoder layer on the CPU. `attend` appends keys and values to the KV cache and
/// computes attention.
pub(crate) struct CpuOps<'a, A> {
    pub isa: Isa,
    pub pool: &'a Pool,
    /// The formula and ε of the norms.
    pub norm: Norm,
    pub activation: Activation,
    /// The width of a head.
    pub head_dim: usize,
    pub angles: &'a RopeAngles,
    pub attend: A,
    pub scratch: &'a mut CpuScratch,
    pub observer: &'a mut dyn Observer,
    /// The number of prefill rows; decode rows follow.
    pub prefill: usize,
}

/// Reusable buffers for the inputs and outputs of linear layers.
#[derive(Debug, Default)]
pub(crate) struct CpuScratch {
    pub linear: LinearScratch,
    /// The output of a norm, [tokens, hidden].
    normed: Vec<f32>,
    /// The output of a sublayer before it is added to the residual stream, [tokens, hidden].
    out: Vec<f32>,
    experts: ExpertScratch,
}

impl<'a, A> CpuOps<'a, A> {
    fn elementwise(&self) -> Elementwise<'a> {
        Elementwise { isa: self.isa, pool: self.pool }
    }
}

impl<A: FnMut(QkvRows<'_>, AttentionSettings)> BlockOps for CpuOps<'_, A> {
    type Matrix = Weight;
    type Vector = Vec<f32>;
    type Buffer = Vec<f32>;
    type Residual = [f32];
    type Error = Infallible;

    fn linear<const N: usize>(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        weights: [LinearWeights<'_, Weight, Vec<f32>>; N],
        out: [&mut Vec<f32>; N],
    ) -> Flow<Infallible> {
        let elementwise = self.elementwise();
        let CpuScratch { linear, normed, .. } = &mut *self.scratch;
        let x = elementwise.input(x, self.norm, self.activation, normed);
        if self.observer.observe(input, x).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let mut out = out;
        let matrices = weights.each_ref().map(|weights| weights.matrix);
        let rows = Rows { x, prefill: self.prefill };
        apply(self.isa, self.pool, linear, matrices, rows, out.each_mut().map(|out| &mut **out));
        for (weights, out) in weights.iter().zip(out) {
            if let Some(bias) = weights.bias {
                elementwise.add_bias(out, bias);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        output: ResidualLinear<'_, Weight, Vec<f32>>,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        let elementwise = self.elementwise();
        let CpuScratch { linear, normed, out, .. } = &mut *self.scratch;
        let x = elementwise.input(x, self.norm, self.activation, normed);
        if self.observer.observe(input, x).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let rows = Rows { x, prefill: self.prefill };
        apply(self.isa, self.pool, linear, [output.matrix], rows, [out]);
        if let Some(bias) = output.bias {
            elementwise.add_bias(out, bias);
        }
        if let Some(norm) = output.norm {
            elementwise.norm_rows(out, norm, self.norm, normed);
            std::mem::swap(out, normed);
        }
        add(self.pool, residual, out);
        Ok(ControlFlow::Continue(()))
    }

    fn experts(
        &mut self,
        norm: NormWeights<'_, Vec<f32>>,
        layer: ExpertsLayer<'_, Weight>,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        let elementwise = self.elementwise();
        let CpuScratch { linear, normed, experts, .. } = &mut *self.scratch;
        elementwise.norm_rows(residual, norm, self.norm, normed);
        if self.observer.observe(LinearInput::GateUp, normed).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let mut ops = ExpertOps {
            isa: self.isa,
            pool: self.pool,
            activation: self.activation,
            linear,
            scratch: experts,
            observer: &mut *self.observer,
            prefill: self.prefill,
        };
        ops.run(&layer, normed, residual);
        Ok(ControlFlow::Continue(()))
    }

    fn normalize(
        &mut self,
        residual: &mut [f32],
        norm: NormWeights<'_, Vec<f32>>,
    ) -> Result<(), Infallible> {
        let elementwise = self.elementwise();
        let normed = &mut self.scratch.normed;
        elementwise.norm_rows(residual, norm, self.norm, normed);
        residual.copy_from_slice(normed);
        Ok(())
    }

    fn attend(
        &mut self,
        layer: AttentionLayer<'_, Vec<f32>>,
        x: AttentionBuffers<'_, Vec<f32>>,
    ) -> Result<(), Infallible> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        let elementwise = self.elementwise();
        let heads = [
            (&mut *q, layer.q_norm, layer.spec.heads as usize),
            (&mut *k, layer.k_norm, layer.spec.kv_heads as usize),
        ];
        for (x, weight, heads) in heads {
            if let Some(weight) = weight {
                let norm = NormWeights { weight, bias: None };
                elementwise.norm_rows(x, norm, self.norm, &mut self.scratch.normed);
                x.copy_from_slice(&self.scratch.normed);
            }
            if let Some(table) = layer.spec.rope {
                self.angles.table(table).rotate(self.pool, x, heads * self.head_dim);
            }
        }
        attn_out.resize(q.len(), 0.0);
        let settings = AttentionSettings::new(layer.spec);
        (self.attend)(QkvRows { q, k, v, out: attn_out }, settings);
        Ok(())
    }
}
