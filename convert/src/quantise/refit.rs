//! After the block loop: scales in closed form for what the layer's output loses, then codes again,
//! in turn.
//!
//! Both go block by block, with everything outside the block as it is. With D = W − Q, a block needs
//! its columns of D·H (one product), and from there on only the diagonal block of H: for one row,
//! the scales change by δ with (Bᵀ H_bb B) δ = Bᵀ (D·H)_b, where B has a column for each set (three
//! regions, the salient set, its residual); then each weight in turn takes the best code. One round
//! over all blocks costs one product W·H; solving for the scales of all blocks of a row at once
//! costs five times that and is no better (`tests/bench/record/2026-11-21-layer-time.md`).

use rayon::prelude::*;
use stb_format::encoding::StbllmParts;
use stb_format::half::f16;
use stb_kernels::Panels;

use super::fit::solve;
use super::{Input, TASK_ROWS};
use crate::hessian::product;

/// Sets per block: three regions, the salient set, its residual.
const SETS: usize = 5;

/// Bytes that a refit of rows of `cols` columns takes, beside the layer itself: H again, as
/// operands of products, and its diagonal blocks.
pub(crate) fn memory(cols: u64, block: u64) -> u64 {
    cols * (cols + block) * 4
}

/// Refits scales, then `sweeps` times re-chooses signs and regions and refits again.
pub(super) fn refit(input: &Input<'_>, parts: &mut StbllmParts, sweeps: usize) {
    let (cols, h) = (input.cols, input.hessian.matrix());
    let block = |start: usize| {
        let end = cols.min(start + parts.spec.block());
        // H is symmetric: its rows are the columns that D is multiplied with.
        let mut columns = Panels::default();
        columns.pack(&h[start * cols..end * cols], cols);
        let diagonal = h[start * cols..end * cols].chunks_exact(cols).flat_map(|r| &r[start..end]);
        Block { start, columns, diagonal: diagonal.copied().collect(), width: end - start }
    };
    let blocks: Vec<Block> = (0..cols).step_by(parts.spec.block()).map(block).collect();
    let (numbers, salient) = (blocks.len() * SETS, &parts.salient[..]);
    parts
        .states
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(parts.negative.par_chunks_mut(TASK_ROWS * cols))
        .zip(parts.scales.par_chunks_mut(TASK_ROWS * numbers))
        .zip(input.weights.par_chunks(TASK_ROWS * cols))
        .for_each(|(((states, negative), scales), weights)| {
            let mut task = Task { cols, salient, states, negative, scales, rest: weights.to_vec() };
            task.subtract_values(&blocks);
            let mut residuals = Vec::new();
            for sweep in 0..=sweeps {
                for (index, block) in blocks.iter().enumerate() {
                    let stride =
                        product(input.isa, &task.rest, cols, &block.columns, &mut residuals);
                    for (r, residual) in residuals.chunks_exact_mut(stride).enumerate() {
                        let mut row = task.row(r, index, block, &mut residual[..block.width]);
                        row.refit_scales();
                        if sweep > 0 {
                            row.choose_codes();
                            row.refit_scales();
                        }
                    }
                }
            }
        });
}

/// Columns that share scales.
struct Block {
    start: usize,
    width: usize,
    /// H of these columns, to be multiplied with.
    columns: Panels,
    /// H_bb, [width, width].
    diagonal: Vec<f32>,
}

/// Some rows.
struct Task<'a> {
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

impl Task<'_> {
    /// From W to W − Q.
    fn subtract_values(&mut self, blocks: &[Block]) {
        let rows = self.rest.len() / self.cols;
        let mut residual = Vec::new();
        for (r, (index, block)) in
            (0..rows).flat_map(|r| blocks.iter().enumerate().map(move |b| (r, b)))
        {
            residual.resize(block.width, 0.0);
            let row = self.row(r, index, block, &mut residual);
            let scales = row.scales_f32();
            for c in 0..block.width {
                row.rest[c] -= row.value(&scales, c, row.states[c], row.negative[c]);
            }
        }
    }

    fn row<'b>(
        &'b mut self,
        r: usize,
        index: usize,
        block: &'b Block,
        residual: &'b mut [f32],
    ) -> Row<'b> {
        let numbers = self.scales.len() / (self.rest.len() / self.cols);
        let first = r * self.cols + block.start;
        let part = first..first + block.width;
        let scales = r * numbers + index * SETS;
        Row {
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
struct Row<'a> {
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
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

impl Row<'_> {
    fn scales_f32(&self) -> [f32; SETS] {
        std::array::from_fn(|k| self.scales[k].to_f32())
    }

    /// Sets that column `c` is in with this state, and its signs in them.
    fn members(&self, c: usize, state: u8, negative: bool) -> [Option<(usize, f32)>; 2] {
        let sign = if negative { -1.0 } else { 1.0 };
        match (state, self.salient[c]) {
            (0, _) => [None, None],
            (state, false) => [Some((usize::from(state) - 1, sign)), None],
            (state, true) => [Some((3, sign)), Some((4, if state == 2 { -1.0 } else { 1.0 }))],
        }
    }

    /// What column `c` is with this state.
    fn value(&self, scales: &[f32; SETS], c: usize, state: u8, negative: bool) -> f32 {
        let members = self.members(c, state, negative).into_iter().flatten();
        members.map(|(k, sign)| sign * scales[k]).sum()
    }

    /// The best scales for signs and regions as they are.
    fn refit_scales(&mut self) {
        let width = self.rest.len();
        // BᵀH, [sets, width].
        let mut lines = vec![0.0f32; SETS * width];
        let mut used = [false; SETS];
        let mut right = [0f64; SETS];
        for c in 0..width {
            let members = self.members(c, self.states[c], self.negative[c]);
            for (k, sign) in members.into_iter().flatten() {
                let h = &self.h[c * width..(c + 1) * width];
                add(&mut lines[k * width..(k + 1) * width], sign, h);
                right[k] += f64::from(sign * self.residual[c]);
                used[k] = true;
            }
        }
        let mut system = [0f64; SETS * SETS];
        for c in 0..width {
            let members = self.members(c, self.states[c], self.negative[c]);
            for (j, sign) in members.into_iter().flatten() {
                for k in 0..SETS {
                    system[k * SETS + j] += f64::from(sign * lines[k * width + c]);
                }
            }
        }
        for k in (0..SETS).filter(|k| !used[*k]) {
            // An empty set: its scale stays.
            system[k * SETS + k] = 1.0;
        }
        if !solve(&mut system, &mut right) {
            return;
        }
        for k in 0..SETS {
            let old = self.scales[k].to_f32();
            let new = f16::from_f64(f64::from(old) + right[k]);
            let change = new.to_f32() - old;
            if !new.is_finite() || change == 0.0 {
                continue;
            }
            self.scales[k] = new;
            add(self.residual, -change, &lines[k * width..(k + 1) * width]);
            for c in 0..width {
                let members = self.members(c, self.states[c], self.negative[c]);
                for (_, sign) in members.into_iter().flatten().filter(|(set, _)| *set == k) {
                    self.rest[c] -= sign * change;
                }
            }
        }
    }

    /// Coordinate descent: each kept weight in turn takes the sign and region, or the two signs,
    /// that minimise the output error with all others as they are.
    fn choose_codes(&mut self) {
        let width = self.rest.len();
        let scales = self.scales_f32();
        for c in (0..width).filter(|c| self.states[*c] != 0).collect::<Vec<_>>() {
            let h = &self.h[c * width..(c + 1) * width];
            let old = self.value(&scales, c, self.states[c], self.negative[c]);
            let target = old + self.residual[c] / h[c];
            let mut best = (f32::INFINITY, 0, false, 0.0);
            let states = if self.salient[c] { 1..=2 } else { 1..=3 };
            for (state, negative) in states.flat_map(|s| [(s, false), (s, true)]) {
                let value = self.value(&scales, c, state, negative);
                let distance = (value - target).abs();
                // A kept weight stays one: zeros are for the mask.
                if distance < best.0 && value != 0.0 {
                    best = (distance, state, negative, value);
                }
            }
            let (distance, state, negative, value) = best;
            let change = value - old;
            if distance.is_finite() && change != 0.0 {
                (self.states[c], self.negative[c]) = (state, negative);
                self.rest[c] -= change;
                add(self.residual, -change, h);
            }
        }
    }
}
