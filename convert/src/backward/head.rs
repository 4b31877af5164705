//! What follows the last decoder layer, forward and backward: norm, projection, lm_head, soft cap. And the gradient
//! of token embeddings.

use rayon::prelude::*;
use stb_kernels::{Isa, Panels, ops};
use stb_runtime::{Engine, Weight};

use super::matrix::DenseMatrix;
use super::norm::NormOp;
use crate::products::product_of;

/// Rows of the lm_head that are decoded at a time.
const HEAD_ROWS: usize = 4096;

/// The last norm and the lm_head of a model, with weights that may differ from those of `engine`.
#[derive(Clone, Copy)]
pub(crate) struct ModelHead<'a> {
    pub engine: &'a Engine,
    /// The weight of the last norm, `[hidden]`; without effect if the model has no last norm.
    pub norm: &'a [f32],
    /// The lm_head, [vocab, embedding].
    pub lm_head: &'a Weight,
}

impl<'a> ModelHead<'a> {
    /// The head of `engine`'s model.
    pub fn of(engine: &'a Engine) -> Self {
        Self { engine, norm: &engine.model.norm, lm_head: engine.model.lm_head() }
    }

    fn norm(&self) -> Option<NormOp<'a>> {
        let model = &self.engine.model;
        model.spec.has_final_norm().then(|| NormOp {
            isa: self.engine.isa,
            norm: model.spec.norm(),
            weight: self.norm,
            bias: model.norm_bias.as_deref(),
        })
    }

    /// The inputs of the lm_head, [tokens, embedding], for the residual stream `stream`, [tokens, hidden].
    pub fn inputs(&self, stream: &[f32]) -> Vec<f32> {
        let normed = match self.norm() {
            Some(norm) => norm.forward(stream),
            None => stream.to_vec(),
        };
        match &self.engine.model.project_out {
            Some(weight) => DenseMatrix::decoded(weight).apply(self.engine.isa, &normed),
            None => normed,
        }
    }

    /// The gradients of the residual stream, [tokens, hidden], and of the weight of the last norm, given that of the
    /// inputs of the lm_head, [tokens, embedding].
    pub fn inputs_backward(&self, stream: &[f32], d_inputs: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
        let d_normed = match &self.engine.model.project_out {
            Some(weight) => {
                DenseMatrix::decoded(weight).apply_transposed(self.engine.isa, &d_inputs)
            }
            None => d_inputs,
        };
        let mut d_norm = vec![0.0; self.norm.len()];
        let Some(norm) = self.norm() else { return (d_normed, d_norm) };
        let mut d_stream = vec![0.0; stream.len()];
        norm.backward(stream, &d_normed, &mut d_stream, &mut d_norm);
        (d_stream, d_norm)
    }

    /// The logits, [tokens, vocab], for the inputs of the lm_head, [tokens, embedding].
    pub fn logits(&self, inputs: &[f32]) -> Vec<f32> {
        let isa = self.engine.isa;
        let mut logits = products(isa, self.lm_head, inputs);
        if let Some(cap) = self.cap() {
            logits
                .par_chunks_mut(self.lm_head.rows())
                .for_each(|logits| ops::soft_cap(isa, cap, logits));
        }
        logits
    }

    /// The derivative of the soft cap at each of the `logits`, [tokens, vocab]; `None` without a soft cap.
    pub fn cap_slopes(&self, logits: &[f32]) -> Option<Vec<f32>> {
        let cap = self.cap()?;
        // The derivative of c · tanh(z / c) is 1 − tanh².
        Some(logits.par_iter().map(|z| 1.0 - (z / cap) * (z / cap)).collect())
    }

    /// The gradient of the inputs of the lm_head, [tokens, embedding], given that of its outputs before the soft cap,
    /// [tokens, vocab].
    pub fn logits_backward(&self, d_logits: &[f32]) -> Vec<f32> {
        let (isa, weight) = (self.engine.isa, self.lm_head);
        let (vocab, width) = (weight.rows(), weight.cols());
        let mut d_inputs = vec![0.0; d_logits.len() / vocab * width];
        let mut panels = Panels::default();
        for (from, rows) in row_chunks(weight) {
            let count = rows.len() / width;
            panels.pack_transposed(&rows, width, count, width);
            let part: Vec<f32> = d_logits
                .chunks_exact(vocab)
                .flat_map(|g| &g[from..from + count])
                .copied()
                .collect();
            let part = product_of(isa, &part, count, &panels, width);
            d_inputs.iter_mut().zip(part).for_each(|(d, p)| *d += p);
        }
        d_inputs
    }

    fn cap(&self) -> Option<f32> {
        self.engine.model.spec.logit_soft_cap.map(|cap| cap as f32)
    }
}

/// Multiplies the gradient of capped logits by the derivative of the cap: the gradient before the cap.
pub(crate) fn uncap(d_logits: &mut [f32], slopes: Option<Vec<f32>>) {
    if let Some(slopes) = slopes {
        d_logits.par_iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope);
    }
}

/// The gradient of the rows of the token embeddings, [tokens, embedding], given that of the input of the first
/// decoder layer, [tokens, hidden].
pub(crate) fn embedded_gradient(engine: &Engine, d_stream: Vec<f32>) -> Vec<f32> {
    let mut d = match &engine.model.project_in {
        Some(weight) => DenseMatrix::decoded(weight).apply_transposed(engine.isa, &d_stream),
        None => d_stream,
    };
    if let Some(scale) = engine.model.spec.embedding_scale {
        d.iter_mut().for_each(|d| *d *= scale as f32);
    }
    d
}

/// `x`, [tokens, cols], times the transpose of `weight`, [rows, cols]: [tokens, rows].
fn products(isa: Isa, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let (vocab, width) = (weight.rows(), weight.cols());
    let mut logits = vec![0.0; x.len() / width * vocab];
    let mut panels = Panels::default();
    for (from, rows) in row_chunks(weight) {
        panels.pack(&rows, width);
        let count = rows.len() / width;
        let part = product_of(isa, x, width, &panels, count);
        for (logits, part) in logits.chunks_exact_mut(vocab).zip(part.chunks_exact(count)) {
            logits[from..from + count].copy_from_slice(part);
        }
    }
    logits
}

/// Decodes `weight` in chunks of rows: the index of the first row, and the values [rows, cols].
fn row_chunks(weight: &Weight) -> impl Iterator<Item = (usize, Vec<f32>)> {
    let (rows, cols) = (weight.rows(), weight.cols());
    (0..rows).step_by(HEAD_ROWS).map(move |from| {
        let mut values = vec![0.0; HEAD_ROWS.min(rows - from) * cols];
        values
            .par_chunks_exact_mut(cols)
            .enumerate()
            .for_each(|(i, row)| weight.view().decode_row(from + i, row));
        (from, values)
    })
}
