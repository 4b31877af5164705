//! The cost of each candidate encoding: exact bytes, and the expected KL divergence from the dense model.
//!
//! An error ΔW of a linear layer with inputs x changes its output by ΔW x, and the output distribution by
//! KL ≈ ½ Σ_i E[g_i²] · E[(ΔW x)_i²] nats per token. The E[g_i²] are the diagonal of the Fisher information, where g
//! are the gradients of [`crate::backward`]. ΔW is measured: the quantizer runs on sampled rows with the Hessian of a
//! few sequences. The costs of tensors add up.

use stb_format::arch::{InputMap, LinearInput, Role};
use stb_format::{Encoding, ModelSpec};
use stb_kernels::Isa;
use stb_runtime::{Checkpoint, Engine, LayerMatrix, Result, Weight};

mod experts;
mod tables;

use self::tables::TableCosts;
use super::candidate::Candidate;
use crate::backward::{LayerFisher, backpropagate};
use crate::calibration::CalibrationText;
use crate::hessian::{Factor, Hessian, output_errors};
use crate::interrupt::check_interrupt;
use crate::pipeline::decode_finite;
use crate::plan::{Plan, TensorMethod, TensorPlan};
use crate::quantize::{Input, Method, decode};
use crate::recipe::Recipe;
use crate::tables::{TOKENS, sequences};

/// Rows of a linear layer that are quantized, evenly spaced.
const ROWS: usize = 128;
/// Columns that are quantized together. Correlations between chunks are ignored.
const CHUNK: usize = 1024;

/// The candidate encodings of each tensor of `plan`; none for vectors, which keep their encoding.
///
/// # Errors
/// [`stb_runtime::Error::Usage`] if the calibration text is too short, [`stb_runtime::Error::Invalid`] for
/// weights that are not finite, [`crate::interrupt::Interrupted`] if the user has asked to stop.
pub(super) fn candidates(
    plan: &Plan,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
) -> anyhow::Result<Vec<Vec<Candidate>>> {
    for tensor in &plan.tensors {
        decode_finite(&checkpoint.weight(&tensor.tensor.name)?, &tensor.tensor.name)?;
    }
    let engine = Engine::from_checkpoint(checkpoint)?;
    let sequences = sequences(&engine, recipe, source)?;
    let mut found: Vec<Vec<Candidate>> = vec![Vec::new(); plan.tensors.len()];
    let statistics = backpropagate(&engine, &sequences, |index, fisher| {
        let damping = recipe.calibration.damping;
        let hessians = HessianChunk::for_layer(&engine, fisher, damping)?;
        for (tensor, found) in plan.tensors.iter().zip(&mut found) {
            let Some((_, linear)) = tensor.linear().filter(|(i, _)| *i == index) else { continue };
            if let Some(outputs) = fisher.outputs_of(LayerMatrix::Linear(linear)) {
                let weight = checkpoint.weight(&tensor.tensor.name)?;
                let all = TokenShare(1.0);
                *found =
                    linear_candidates(tensor, &weight, outputs, &hessians[linear.input()], all)?;
            }
            check_interrupt()?;
        }
        let layer = experts::LayerCosts { plan, checkpoint, index, fisher, damping };
        layer.add(&engine, &mut found)
    })?;
    let tables = TableCosts {
        isa: engine.isa,
        statistics: &statistics,
        tied: engine.model.own_lm_head.is_none(),
        damping: recipe.calibration.damping,
    };
    for (tensor, found) in plan.tensors.iter().zip(&mut found) {
        if matches!(tensor.tensor.role, Role::TokenEmbedding | Role::LmHead) {
            let weight = checkpoint.weight(&tensor.tensor.name)?;
            *found = tables.candidates(tensor, &weight)?;
        }
    }
    Ok(found)
}

/// An upper estimate of the memory needed to compute the costs, besides the mapped checkpoint, in bytes.
#[must_use]
pub fn memory(spec: &ModelSpec) -> u64 {
    let tokens = TOKENS as u64;
    let width = 8 * spec.hidden_size + 4 * spec.heads * spec.head_dim + 6 * spec.intermediate_size;
    let layer = 4 * spec.hidden_size * spec.heads * spec.head_dim
        + 3 * spec.hidden_size * spec.intermediate_size;
    let streams = tokens * spec.hidden_size * (spec.layers + 1) * 4;
    // The products of the gradients of embeddings and of the inputs of the lm_head.
    let tables = 2 * spec.hidden_size * spec.hidden_size * 4;
    streams + tables + (tokens * width * 4 + layer * 8).max(tokens * spec.vocab_size * 8)
}

/// The Hessian of a chunk of columns of an input, and its factors. All tokens count as one sequence.
struct HessianChunk {
    isa: Isa,
    from: usize,
    tokens: usize,
    plain: Hessian,
    damped: Hessian,
    factor: Factor,
    norms: Vec<f32>,
}

impl HessianChunk {
    /// The Hessians of the inputs of a decoder layer, by chunk of columns.
    fn for_layer(
        engine: &Engine,
        fisher: &LayerFisher,
        damping: f64,
    ) -> Result<InputMap<Vec<Self>>> {
        let tokens = fisher.inputs[LinearInput::Qkv].len() / engine.model.hidden_size();
        InputMap::try_from_fn(|input| {
            let x = &fisher.inputs[input];
            let cols = x.len() / tokens.max(1);
            Self::all(engine.isa, x, cols, damping)
        })
    }

    /// The Hessians of `x`, [tokens, cols], by chunk of columns; none without tokens.
    fn all(isa: Isa, x: &[f32], cols: usize, damping: f64) -> Result<Vec<Self>> {
        let chunks = (0..cols).step_by(CHUNK).filter(|_| !x.is_empty());
        chunks.map(|from| Self::new(isa, x, cols, from, damping)).collect()
    }

    fn new(isa: Isa, x: &[f32], cols: usize, from: usize, damping: f64) -> Result<Self> {
        let width = CHUNK.min(cols - from);
        let part: Vec<f32> =
            x.chunks_exact(cols).flat_map(|x| &x[from..from + width]).copied().collect();
        let mut plain = Hessian::new(width);
        plain.add(isa, &part);
        plain.count_sequence();
        plain.finish();
        let norms = plain.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        let mut damped = plain.clone();
        damped.damp(damping);
        let factor = Factor::new(&damped)?;
        Ok(Self { isa, from, tokens: x.len() / cols, plain, damped, factor, norms })
    }

    /// The columns of this chunk in `rows`, [rows, cols].
    fn columns(&self, rows: &[f32], cols: usize) -> Vec<f32> {
        let range = self.from..self.from + self.norms.len();
        rows.chunks_exact(cols).flat_map(|row| &row[range.clone()]).copied().collect()
    }

    /// E[(ΔW x)²] of each row when `method` quantizes `weights`.
    fn errors(&self, weights: &[f32], method: Method) -> Result<Vec<f64>> {
        let cols = self.norms.len();
        let input = Input {
            compute: self.isa.into(),
            weights,
            rows: weights.len() / cols,
            cols,
            hessian: &self.damped,
            factor: &self.factor,
            norms: &self.norms,
            col_spreads: None,
        };
        let stored = decode(&method.quantizer().quantize(&input, None)?, input.rows, cols);
        let difference: Vec<f32> = weights.iter().zip(&stored).map(|(w, q)| w - q).collect();
        let scale = 0.5 / self.tokens as f64;
        let errors = output_errors(self.isa, &difference, &self.plain);
        Ok(errors.into_iter().map(|e| e * scale).collect())
    }
}

/// The candidate that keeps the data type of the checkpoint.
fn keep_candidate(tensor: &TensorPlan, weight: &Weight) -> Result<Option<Candidate>> {
    let Encoding::Dense(kind) = *weight.encoding() else { return Ok(None) };
    Candidate::new(tensor, TensorMethod::Keep(kind), 0.0).map(Some)
}

/// At most `most` evenly spaced rows of a matrix: their indices and their values, [rows, cols].
fn sample_rows(weight: &Weight, most: usize) -> (Vec<usize>, Vec<f32>) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let indices: Vec<usize> = (0..rows).step_by(rows.div_ceil(most).max(1)).collect();
    let mut values = vec![0.0; indices.len() * cols];
    for (row, out) in indices.iter().zip(values.chunks_exact_mut(cols)) {
        weight.view().decode_row(*row, out);
    }
    (indices, values)
}

/// The weight of sampled rows: the sum of `values` over all rows divided by the sum over `rows`.
fn row_weight(values: &[f32], rows: &[usize]) -> f64 {
    let all: f64 = values.iter().map(|v| f64::from(*v)).sum();
    let sampled: f64 = rows.iter().map(|r| f64::from(values[*r])).sum();
    if sampled > 0.0 { all / sampled } else { 0.0 }
}

/// The share of all tokens that a matrix computes with: below 1 for experts.
#[derive(Clone, Copy)]
struct TokenShare(f64);

/// The candidates of a linear layer. `fisher` is the mean square of the gradient of each output, `[out]`, over the
/// tokens of the layer.
fn linear_candidates(
    tensor: &TensorPlan,
    weight: &Weight,
    fisher: &[f32],
    hessians: &[HessianChunk],
    tokens: TokenShare,
) -> Result<Vec<Candidate>> {
    let (rows, values) = sample_rows(weight, ROWS);
    let factor = 0.5 * tokens.0 * row_weight(fisher, &rows);
    let chunks: Vec<Vec<f32>> =
        hessians.iter().map(|h| h.columns(&values, weight.cols())).collect();
    let loss = |method: Method| -> Result<f64> {
        let mut loss = 0.0;
        for (values, hessian) in chunks.iter().zip(hessians) {
            let errors = hessian.errors(values, method.for_estimates())?;
            let weighted = errors.iter().zip(&rows).map(|(e, r)| e * f64::from(fisher[*r]));
            loss += weighted.sum::<f64>();
        }
        Ok(factor * loss)
    };
    let col_factors = Method::wants_col_factors(weight.rows(), loss)?;
    let mut found = Vec::new();
    for method in Method::candidates(weight.cols(), col_factors) {
        found.push(Candidate::new(tensor, TensorMethod::Linear(method), loss(method)?)?);
    }
    found.extend(keep_candidate(tensor, weight)?);
    Ok(found)
}
