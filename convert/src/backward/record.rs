//! The forward pass of a decoder layer that keeps what the backward pass needs.

use std::convert::Infallible;
use std::ops::ControlFlow;

use rayon::prelude::*;
use stb_format::arch::{InputMap, LinearInput};
use stb_kernels::ops;
use stb_runtime::Engine;
use stb_runtime::block::{AttentionBuffers, BlockInput, BlockOps, BlockScratch, Flow, run_block};

use super::attention::Attention;
use super::matrix::{DenseLayer, DenseMatrix};

/// The intermediate values of a forward pass that the backward pass needs; all [tokens, width].
#[derive(Default)]
pub(super) struct Recording {
    /// The inputs of the linear layers.
    pub inputs: InputMap<Vec<f32>>,
    /// The residual stream before attention, then before the MLP.
    pub residuals: Vec<Vec<f32>>,
    /// Queries and keys after RoPE, values, gate and up.
    pub block: BlockScratch<Vec<f32>>,
    /// The output of the layer, [tokens, hidden].
    pub out: Vec<f32>,
}

/// Runs sequences of `length` tokens, `x` [sequences · length, hidden], through a decoder layer.
pub(super) fn record(engine: &Engine, length: usize, layer: &DenseLayer, x: Vec<f32>) -> Recording {
    let mut recording = Recording { out: x, ..Recording::default() };
    let Recording { inputs, residuals, block, out } = &mut recording;
    let mut ops = RecordingOps { engine, length, inputs, residuals };
    let Ok(_) = run_block(&mut ops, layer, block, out);
    recording
}

struct RecordingOps<'a> {
    engine: &'a Engine,
    length: usize,
    inputs: &'a mut InputMap<Vec<f32>>,
    residuals: &'a mut Vec<Vec<f32>>,
}

impl RecordingOps<'_> {
    /// Computes and keeps the input of a linear layer.
    fn keep(&mut self, input: LinearInput, x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>) {
        self.inputs[input] = match x {
            BlockInput::Plain(x) => x.clone(),
            BlockInput::Norm { x, weight } => {
                self.residuals.push(x.to_vec());
                norm(self.engine, x, weight)
            }
            BlockInput::Gated { gate, up } => {
                gate.par_iter().zip(up).map(|(g, u)| g * sigmoid(*g) * u).collect()
            }
        };
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
        matrices: [&DenseMatrix; N],
        out: [&mut Vec<f32>; N],
    ) -> Flow<Infallible> {
        self.keep(input, x);
        for (matrix, out) in matrices.into_iter().zip(out) {
            *out = matrix.apply(self.engine.isa, &self.inputs[input]);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        matrix: &DenseMatrix,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        self.keep(input, x);
        let out = matrix.apply(self.engine.isa, &self.inputs[input]);
        residual.par_iter_mut().zip(&out).for_each(|(r, o)| *r += o);
        Ok(ControlFlow::Continue(()))
    }

    fn attend(&mut self, x: AttentionBuffers<'_, Vec<f32>>) -> Result<(), Infallible> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        let tokens = self.residuals.last().map_or(1, Vec::len) / self.engine.model.hidden_size();
        let (q_width, kv_width) = (q.len() / tokens, k.len() / tokens);
        for (heads, width) in [(&mut *q, q_width), (&mut *k, kv_width)] {
            heads
                .par_chunks_exact_mut(self.length * width)
                .for_each(|sequence| self.engine.rotate(sequence, width, false));
        }
        *attn_out = vec![0.0; q.len()];
        let (q_size, kv_size) = (self.length * q_width, self.length * kv_width);
        attn_out
            .par_chunks_exact_mut(q_size)
            .zip(q.par_chunks_exact(q_size))
            .zip(k.par_chunks_exact(kv_size).zip(v.par_chunks_exact(kv_size)))
            .for_each(|((out, q), (k, v))| {
                Attention::new(self.engine, self.length, [q, k, v]).forward(out);
            });
        Ok(())
    }
}

/// RMSNorm of each row of `x`, [tokens, hidden].
pub(super) fn norm(engine: &Engine, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let (isa, eps) = (engine.isa, engine.model.spec.norm_eps as f32);
    let mut out = vec![0.0; x.len()];
    out.par_chunks_exact_mut(weight.len())
        .zip(x.par_chunks_exact(weight.len()))
        .for_each(|(out, x)| ops::rms_norm(isa, x, weight, eps, out));
    out
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
