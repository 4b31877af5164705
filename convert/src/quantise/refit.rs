//! What follows the block loop where it is asked for: scales that minimise the error of the layer's
//! output for fixed signs and regions, and signs and regions re-chosen for fixed scales, in turn.
//!
//! For one row, Q = Bα with a basis vector per block and set (three regions, the salient set, its
//! residual), so α solves (BᵀHB) α = BᵀHw: the idea of the joint codes' refit, with five sets.

use rayon::prelude::*;
use stb_format::encoding::StbllmParts;
use stb_format::half::f16;
use stb_kernels::Panels;

use super::Input;
use super::nm::solve;
use crate::hessian::product;

/// Sets per block: three regions, the salient set, its residual.
const SETS: usize = 5;

/// Rows of a task: each has a system of its own in memory.
const ROWS: usize = 16;

/// Bytes that a refit of rows of `cols` columns takes at most, beside the layer itself.
pub(crate) fn memory(cols: u64, block: u64) -> u64 {
    let unknowns = cols.div_ceil(block) * SETS as u64;
    let systems = rayon::current_num_threads() as u64 * ROWS as u64 * unknowns * unknowns * 8;
    // H whole and by blocks, as operands of products.
    systems + cols * cols * 6
}

/// Refits scales, then `sweeps` times re-chooses signs and regions and refits again.
pub(super) fn refit(input: &Input<'_>, parts: &mut StbllmParts, sweeps: usize) {
    let mut whole = Panels::default();
    whole.pack(input.hessian.matrix(), input.cols);
    let span = parts.spec.block();
    // Rows of H of each block, up to the end of the block: systems are symmetric.
    let blocks: Vec<Panels> = (0..input.cols)
        .step_by(span)
        .map(|start| {
            let end = input.cols.min(start + span);
            let mut panels = Panels::default();
            let rows = &input.hessian.matrix()[start * input.cols..end * input.cols];
            panels.pack_transposed(rows, end, end - start, input.cols);
            panels
        })
        .collect();
    let fit = Fit { input, span, salient: parts.salient.clone(), whole, blocks };
    let (cols, numbers) = (input.cols, fit.blocks.len() * SETS);
    parts
        .states
        .par_chunks_mut(ROWS * cols)
        .zip(parts.negative.par_chunks_mut(ROWS * cols))
        .zip(parts.scales.par_chunks_mut(ROWS * numbers))
        .zip(input.weights.par_chunks(ROWS * cols))
        .for_each(|(((states, negative), scales), weights)| {
            let mut rows = Rows { weights, states, negative, scales };
            fit.scales(&mut rows);
            for _ in 0..sweeps {
                fit.sweep(&mut rows);
                fit.scales(&mut rows);
            }
        });
}

/// What is the same for all rows.
struct Fit<'a> {
    input: &'a Input<'a>,
    /// Columns per block.
    span: usize,
    salient: Vec<bool>,
    /// H.
    whole: Panels,
    blocks: Vec<Panels>,
}

/// Some rows.
struct Rows<'a> {
    weights: &'a [f32],
    states: &'a mut [u8],
    negative: &'a mut [bool],
    scales: &'a mut [f16],
}

impl Fit<'_> {
    /// Sets that column `c` is in with this state, and its signs in them.
    fn members(&self, c: usize, state: u8, negative: bool) -> [Option<(usize, f32)>; 2] {
        let sign = if negative { -1.0 } else { 1.0 };
        match (state, self.salient[c]) {
            (0, _) => [None, None],
            (state, false) => [Some((usize::from(state) - 1, sign)), None],
            (state, true) => [Some((3, sign)), Some((4, if state == 2 { -1.0 } else { 1.0 }))],
        }
    }

    /// Σ of `values` over each block and set, with signs.
    fn project(&self, values: &[f32], states: &[u8], negative: &[bool], out: &mut [f64]) {
        for (c, value) in values.iter().enumerate() {
            let first = c / self.span * SETS;
            for (set, sign) in self.members(c, states[c], negative[c]).into_iter().flatten() {
                out[first + set] += f64::from(sign * value);
            }
        }
    }

    /// The best scales for the signs and regions as they are.
    fn scales(&self, rows: &mut Rows<'_>) {
        let (isa, cols) = (self.input.isa, self.input.cols);
        let n = self.blocks.len() * SETS;
        let count = rows.weights.len() / cols;
        let mut systems = vec![0f64; count * n * n];
        let (mut part, mut out) = (Vec::new(), Vec::new());
        for (b, panels) in self.blocks.iter().enumerate() {
            let (start, end) = (b * self.span, cols.min((b + 1) * self.span));
            for set in 0..SETS {
                part.clear();
                part.resize(count * (end - start), 0.0f32);
                for (i, p) in part.iter_mut().enumerate() {
                    let (r, c) = (i / (end - start), start + i % (end - start));
                    let members =
                        self.members(c, rows.states[r * cols + c], rows.negative[r * cols + c]);
                    let own = members.into_iter().flatten().find(|(s, _)| *s == set);
                    *p = own.map_or(0.0, |(_, sign)| sign);
                }
                let stride = product(isa, &part, end - start, panels, &mut out);
                for (r, out) in out.chunks_exact(stride).enumerate() {
                    let row = r * cols..r * cols + end;
                    let line = (r * n + b * SETS + set) * n;
                    let (states, negative) = (&rows.states[row.clone()], &rows.negative[row]);
                    self.project(&out[..end], states, negative, &mut systems[line..line + n]);
                }
            }
        }
        let stride = product(isa, rows.weights, cols, &self.whole, &mut out);
        for (r, system) in systems.chunks_exact_mut(n * n).enumerate() {
            let row = r * cols..(r + 1) * cols;
            let target = &out[r * stride..r * stride + cols];
            let mut right = vec![0f64; n];
            self.project(target, &rows.states[row.clone()], &rows.negative[row], &mut right);
            for k in (0..n).filter(|k| system[k * n + k] <= 0.0).collect::<Vec<_>>() {
                // An empty set: any scale does.
                system[k * n + k] = 1.0;
                right[k] = 0.0;
            }
            if solve(system, &mut right) {
                for (scale, value) in rows.scales[r * n..(r + 1) * n].iter_mut().zip(right) {
                    let value = f16::from_f64(value);
                    if value.is_finite() {
                        *scale = value;
                    }
                }
            }
        }
    }

    /// Coordinate descent: each kept weight in turn takes the sign and region, or the two signs,
    /// that minimise the output error with all others as they are.
    fn sweep(&self, rows: &mut Rows<'_>) {
        let (isa, cols) = (self.input.isa, self.input.cols);
        let h = self.input.hessian.matrix();
        let n = self.blocks.len() * SETS;
        let mut values = vec![0.0f32; rows.weights.len()];
        for (i, value) in values.iter_mut().enumerate() {
            let (r, c) = (i / cols, i % cols);
            let members = self.members(c, rows.states[i], rows.negative[i]);
            let scales = &rows.scales[r * n + c / self.span * SETS..];
            *value = members.into_iter().flatten().map(|(k, s)| s * scales[k].to_f32()).sum();
        }
        let difference: Vec<f32> = rows.weights.iter().zip(&values).map(|(w, q)| w - q).collect();
        let mut residual = Vec::new();
        let stride = product(isa, &difference, cols, &self.whole, &mut residual);
        for (r, residual) in residual.chunks_exact_mut(stride).enumerate() {
            let residual = &mut residual[..cols];
            for c in 0..cols {
                let i = r * cols + c;
                if rows.states[i] == 0 {
                    continue;
                }
                let first = r * n + c / self.span * SETS;
                let scales: Vec<f32> =
                    rows.scales[first..first + SETS].iter().map(|s| s.to_f32()).collect();
                let target = values[i] + residual[c] / h[c * (cols + 1)];
                let mut best = (f32::INFINITY, 0, false, 0.0);
                let states = if self.salient[c] { 1..=2 } else { 1..=3 };
                for (state, negative) in states.flat_map(|s| [(s, false), (s, true)]) {
                    let members = self.members(c, state, negative).into_iter().flatten();
                    let value: f32 = members.map(|(k, s)| s * scales[k]).sum();
                    let distance = (value - target).abs();
                    // A kept weight stays one: zeros are for the mask.
                    if distance < best.0 && value != 0.0 {
                        best = (distance, state, negative, value);
                    }
                }
                let (distance, state, negative, value) = best;
                if distance.is_infinite() {
                    continue;
                }
                let change = value - values[i];
                if change != 0.0 {
                    (rows.states[i], rows.negative[i]) = (state, negative);
                    values[i] = value;
                    let line = &h[c * cols..(c + 1) * cols];
                    residual.iter_mut().zip(line).for_each(|(r, h)| *r -= change * h);
                }
            }
        }
    }
}
