//! The forward pass of a decoder layer that keeps what the backward pass needs.

use std::convert::Infallible;
use std::ops::ControlFlow;

use rayon::prelude::*;
use stb_format::arch::{Block, InputMap, LinearInput};
use stb_runtime::Engine;
use stb_runtime::block::{
    AttentionBuffers, AttentionLayer, BlockInput, BlockOps, BlockScratch, ExpertsLayer, Flow,
    LinearWeights, NormWeights, ResidualLinear, run_block,
};

use super::activation::activate;
use super::attention::SequenceAttention;
use super::experts::{ExpertRecording, record_experts};
use super::matrix::{DenseLayer, DenseMatrix};
use super::norm::NormOp;

/// The intermediate values of a forward pass that the backward pass needs; all [tokens, width].
#[derive(Default)]
pub(super) struct Recording {
    /// The inputs of the linear layers.
    pub inputs: InputMap<Vec<f32>>,
    /// The inputs of the norms, in the order of computation.
    pub norm_inputs: Vec<Vec<f32>>,
    /// Queries and keys after RoPE, values, gate and up.
    pub block: BlockScratch<Vec<f32>>,
    /// The mixture of experts, if the layer has one.
    pub experts: Option<ExpertRecording>,
    /// The output of the layer, [tokens, hidden].
    pub out: Vec<f32>,
}

/// Runs sequences of `length` tokens, `x` [sequences · length, hidden], through a decoder layer.
pub(super) fn record(engine: &Engine, length: usize, layer: &DenseLayer, x: Vec<f32>) -> Recording {
    let mut recording = Recording { out: x, ..Recording::default() };
    let Recording { inputs, norm_inputs, block, experts, out } = &mut recording;
    let block_spec = &layer.block;
    let mut ops =
        RecordingOps { engine, block: block_spec, length, inputs, norm_inputs, recorded: experts };
    let Ok(_) = run_block(&mut ops, layer, block, out);
    recording
}

struct RecordingOps<'a> {
    engine: &'a Engine,
    block: &'a Block,
    length: usize,
    inputs: &'a mut InputMap<Vec<f32>>,
    norm_inputs: &'a mut Vec<Vec<f32>>,
    recorded: &'a mut Option<ExpertRecording>,
}

impl RecordingOps<'_> {
    /// Computes and keeps the input of a linear layer.
    fn keep(&mut self, input: LinearInput, x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>) {
        let activation = self.block.mlp.activation;
        self.inputs[input] = match x {
            BlockInput::Plain(x) => x.clone(),
            BlockInput::Residual(x) => x.to_vec(),
            BlockInput::Norm { x, norm } => self.norm(x.to_vec(), norm),
            BlockInput::Activated(x) => x.par_iter().map(|x| activate(activation, *x)).collect(),
            BlockInput::Gated { gate, up } => {
                gate.par_iter().zip(up).map(|(g, u)| activate(activation, *g) * u).collect()
            }
        };
    }

    /// Normalizes and keeps `x`.
    fn norm(&mut self, x: Vec<f32>, weights: NormWeights<'_, Vec<f32>>) -> Vec<f32> {
        let bias = weights.bias.map(|bias| &bias[..]);
        let (isa, norm) = (self.engine.isa, self.block.norm);
        let out = NormOp { isa, norm, weight: weights.weight, bias }.forward(&x);
        self.norm_inputs.push(x);
        out
    }

    /// The kept input of a linear layer through the layer: [tokens, out].
    fn apply(&self, input: LinearInput, matrix: &DenseMatrix, bias: Option<&Vec<f32>>) -> Vec<f32> {
        let mut out = matrix.apply(self.engine.isa, &self.inputs[input]);
        if let Some(bias) = bias {
            out.par_chunks_exact_mut(bias.len())
                .for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
        }
        out
    }
}

impl BlockOps for RecordingOps<'_> {
    type Matrix = DenseMatrix;
    type Vector = Vec<f32>;
    type Buffer = Vec<f32>;
    type Residual = [f32];
    type Error = Infallible;

    fn linear<const N: usize>(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        weights: [LinearWeights<'_, DenseMatrix, Vec<f32>>; N],
        out: [&mut Vec<f32>; N],
    ) -> Flow<Infallible> {
        self.keep(input, x);
        for (LinearWeights { matrix, bias }, out) in weights.into_iter().zip(out) {
            *out = self.apply(input, matrix, bias);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        output: ResidualLinear<'_, DenseMatrix, Vec<f32>>,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        self.keep(input, x);
        let mut out = self.apply(input, output.matrix, output.bias);
        if let Some(norm) = output.norm {
            out = self.norm(out, norm);
        }
        residual.par_iter_mut().zip(&out).for_each(|(r, o)| *r += o);
        Ok(ControlFlow::Continue(()))
    }

    fn experts(
        &mut self,
        norm: NormWeights<'_, Vec<f32>>,
        layer: ExpertsLayer<'_, DenseMatrix>,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        let x = self.norm(residual.to_vec(), norm);
        *self.recorded = Some(record_experts(self.engine, &layer, &x, residual));
        self.inputs[LinearInput::GateUp] = x;
        Ok(ControlFlow::Continue(()))
    }

    fn normalize(
        &mut self,
        residual: &mut [f32],
        norm: NormWeights<'_, Vec<f32>>,
    ) -> Result<(), Infallible> {
        residual.copy_from_slice(&self.norm(residual.to_vec(), norm));
        Ok(())
    }

    fn attend(
        &mut self,
        layer: AttentionLayer<'_, Vec<f32>>,
        x: AttentionBuffers<'_, Vec<f32>>,
    ) -> Result<(), Infallible> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        let (engine, block, length) = (self.engine, self.block, self.length);
        let tokens = self.inputs[LinearInput::Qkv].len() / engine.model.hidden_size();
        let (q_width, kv_width) = (q.len() / tokens, k.len() / tokens);
        let heads = [(&mut *q, q_width, layer.q_norm), (&mut *k, kv_width, layer.k_norm)];
        for (heads, width, weight) in heads {
            if let Some(weight) = weight {
                *heads = self.norm(std::mem::take(heads), NormWeights { weight, bias: None });
            }
            heads
                .par_chunks_exact_mut(length * width)
                .for_each(|sequence| engine.rotate(block, sequence, width, false));
        }
        *attn_out = vec![0.0; q.len()];
        let (q_size, kv_size) = (length * q_width, length * kv_width);
        attn_out
            .par_chunks_exact_mut(q_size)
            .zip(q.par_chunks_exact(q_size))
            .zip(k.par_chunks_exact(kv_size).zip(v.par_chunks_exact(kv_size)))
            .for_each(|((out, q), (k, v))| {
                SequenceAttention::new(engine.isa, layer.spec, [q, k, v]).forward(out);
            });
        Ok(())
    }
}
