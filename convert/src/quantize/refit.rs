//! After the block loop: scales that minimize the error of the layer's output in closed form, then codes again, in
//! turn.
//!
//! Both go block by block, with everything outside the block as it is. With D = W − Q, a block needs
//! its columns of D·H (one product), and from there on only the diagonal block of H: for one row,
//! the scales change by δ with (Bᵀ H_bb B) δ = Bᵀ (D·H)_b, where B has a column for each set (three
//! regions, the salient set, its residual); then each weight in turn takes the best code. One round
//! over all blocks costs one product W·H. Solving for the scales of all blocks of a row at once costs five times
//! that and is no better.

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

/// Bytes that a refit of rows of `cols` columns takes, beside the layer itself: H again, as
/// operands of products, and its diagonal blocks.
pub(crate) fn memory(cols: u64, block: u64) -> u64 {
    cols * (cols + block) * 4
}

/// Refits scales, then `sweeps` times re-chooses signs and regions and refits again.
pub(super) fn refit(input: &Input<'_>, parts: &mut StbllmParts, sweeps: usize) -> Result<()> {
    let (cols, h) = (input.cols, input.hessian.matrix());
    let fitting = Fitting::new(input)?;
    let block = |start: usize| {
        let end = cols.min(start + parts.spec.block());
        // H is symmetric: its rows are the columns that D is multiplied with.
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
    let Some(on) = fitting.on_device() else {
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
    let mut rest = DeviceError::new(on, &whole, cols)?;
    drop(whole);
    // The same with all rows at once, their products on the device.
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

/// All blocks, first for scales alone, then as many times as there are sweeps.
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
    /// H of these columns, to be multiplied with.
    columns: Panels,
    /// H_bb, [width, width].
    diagonal: Vec<f32>,
}

/// Some rows, for one thread.
struct RefitTask<'a> {
    cols: usize,
    /// Which columns are salient, cols.
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
    /// From W to W − Q.
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

    /// Refits the scales of a block in all rows; if `choose`, re-chooses its codes and refits again.
    /// `residuals` are (W − Q)·H of the block, a row every `stride`.
    #[inline(always)]
    fn improve(
        &mut self,
        index: usize,
        block: &RefitBlock,
        residuals: &mut [f32],
        stride: usize,
        choose: bool,
    ) {
        let mut memory = RefitScratch::default();
        for (r, residual) in residuals.chunks_exact_mut(stride).enumerate() {
            let mut row = self.row(r, index, block, &mut residual[..block.width]);
            row.refit_scales(&mut memory);
            if choose {
                row.choose_codes(&mut memory);
                row.refit_scales(&mut memory);
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

/// One sign of one column: a 1 or −1 of B.
#[derive(Clone, Copy, Default)]
struct SignEntry {
    column: usize,
    set: usize,
    sign: f32,
}

/// Reusable memory of rows.
#[derive(Default)]
struct RefitScratch {
    /// All ones of B by column; salient columns have two.
    entries: Vec<SignEntry>,
    /// BᵀH, [sets, width].
    lines: Vec<f32>,
}

/// What is tried for a column: each state with a plus and with a minus sign.
const CODES: usize = 6;

impl RefitRow<'_> {
    /// Value of a column that is salient or not by its code, 2·(state − 1) + negative. NaN where there
    /// is no such code, or where it is zero: a kept weight stays one, zeros are for the mask.
    #[inline(always)]
    fn values(&self) -> [[f32; CODES]; 2] {
        let [d, i, p, a, b] = std::array::from_fn(|k| self.scales[k].to_f32());
        let values = [[d, -d, i, -i, p, -p], [a + b, b - a, a - b, -a - b, f32::NAN, f32::NAN]];
        values.map(|codes| codes.map(|v| if v == 0.0 { f32::NAN } else { v }))
    }

    /// What column `c` is now.
    #[inline(always)]
    fn value(&self, values: &[[f32; CODES]; 2], c: usize) -> f32 {
        let code = 2 * usize::from(self.states[c]) + usize::from(self.negative[c]);
        // Of state 0, and zero by its scales: no code.
        let value = code.checked_sub(2).map_or(0.0, |k| values[usize::from(self.salient[c])][k]);
        if value.is_nan() { 0.0 } else { value }
    }

    /// Lists B. Nothing is branched on: which weights are kept cannot be predicted.
    #[inline(always)]
    fn list(&self, entries: &mut Vec<SignEntry>) {
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

    /// The best scales for signs and regions as they are.
    #[inline(always)]
    fn refit_scales(&mut self, memory: &mut RefitScratch) {
        let width = self.rest.len();
        let RefitScratch { entries, lines } = memory;
        self.list(entries);
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
            // An empty set: its scale stays.
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

    /// Coordinate descent: each kept weight in turn takes the sign and region, or the two signs,
    /// that minimize the output error with all others as they are.
    #[inline(always)]
    fn choose_codes(&mut self, memory: &mut RefitScratch) {
        let width = self.rest.len();
        let values = self.values();
        self.list(&mut memory.entries);
        for c in memory.entries.iter().filter(|e| e.set < 4).map(|e| e.column) {
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
