//! From a dense weight matrix and the second moments of its inputs to packed weights.

pub mod int_group;
pub mod metric;
pub mod nm;
pub mod prune;
pub mod sorted;
pub mod stbllm;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_kernels::{Isa, Panels};

use crate::hessian::{Factor, Hessian, product};

/// Rows that a thread works on at once.
pub(crate) const TASK_ROWS: usize = 64;

/// A linear layer on its way to packed weights.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The instruction set for products.
    pub isa: Isa,
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
    /// Share of columns that are salient, where the method has any.
    pub salient: Option<f64>,
}

/// The error of a layer's output that `quantised` causes, relative to the output itself:
/// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ).
#[must_use]
pub fn relative_error(input: &Input<'_>, quantised: &[f32]) -> f64 {
    let difference: Vec<f32> =
        input.weights.par_iter().zip(quantised).map(|(w, q)| w - q).collect();
    let energy = |weights: &[f32]| quadratic_form(input.isa, weights, input.hessian);
    let output = energy(input.weights);
    if output > 0.0 { energy(&difference) / output } else { 0.0 }
}

/// tr(W H Wᵀ) of `weights`, [rows, in].
fn quadratic_form(isa: Isa, weights: &[f32], hessian: &Hessian) -> f64 {
    let cols = hessian.size;
    let mut panels = Panels::default();
    panels.pack(hessian.matrix(), cols);
    let part = |rows: &[f32]| {
        let mut out = Vec::new();
        let stride = product(isa, rows, cols, &panels, &mut out);
        let dot = |(w, h): (&[f32], &[f32])| -> f64 {
            w.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum()
        };
        rows.chunks_exact(cols).zip(out.chunks_exact(stride)).map(dot).sum::<f64>()
    };
    let parts: Vec<f64> = weights.par_chunks(TASK_ROWS * cols).map(part).collect();
    parts.into_iter().sum()
}

/// Σ first / Σ second, summed in order; zero for nothing.
pub(crate) fn ratio_of_sums(parts: Vec<(f64, f64)>) -> f64 {
    let (error, all) = parts.into_iter().fold((0.0, 0.0), |(e, a), (x, y)| (e + x, a + y));
    if all > 0.0 { error / all } else { 0.0 }
}

/// Spreads the errors of columns `from..from + width` over all later columns:
/// `w[:, later] -= (errors · M_bb) · U[block, later]`, the exact minimiser of the layer's output
/// error for fixed earlier columns. `errors` is [rows, width], W − Q of the block.
pub(crate) fn propagate(
    isa: Isa,
    weights: &mut [f32], // [rows, cols]
    factor: &Factor,
    errors: &[f32],
    from: usize,
    width: usize,
) {
    let cols = factor.size;
    let later = from + width;
    if later == cols {
        return;
    }
    let (mut diagonal, mut right) = (Panels::default(), Panels::default());
    diagonal.pack_transposed(&factor.m[from * cols + from..], width, width, cols);
    right.pack_transposed(&factor.u[from * cols + later..], cols - later, width, cols);
    weights
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(errors.par_chunks(TASK_ROWS * width))
        .for_each_init(Default::default, |memory: &mut [Vec<f32>; 3], (weights, errors)| {
            let [scaled, compact, change] = memory;
            let stride = product(isa, errors, width, &diagonal, scaled);
            compact.clear();
            for row in scaled.chunks_exact(stride) {
                compact.extend_from_slice(&row[..width]);
            }
            let stride = product(isa, compact, width, &right, change);
            for (row, change) in weights.chunks_exact_mut(cols).zip(change.chunks_exact(stride)) {
                for (w, c) in row[later..].iter_mut().zip(change) {
                    *w -= c;
                }
            }
        });
}
