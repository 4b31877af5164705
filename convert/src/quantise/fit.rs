//! Fitting what has been quantised to the layer's output: scales in closed form, and what a change of some
//! weights does to the others.

use rayon::prelude::*;
use stb_kernels::Panels;

use super::{Input, TASK_ROWS};
use crate::hessian::{product, product_of};

/// `weights` · H, [rows, cols].
pub(super) fn times_hessian(input: &Input<'_>, weights: &[f32]) -> Vec<f32> {
    let mut panels = Panels::default();
    panels.pack(input.hessian.matrix(), input.cols);
    product_of(input.isa, weights, input.cols, &panels, input.cols)
}

/// (W − Q) · H, [rows, cols]: `target` is W·H, `weights` Q.
pub(super) fn residual(input: &Input<'_>, weights: &[f32], target: &[f32]) -> Vec<f32> {
    let mut residual = times_hessian(input, weights);
    residual.par_iter_mut().zip(target).for_each(|(r, t)| *r = t - *r);
    residual
}

/// The scales that minimise the output error of weights that are `units`, [rows, cols], times a scale for
/// every `span` columns of a row: per row the small system (Tᵀ H T) α = Tᵀ H w, T the units by block.
/// `target` is W·H. A row whose system is singular keeps its `scales`, [rows, blocks].
pub(super) fn best_scales(
    input: &Input<'_>,
    units: &[f32],
    span: usize,
    target: &[f32],
    scales: &mut [f32],
) {
    let (isa, rows, cols) = (input.isa, input.rows, input.cols);
    let blocks = cols.div_ceil(span);
    // [rows, blocks, blocks], lower triangle.
    let mut systems = vec![0f64; rows * blocks * blocks];
    let mut panels = Panels::default();
    for b in 0..blocks {
        let (start, end) = (b * span, cols.min((b + 1) * span));
        let width = end - start;
        let rows_of_h = &input.hessian.matrix()[start * cols..end * cols];
        // Only columns up to the end of the block: the system is symmetric.
        panels.pack_transposed(rows_of_h, end, width, cols);
        let panels = &panels;
        systems
            .par_chunks_mut(TASK_ROWS * blocks * blocks)
            .zip(units.par_chunks(TASK_ROWS * cols))
            .for_each_init(Default::default, |memory: &mut [Vec<f32>; 2], (systems, units)| {
                let [part, out] = memory;
                part.clear();
                units.chunks_exact(cols).for_each(|s| part.extend_from_slice(&s[start..end]));
                let stride = product(isa, part, width, panels, out);
                let rows = systems.chunks_exact_mut(blocks * blocks);
                for ((system, units), out) in
                    rows.zip(units.chunks_exact(cols)).zip(out.chunks_exact(stride))
                {
                    let earlier = units[..end].chunks(span).zip(out[..end].chunks(span));
                    for (k, (s, p)) in earlier.enumerate() {
                        system[b * blocks + k] = dot(s, p);
                    }
                }
            });
    }
    scales
        .par_chunks_exact_mut(blocks)
        .zip(systems.par_chunks_exact_mut(blocks * blocks))
        .zip(units.par_chunks_exact(cols))
        .zip(target.par_chunks_exact(cols))
        .for_each(|(((scales, system), units), target)| {
            let parts = units.chunks(span).zip(target.chunks(span));
            let mut right: Vec<f64> = parts.map(|(s, t)| dot(s, t)).collect();
            if solve(system, &mut right) {
                for (scale, value) in scales.iter_mut().zip(right) {
                    *scale = value as f32;
                }
            }
        });
}

/// Updates `residual`, [rows, cols], for changes of the weights of a block of columns that begins at `from`,
/// [rows, width]; the block itself has been updated.
pub(super) fn pass_on(input: &Input<'_>, residual: &mut [f32], changes: &[f32], from: usize) {
    let (isa, cols) = (input.isa, input.cols);
    let width = changes.len() / input.rows.max(1);
    let mut panels = Panels::default();
    panels.pack_transposed(&input.hessian.matrix()[from * cols..], cols, width, cols);
    residual
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(changes.par_chunks(TASK_ROWS * width))
        .for_each_init(Vec::new, |memory, (residual, changes)| {
            let stride = product(isa, changes, width, &panels, memory);
            let rows = residual.chunks_exact_mut(cols).zip(memory.chunks_exact(stride));
            for (residual, product) in rows {
                for (j, (r, p)) in residual.iter_mut().zip(product).enumerate() {
                    if !(from..from + width).contains(&j) {
                        *r -= p;
                    }
                }
            }
        });
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Solves a symmetric positive definite system from its lower triangle by Cholesky; false if it is
/// singular. A trace of damping keeps blocks that are alike apart.
pub(super) fn solve(system: &mut [f64], right: &mut [f64]) -> bool {
    let n = right.len();
    let trace: f64 = (0..n).map(|i| system[i * n + i]).sum();
    if trace.is_nan() || trace <= 0.0 {
        return false;
    }
    for i in 0..n {
        system[i * n + i] += 1e-9 * trace / n as f64 + f64::MIN_POSITIVE;
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| system[i * n + k] * system[j * n + k]).sum();
            let rest = system[i * n + j] - sum;
            if i == j {
                if rest <= 0.0 {
                    return false;
                }
                system[i * n + i] = rest.sqrt();
            } else {
                system[i * n + j] = rest / system[j * n + j];
            }
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| system[i * n + k] * right[k]).sum();
        right[i] = (right[i] - sum) / system[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| system[k * n + i] * right[k]).sum();
        right[i] = (right[i] - sum) / system[i * n + i];
    }
    true
}
