//! The pruning pass (SparseGPT): chooses N:8 masks on compensated weights by any metric, and spreads the error of each
//! removed weight over the later columns.

use std::ops::Range;

use rayon::prelude::*;
use stb_runtime::Result;

use super::compensation::{Compensation, Propagation};
use super::metric::Scorer;
use super::quantizer::{Input, Pruned};
use crate::products::TASK_ROWS;

/// Columns whose errors are spread over the rest of the matrix at once.
const BLOCK: usize = 128;

/// Keeps `kept(width)` weights of each group of 8 columns.
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub fn prune_with_compensation(
    input: &Input<'_>,
    scorer: &Scorer,
    kept: impl Fn(usize) -> usize + Sync,
) -> Result<Pruned> {
    let cols = input.cols;
    let mut weights = input.weights.to_vec();
    let mut mask = vec![false; weights.len()];
    let mut errors = vec![0.0; input.rows * BLOCK.min(cols)];
    let mode = Propagation::Solve;
    let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
    for from in (0..cols).step_by(BLOCK) {
        let width = BLOCK.min(cols - from);
        errors.resize(input.rows * width, 0.0);
        weights
            .par_chunks_mut(TASK_ROWS * cols)
            .zip(mask.par_chunks_mut(TASK_ROWS * cols))
            .zip(errors.par_chunks_mut(TASK_ROWS * width))
            .enumerate()
            .for_each(|(task, ((weights, mask), errors))| {
                let rows = weights.chunks_exact_mut(cols).zip(mask.chunks_exact_mut(cols));
                for (i, ((row, mask), errors)) in
                    rows.zip(errors.chunks_exact_mut(width)).enumerate()
                {
                    let before = row[from..from + width].to_vec();
                    let at = task * TASK_ROWS + i;
                    prune_block(input, scorer, &kept, at, from..from + width, row, mask);
                    // W − Q with W before the pruning of this block, as `spread` expects.
                    for ((e, b), w) in errors.iter_mut().zip(&before).zip(&row[from..]) {
                        *e = b - w;
                    }
                }
            });
        compensation.spread(&mut weights, &errors, from, width, BLOCK)?;
    }
    Ok(Pruned { weights, mask })
}

/// Prunes `columns` of one row, one group after another.
fn prune_block(
    input: &Input<'_>,
    scorer: &Scorer,
    kept: &impl Fn(usize) -> usize,
    row_index: usize,
    columns: Range<usize>,
    row: &mut [f32],
    mask: &mut [bool],
) {
    let (cols, u) = (input.cols, &input.factor.u);
    let end = columns.end;
    for group in columns.step_by(8) {
        let size = 8.min(end - group);
        let part = group..group + size;
        scorer.select(row_index, group, &row[part.clone()], kept(size), &mut mask[part.clone()]);
        for col in part {
            if mask[col] {
                continue;
            }
            let line = &u[col * cols..(col + 1) * cols];
            let error = row[col] / line[col];
            for j in col + 1..end {
                row[j] -= error * line[j];
            }
            row[col] = 0.0;
        }
    }
}

/// Masks the weights without compensation.
#[must_use]
pub fn prune_plain(
    input: &Input<'_>,
    scorer: &Scorer,
    kept: impl Fn(usize) -> usize + Sync,
) -> Pruned {
    let cols = input.cols;
    let mut weights = input.weights.to_vec();
    let mut mask = vec![false; weights.len()];
    let rows = weights.par_chunks_exact_mut(cols).zip(mask.par_chunks_exact_mut(cols));
    rows.enumerate().for_each(|(r, (row, mask))| {
        for (g, (group, mask)) in row.chunks_mut(8).zip(mask.chunks_mut(8)).enumerate() {
            scorer.select(r, 8 * g, group, kept(group.len()), mask);
            for (w, keep) in group.iter_mut().zip(mask) {
                if !*keep {
                    *w = 0.0;
                }
            }
        }
    });
    Pruned { weights, mask }
}
