//! The refit after the block loop: alternates between scales that minimize the error of the layer's output in closed
//! form and re-choosing codes.
//!
//! Both run block by block with everything outside the block fixed. With D = W − Q, a block needs its columns of D·H
//! (one product) and the diagonal block of H. For one row, the scales change by δ with
//! (Bᵀ H_bb B) δ = Bᵀ (D·H)_b, where B has a column for each set (three regions, the salient set, its residual); then
//! each weight in turn takes the best code. One round over all blocks costs one product W·H. Solving for the scales of
//! all blocks of a row at once costs five times as much and is no better.

use rayon::prelude::*;
use stb_format::encoding::StbllmParts;
use stb_format::half::f16;
use stb_kernels::Panels;
use stb_runtime::Result;

use super::fit::{DeviceError, Fitting, solve};
use super::quantizer::Input;
use crate::products::{TASK_ROWS, product};

/// Sets per block: three regions, the salient set, its residual.
const SETS: usize = 5;

/// Bytes that a refit of rows of `cols` columns needs besides the layer itself: H packed for products, and its
/// diagonal blocks.
pub(crate) fn memory(cols: u64, block: u64) -> u64 {
    cols * (cols + block) * 4
}

/// Refits scales, then `sweeps` times re-chooses signs and regions and refits again.
pub(super) fn refit(input: &Input<'_>, parts: &mut StbllmParts, sweeps: usize) -> Result<()> {
    let (cols, h) = (input.cols, input.hessian.matrix());
    let fitting = Fitting::new(input)?;
    let block = |start: usize| {
        let end = cols.min(start + parts.spec.block());
        // H is symmetric: these rows are its columns.
        let mut columns = Panels::default();
        if input.compute.accelerator.is_none() {
            columns.pack(&h[start * cols..end * cols], cols);
        }
        let diagonal = h[start * cols..end * cols].chunks_exact(cols).flat_map(|r| &r[start..end]);
        RefitBlock { start, columns, diagonal: diagonal.copied().collect(), width: end - start }
    };
    let blocks: Vec<RefitBlock> = (0..cols).step_by(parts.spec.block()).map(block).collect();
    let (numbers, salient) = (blocks.len() * SETS, &parts.salient[..]);
    let tasks = parts
        .states
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(parts.negative.par_chunks_mut(TASK_ROWS * cols))
        .zip(parts.scales.par_chunks_mut(TASK_ROWS * numbers))
        .zip(input.weights.par_chunks(TASK_ROWS * cols))
        .map(|(((states, negative), scales), weights)| {
            let mut task =
                RefitTask { cols, salient, states, negative, scales, rest: weights.to_vec() };
            task.subtract_values(&blocks);
            task
        });
    let isa = input.compute.isa;
    let Some(device) = fitting.on_device() else {
        tasks.for_each_init(Vec::new, |residuals, mut task| {
            for (sweep, (index, block)) in steps(sweeps, &blocks) {
                let stride = product(isa, &task.rest, cols, &block.columns, residuals);
                isa.compiled(
                    #[inline(always)]
                    || task.improve(index, block, residuals, stride, sweep > 0),
                );
            }
        });
        return Ok(());
    };
    let mut tasks: Vec<RefitTask> = tasks.collect();
    let whole: Vec<f32> = tasks.iter().flat_map(|task| &task.rest).copied().collect();
    let mut rest = DeviceError::new(device, &whole, cols)?;
    drop(whole);
    // On a device: all rows at once, so that products are large.
    for (sweep, (index, block)) in steps(sweeps, &blocks) {
        let (start, width) = (block.start, block.width);
        let mut residuals = rest.times_columns(start, width)?;
        let parts: Vec<Vec<f32>> = tasks
            .par_iter_mut()
            .zip(residuals.par_chunks_mut(TASK_ROWS * width))
            .map(|(task, residuals)| {
                isa.compiled(
                    #[inline(always)]
                    || task.improve(index, block, residuals, width, sweep > 0),
                );
                let rows = task.rest.chunks_exact(cols);
                rows.flat_map(|row| &row[start..start + width]).copied().collect()
            })
            .collect();
        rest.replace(&parts.concat(), start, width)?;
    }
    Ok(())
}

/// The sequence of block updates: all blocks for scales only (sweep 0), then all blocks once per sweep.
fn steps(
    sweeps: usize,
    blocks: &[RefitBlock],
) -> impl Iterator<Item = (usize, (usize, &RefitBlock))> {
    (0..=sweeps).flat_map(|sweep| blocks.iter().enumerate().map(move |block| (sweep, block)))
}

/// Columns that share scales.
struct RefitBlock {
    start: usize,
    width: usize,
    /// The columns of H for the product.
    columns: Panels,
    /// H_bb, [width, width].
    diagonal: Vec<f32>,
}

/// A chunk of rows, for one thread.
struct RefitTask<'a> {
    cols: usize,
    /// Whether each column is salient, `[cols]`.
    salient: &'a [bool],
    /// [rows, cols].
    states: &'a mut [u8],
    /// [rows, cols].
    negative: &'a mut [bool],
    /// [rows, blocks, sets].
    scales: &'a mut [f16],
    /// W − Q, [rows, cols].
    rest: Vec<f32>,
}

impl RefitTask<'_> {
    /// Turns W into W − Q.
    fn subtract_values(&mut self, blocks: &[RefitBlock]) {
        let rows = self.rest.len() / self.cols;
        let mut residual = Vec::new();
        for (r, (index, block)) in
            (0..rows).flat_map(|r| blocks.iter().enumerate().map(move |b| (r, b)))
        {
            residual.resize(block.width, 0.0);
            let row = self.row(r, index, block, &mut residual);
            let values = row.values();
            for c in 0..block.width {
                row.rest[c] -= row.value(&values, c);
            }
        }
    }

    /// Refits the scales of a block in all rows; with `choose`, re-chooses its codes and refits again. `residuals` are
    /// (W − Q)·H of the block, [rows, stride].
    #[inline(always)]
    fn improve(
        &mut self,
        index: usize,
        block: &RefitBlock,
        residuals: &mut [f32],
        stride: usize,
        choose: bool,
    ) {
        let mut scratch = RefitScratch::default();
        for (r, residual) in residuals.chunks_exact_mut(stride).enumerate() {
            let mut row = self.row(r, index, block, &mut residual[..block.width]);
            row.refit_scales(&mut scratch);
            if choose {
                row.choose_codes(&mut scratch);
                row.refit_scales(&mut scratch);
            }
        }
    }

    #[inline(always)]
    fn row<'b>(
        &'b mut self,
        r: usize,
        index: usize,
        block: &'b RefitBlock,
        residual: &'b mut [f32],
    ) -> RefitRow<'b> {
        let numbers = self.scales.len() / (self.rest.len() / self.cols);
        let first = r * self.cols + block.start;
        let part = first..first + block.width;
        let scales = r * numbers + index * SETS;
        RefitRow {
            h: &block.diagonal,
            salient: &self.salient[block.start..block.start + block.width],
            states: &mut self.states[part.clone()],
            negative: &mut self.negative[part.clone()],
            rest: &mut self.rest[part],
            scales: &mut self.scales[scales..scales + SETS],
            residual,
        }
    }
}

/// One row of a block.
struct RefitRow<'a> {
    /// H_bb.
    h: &'a [f32],
    salient: &'a [bool],
    states: &'a mut [u8],
    negative: &'a mut [bool],
    /// W − Q.
    rest: &'a mut [f32],
    scales: &'a mut [f16],
    /// (W − Q)·H.
    residual: &'a mut [f32],
}

/// `y += a·x`.
#[inline(always)]
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// A nonzero of B: the sign of one column in one set.
#[derive(Clone, Copy, Default)]
struct SignEntry {
    column: usize,
    set: usize,
    sign: f32,
}

/// Scratch for one row at a time.
#[derive(Default)]
struct RefitScratch {
    /// The nonzeros of B by column; salient columns have two.
    entries: Vec<SignEntry>,
    /// BᵀH, [sets, width].
    lines: Vec<f32>,
}

/// Codes of a weight: three states, each with two signs.
const CODES: usize = 6;

impl RefitRow<'_> {
    /// The values by code, 2·(state − 1) + negative, for columns that are not salient and for salient ones. NaN for
    /// codes that do not exist, and for zero values: a kept weight must not become zero, which only the mask may.
    #[inline(always)]
    fn values(&self) -> [[f32; CODES]; 2] {
        let [d, i, p, a, b] = std::array::from_fn(|k| self.scales[k].to_f32());
        let values = [[d, -d, i, -i, p, -p], [a + b, b - a, a - b, -a - b, f32::NAN, f32::NAN]];
        values.map(|codes| codes.map(|v| if v == 0.0 { f32::NAN } else { v }))
    }

    /// The present value of column `c`.
    #[inline(always)]
    fn value(&self, values: &[[f32; CODES]; 2], c: usize) -> f32 {
        let code = 2 * usize::from(self.states[c]) + usize::from(self.negative[c]);
        // Zero for pruned weights (state 0) and for codes whose value is zero.
        let value = code.checked_sub(2).map_or(0.0, |k| values[usize::from(self.salient[c])][k]);
        if value.is_nan() { 0.0 } else { value }
    }

    /// Lists the nonzeros of B. Branch-free, because kept weights are unpredictable.
    #[inline(always)]
    fn list_entries(&self, entries: &mut Vec<SignEntry>) {
        let width = self.rest.len();
        entries.resize(2 * width, SignEntry::default());
        let mut count = 0;
        for column in 0..width {
            let (state, salient) = (self.states[column], self.salient[column]);
            let sign = if self.negative[column] { -1.0 } else { 1.0 };
            let set = if salient { 3 } else { usize::from(state.saturating_sub(1)) };
            entries[count] = SignEntry { column, set, sign };
            count += usize::from(state != 0);
            let sign = if state == 2 { -1.0 } else { 1.0 };
            entries[count] = SignEntry { column, set: 4, sign };
            count += usize::from(state != 0 && salient);
        }
        entries.truncate(count);
    }

    /// Replaces the scales by the best ones for the present signs and regions.
    #[inline(always)]
    fn refit_scales(&mut self, scratch: &mut RefitScratch) {
        let width = self.rest.len();
        let RefitScratch { entries, lines } = scratch;
        self.list_entries(entries);
        lines.clear();
        lines.resize(SETS * width, 0.0);
        let mut used = [false; SETS];
        let mut right = [0f64; SETS];
        for SignEntry { column, set, sign } in entries.iter().copied() {
            let h = &self.h[column * width..(column + 1) * width];
            add(&mut lines[set * width..(set + 1) * width], sign, h);
            right[set] += f64::from(sign * self.residual[column]);
            used[set] = true;
        }
        let mut system = [0f64; SETS * SETS];
        for SignEntry { column, set, sign } in entries.iter().copied() {
            for k in 0..SETS {
                system[k * SETS + set] += f64::from(sign * lines[k * width + column]);
            }
        }
        for k in (0..SETS).filter(|k| !used[*k]) {
            // The scale of an empty set does not change.
            system[k * SETS + k] = 1.0;
        }
        if !solve(&mut system, &mut right) {
            return;
        }
        let mut changes = [0.0; SETS];
        for k in 0..SETS {
            let old = self.scales[k].to_f32();
            let new = f16::from_f64(f64::from(old) + right[k]);
            let change = new.to_f32() - old;
            if new.is_finite() && change != 0.0 {
                (self.scales[k], changes[k]) = (new, change);
                add(self.residual, -change, &lines[k * width..(k + 1) * width]);
            }
        }
        for SignEntry { column, set, sign } in entries.iter().copied() {
            self.rest[column] -= sign * changes[set];
        }
    }

    /// Coordinate descent: each kept weight in turn takes the sign and region, or the two signs, that minimize the
    /// output error with all others fixed.
    #[inline(always)]
    fn choose_codes(&mut self, scratch: &mut RefitScratch) {
        let width = self.rest.len();
        let values = self.values();
        self.list_entries(&mut scratch.entries);
        for c in scratch.entries.iter().filter(|e| e.set < 4).map(|e| e.column) {
            let h = &self.h[c * width..(c + 1) * width];
            let old = self.value(&values, c);
            let target = old + self.residual[c] / h[c];
            let mut best = (f32::INFINITY, 0, 0.0);
            for (code, value) in values[usize::from(self.salient[c])].into_iter().enumerate() {
                let distance = (value - target).abs();
                if distance < best.0 {
                    best = (distance, code, value);
                }
            }
            let (distance, code, value) = best;
            let change = value - old;
            if distance.is_finite() && change != 0.0 {
                (self.states[c], self.negative[c]) = (code as u8 / 2 + 1, code % 2 == 1);
                self.rest[c] -= change;
                add(self.residual, -change, h);
            }
        }
    }
}
