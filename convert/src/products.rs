//! Matrix products on the CPU, for Hessians, quantizers and gradients.

use rayon::prelude::*;
use stb_kernels::{Isa, Panels, dense, gemm};

/// Rows per task of a thread; also the granularity of the Hessian's triangle.
pub(crate) const TASK_ROWS: usize = 64;

/// The transpose, [cols, rows], of `x`, [rows, cols].
pub(crate) fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(rows).enumerate().for_each(|(c, out)| {
        for (r, out) in out.iter_mut().enumerate() {
            *out = x[r * cols + c];
        }
    });
    out
}

/// `a` · Bᵀ, where `a` is [rows, k] and `b` holds the rows of B, [width, k]. Writes [rows, stride] to `out` and
/// returns the stride, which is the width with padding. Sequential; callers split rows over threads.
pub(crate) fn product(isa: Isa, a: &[f32], k: usize, b: &Panels, out: &mut Vec<f32>) -> usize {
    let panels = b.all();
    let stride = panels.row_stride();
    out.resize(a.len() / k * stride, 0.0);
    gemm(isa, &dense(a, a.len() / k, k), panels, 0, out);
    stride
}

/// Adds Aᵀ X to `out`, [rows, cols]: `a` is [tokens, rows], `x` [tokens, cols].
pub(crate) fn add_cross_products(
    isa: Isa,
    a: &[f32],
    rows: usize,
    x: &[f32],
    cols: usize,
    out: &mut [f32],
) {
    let tokens = x.len() / cols;
    assert!(tokens * cols == x.len() && tokens * rows == a.len(), "the same tokens");
    let mut panels = Panels::default();
    panels.pack_transposed(x, cols, tokens, cols);
    let transposed = transpose(a, tokens, rows);
    let left = dense(&transposed, rows, tokens);
    out.par_chunks_mut(TASK_ROWS * cols).enumerate().for_each_init(
        Vec::new,
        |product, (task, out)| {
            let stride = panels.all().row_stride();
            product.resize(out.len() / cols * stride, 0.0);
            gemm(isa, &left, panels.all(), task * TASK_ROWS, product);
            for (row, product) in out.chunks_exact_mut(cols).zip(product.chunks(stride)) {
                row.iter_mut().zip(product).for_each(|(m, p)| *m += p);
            }
        },
    );
}

/// As [`product`], in parallel and without padding: [rows, width].
pub(crate) fn product_of(isa: Isa, a: &[f32], k: usize, b: &Panels, width: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / k * width];
    out.par_chunks_mut(TASK_ROWS * width).zip(a.par_chunks(TASK_ROWS * k)).for_each_init(
        Vec::new,
        |padded, (out, a)| {
            let stride = product(isa, a, k, b, padded);
            for (out, product) in out.chunks_exact_mut(width).zip(padded.chunks_exact(stride)) {
                out.copy_from_slice(&product[..width]);
            }
        },
    );
    out
}
