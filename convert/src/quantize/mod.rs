//! From a dense weight matrix and the second moments of its inputs to packed weights.

mod fit;
pub mod int_group;
mod magnitudes;
pub mod metric;
pub mod nm;
pub mod pb_llm;
pub mod prune;
mod quantiles;
pub(crate) mod refit;
pub mod search;
pub mod sorted;
pub mod stbllm;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_kernels::{Isa, Panels};
use stb_runtime::Result;

use crate::engine::Engine;
use crate::hessian::{Factor, Hessian, product};
use crate::plan::Method;
use prune::Pruned;

/// Rows that a thread works on at once.
pub(crate) const TASK_ROWS: usize = 64;

/// A linear layer on its way to packed weights.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Where products are computed.
    pub engine: Engine<'a>,
    /// [rows, cols], row-major.
    pub weights: &'a [f32],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Damped second moments of the inputs.
    pub hessian: &'a Hessian,
    /// Their factors.
    pub factor: &'a Factor,
    /// Norms of the input features without damping: sqrt(diag H / 2).
    pub norms: &'a [f32],
}

/// Packed weights.
#[derive(Clone, Debug)]
pub struct Packed {
    /// How they are stored.
    pub encoding: Encoding,
    /// The stored bytes.
    pub payload: Vec<u8>,
    /// Share of columns (PB-LLM: of weights) that are salient, where the method has any.
    pub salient: Option<f64>,
    /// Where the time went.
    pub seconds: Seconds,
}

/// Wall-clock seconds per step of a quantizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Seconds {
    /// Choosing masks, compensation of pruned weights included.
    pub prune: f64,
    /// Searching salient columns and thresholds.
    pub search: f64,
    /// Scales, codes and values.
    pub quantize: f64,
    /// Passing errors on to later blocks.
    pub propagate: f64,
    /// Refitting scales and codes after the block loop.
    pub refit: f64,
    /// Packing.
    pub pack: f64,
}

impl Seconds {
    /// Adds those of another tensor.
    pub fn add(&mut self, other: &Self) {
        self.prune += other.prune;
        self.search += other.search;
        self.quantize += other.quantize;
        self.propagate += other.propagate;
        self.refit += other.refit;
        self.pack += other.pack;
    }
}

/// How the error of a block is passed on to the later columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Exactly: `(W − Q) · U_bb⁻¹ · U`.
    Solve,
    /// With the diagonal of `U_bb` only (BiLLM, published code).
    Diagonal,
    /// Not at all.
    Off,
}

/// The error of a layer's output that `quantized` causes, relative to the output itself:
/// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ).
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub fn relative_error(input: &Input<'_>, quantized: &[f32]) -> Result<f64> {
    let difference: Vec<f32> =
        input.weights.par_iter().zip(quantized).map(|(w, q)| w - q).collect();
    let energy = |weights: &[f32]| -> Result<f64> {
        Ok(input.engine.output_errors(weights, input.hessian)?.iter().sum())
    };
    let output = energy(input.weights)?;
    Ok(if output > 0.0 { energy(&difference)? / output } else { 0.0 })
}

/// (W H Wᵀ)_ii of each row of `weights`, [rows, in], on this processor.
pub(crate) fn output_errors(isa: Isa, weights: &[f32], hessian: &Hessian) -> Vec<f64> {
    let cols = hessian.size;
    let mut panels = Panels::default();
    panels.pack(hessian.matrix(), cols);
    let part = |rows: &[f32]| -> Vec<f64> {
        let mut out = Vec::new();
        let stride = product(isa, rows, cols, &panels, &mut out);
        let dot = |(w, h): (&[f32], &[f32])| -> f64 {
            w.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum()
        };
        rows.chunks_exact(cols).zip(out.chunks_exact(stride)).map(dot).collect()
    };
    let parts: Vec<Vec<f64>> = weights.par_chunks(TASK_ROWS * cols).map(part).collect();
    parts.concat()
}

/// Quantizes a linear layer. `pruned` is its pruned form where that comes from a pass of its own.
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub(crate) fn linear(input: &Input<'_>, method: Method, pruned: Option<&Pruned>) -> Result<Packed> {
    match method {
        Method::Stbllm(options) => stbllm::quantize(input, &options, pruned),
        Method::Nm(options) => nm::quantize(input, &options),
        Method::Int(options) => int_group::quantize(input, &options),
        Method::PbLlm(options) => pb_llm::quantize(input, &options),
    }
}

/// The weights, [rows, cols].
pub(crate) fn decode(packed: &Packed, rows: usize, cols: usize) -> Vec<f32> {
    let view = packed.encoding.view(rows as u64, cols as u64, &packed.payload);
    let view = view.expect("a payload that was packed for this shape");
    let mut out = vec![0.0; rows * cols];
    out.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| view.decode_row(r, row));
    out
}

/// Spreads the errors of columns `from..from + width` over all later columns:
/// `w[:, later] -= (errors · M_bb) · U[block, later]`, the exact minimizer of the layer's output
/// error for fixed earlier columns, or with diag(M_bb). `errors` is [rows, width], W − Q of the
/// block.
pub(crate) fn propagate(
    isa: Isa,
    weights: &mut [f32], // [rows, cols]
    factor: &Factor,
    errors: &[f32],
    from: usize,
    width: usize,
    mode: Propagation,
) {
    let cols = factor.size;
    let later = from + width;
    if later == cols || mode == Propagation::Off {
        return;
    }
    let (mut diagonal, mut right) = (Panels::default(), Panels::default());
    diagonal.pack_transposed(&factor.m[from * cols + from..], width, width, cols);
    let entries: Vec<f32> = (from..later).map(|j| factor.m[j * (cols + 1)]).collect();
    right.pack_transposed(&factor.u[from * cols + later..], cols - later, width, cols);
    weights
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(errors.par_chunks(TASK_ROWS * width))
        .for_each_init(Default::default, |memory: &mut [Vec<f32>; 3], (weights, errors)| {
            let [scaled, compact, change] = memory;
            compact.clear();
            if mode == Propagation::Solve {
                let stride = product(isa, errors, width, &diagonal, scaled);
                for row in scaled.chunks_exact(stride) {
                    compact.extend_from_slice(&row[..width]);
                }
            } else {
                for row in errors.chunks_exact(width) {
                    compact.extend(row.iter().zip(&entries).map(|(e, m)| e * m));
                }
            }
            let stride = product(isa, compact, width, &right, change);
            for (row, change) in weights.chunks_exact_mut(cols).zip(change.chunks_exact(stride)) {
                for (w, c) in row[later..].iter_mut().zip(change) {
                    *w -= c;
                }
            }
        });
}
