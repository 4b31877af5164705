//! The N:M sparse-sign encoding: first codes with error compensation group by group, then alternating
//! closed-form refits of the scales and exact re-choices of each group's code under the Hessian.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{Nm, NmParts};
use stb_format::half::f16;
use stb_runtime::Result;

use super::compensation::{Compensation, Propagation};
use super::fit::Fitting;
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds};
use super::tile_scales::{CANDIDATE_BITS, CANDIDATE_BLOCK, round_rows};
use crate::products::TASK_ROWS;

/// Options of the N:M quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NmOptions {
    /// Code, scale block and scale bits.
    pub spec: Nm,
    /// Rounds of re-choosing all codes and refitting all scales.
    pub sweeps: usize,
    /// Whether scales are fitted to the layer's output; otherwise the first estimate is kept.
    pub refit: bool,
}

/// Columns whose errors are spread over the rest of the matrix at once; a multiple of every group.
const BLOCK: usize = 128;

/// Codes and scales of a layer while they are optimized.
struct NmFit<'a> {
    input: &'a Input<'a>,
    fitting: Fitting<'a>,
    spec: Nm,
    groups: usize,
    blocks: usize,
    /// Columns per scale.
    span: usize,
    /// [rows, groups].
    codes: Vec<u16>,
    /// [rows, blocks]: the scales as stored, so that codes are chosen with rounded scales.
    scales: Vec<f32>,
    row_scales: Vec<f16>,
    block_codes: Vec<u8>,
}

impl NmOptions {
    /// The candidates of a budget.
    pub(crate) fn candidates() -> impl Iterator<Item = Self> {
        let all = [(1, 8), (1, 4), (2, 8), (2, 4)];
        let all = all
            .into_iter()
            .filter_map(|(n, m)| Nm::new(n, m, CANDIDATE_BITS, CANDIDATE_BLOCK, false));
        all.map(|spec| Self { spec, sweeps: 4, refit: true })
    }
}

impl LinearQuantizer for NmOptions {
    fn encoding(&self) -> Encoding {
        Encoding::Nm(self.spec)
    }

    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        // Codes of 16 bits; scales as initial value, logarithm and two moments.
        let block = if self.spec.block() == 0 { cols } else { self.spec.block() as u64 };
        rows * cols * 2 / self.spec.m() as u64 + rows * cols * 16 / block.max(1)
    }

    fn quantize(&self, input: &Input<'_>, _: Option<&Pruned>) -> Result<Packed> {
        quantize(input, self)
    }
}

/// Quantizes one linear layer.
fn quantize(input: &Input<'_>, options: &NmOptions) -> Result<Packed> {
    let mut seconds = Seconds::default();
    let clock = Instant::now();
    let spec = options.spec;
    let groups = input.cols.div_ceil(spec.m());
    let span = if spec.block() == 0 { input.cols } else { spec.block() };
    let blocks = input.cols.div_ceil(span);
    let mut fit = NmFit {
        input,
        fitting: Fitting::new(input)?,
        spec,
        groups,
        blocks,
        span,
        codes: vec![0; input.rows * groups],
        scales: vec![0.0; input.rows * blocks],
        row_scales: Vec::new(),
        block_codes: Vec::new(),
    };
    fit.choose_with_compensation()?;
    let target = fit.fitting.times_hessian(input.weights)?;
    if options.refit {
        fit.refit_scales(&target)?;
    }
    for _ in 0..options.sweeps {
        fit.sweep(&target)?;
        if options.refit {
            fit.refit_scales(&target)?;
        }
    }
    let parts = NmParts {
        spec,
        rows: input.rows,
        cols: input.cols,
        col_factors: Vec::new(),
        row_scales: fit.row_scales,
        block_codes: fit.block_codes,
        codes: fit.codes,
    };
    seconds.quantize = clock.elapsed().as_secs_f64();
    let payload = parts.pack();
    seconds.pack = clock.elapsed().as_secs_f64() - seconds.quantize;
    Ok(Packed { encoding: Encoding::Nm(spec), payload, salient: None, seconds })
}

impl NmFit<'_> {
    /// The first codes and scales, block by block and group by group: keeps the positions with the largest gain of
    /// each group and spreads its error over the later columns.
    fn choose_with_compensation(&mut self) -> Result<()> {
        let (input, spec, span) = (self.input, self.spec, self.span);
        let (groups, blocks) = (self.groups, self.blocks);
        let (cols, u, m) = (input.cols, &input.factor.u, &input.factor.m);
        let importance = input.factor.importance();
        let mut weights = input.weights.to_vec();
        let mode = Propagation::Solve;
        let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
        // A scale is estimated from its whole block, which may begin with the last of these columns.
        let ahead = if span < cols { BLOCK + span } else { BLOCK };
        for from in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - from);
            let mut errors = vec![0.0; input.rows * width];
            weights
                .par_chunks_exact_mut(cols)
                .zip(self.codes.par_chunks_exact_mut(groups))
                .zip(self.scales.par_chunks_exact_mut(blocks))
                .zip(errors.par_chunks_exact_mut(width))
                .with_min_len(TASK_ROWS)
                .for_each(|(((row, codes), scales), errors)| {
                    errors.copy_from_slice(&row[from..from + width]);
                    for start in (from..from + width).step_by(spec.m()) {
                        let end = (start + spec.m()).min(cols);
                        // The scale of a block is estimated when its first column is reached.
                        if start.is_multiple_of(span) {
                            let block = &row[start..cols.min(start + span)];
                            scales[start / span] = mean_of_largest(block, spec);
                        }
                        let scale = scales[start / span];
                        let h = &importance[start..end];
                        let code = code_of_largest_gain(&row[start..end], h, scale, spec);
                        codes[start / spec.m()] = code;
                        let mut error = [0.0f32; 8];
                        for (e, w) in error.iter_mut().zip(&row[start..end]) {
                            *e = *w;
                        }
                        for (position, negative) in spec.pattern(code).into_iter().flatten() {
                            if start + position < end {
                                let value = if negative { -scale } else { scale };
                                error[position] -= value;
                                errors[start + position - from] -= value;
                            }
                        }
                        // (W − Q)·M_gg, then spread inside the block.
                        let mut scaled = [0.0f32; 8];
                        for i in 0..end - start {
                            for j in i..end - start {
                                scaled[j] += error[i] * m[(start + i) * cols + start + j];
                            }
                        }
                        for (i, s) in scaled.iter().enumerate().take(end - start) {
                            let line = &u[(start + i) * cols..(start + i + 1) * cols];
                            for j in end..from + width {
                                row[j] -= s * line[j];
                            }
                        }
                    }
                });
            compensation.spread(&mut weights, &errors, from, width, ahead)?;
        }
        self.store_scales();
        Ok(())
    }

    /// Writes the signs of the kept weights of a row to `out`, zero elsewhere.
    fn signs(&self, row: usize, out: &mut [f32]) {
        out.fill(0.0);
        let codes = &self.codes[row * self.groups..(row + 1) * self.groups];
        for (code, out) in codes.iter().zip(out.chunks_mut(self.spec.m())) {
            for (position, negative) in self.spec.pattern(*code).into_iter().flatten() {
                if let Some(o) = out.get_mut(position) {
                    *o = if negative { -1.0 } else { 1.0 };
                }
            }
        }
    }

    /// The weights as stored, [rows, cols].
    fn weights(&self) -> Vec<f32> {
        let cols = self.input.cols;
        let mut out = vec![0.0; self.input.rows * cols];
        out.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| {
            self.signs(r, row);
            let scales = &self.scales[r * self.blocks..(r + 1) * self.blocks];
            for (block, scale) in row.chunks_mut(self.span).zip(scales) {
                block.iter_mut().for_each(|w| *w *= scale);
            }
        });
        out
    }

    /// The scales that minimize the output error for the present codes. `target` is W·H.
    fn refit_scales(&mut self, target: &[f32]) -> Result<()> {
        let cols = self.input.cols;
        let mut signs = vec![0.0; self.input.rows * cols];
        signs.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| self.signs(r, row));
        self.fitting.best_scales(&signs, self.span, target, &mut self.scales)?;
        self.scales.iter_mut().for_each(|scale| *scale = scale.max(0.0));
        self.store_scales();
        Ok(())
    }

    /// Rounds the scales to values that the file can store.
    fn store_scales(&mut self) {
        let bits = self.spec.scale_bits();
        (self.row_scales, self.block_codes) = round_rows(&mut self.scales, self.blocks, bits);
    }

    /// Coordinate descent: sets the code of each group in turn to the one that minimizes the output error with all
    /// other groups fixed. `target` is W·H.
    fn sweep(&mut self, target: &[f32]) -> Result<()> {
        let (rows, cols) = (self.input.rows, self.input.cols);
        let h = self.input.hessian.matrix();
        // (W − Q)·H, kept up to date.
        let mut residual = self.fitting.residual(&self.weights(), target, BLOCK)?;
        let (groups, blocks, span, spec) = (self.groups, self.blocks, self.span, self.spec);
        for from in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - from);
            let searches: Vec<GroupSearch> = (from..from + width)
                .step_by(spec.m())
                .map(|start| GroupSearch::new(spec, h, cols, start))
                .collect();
            let mut changes = vec![0.0; rows * width];
            residual
                .values
                .par_chunks_exact_mut(cols)
                .zip(self.codes.par_chunks_exact_mut(groups))
                .zip(self.scales.par_chunks_exact(blocks))
                .zip(changes.par_chunks_exact_mut(width))
                .with_min_len(TASK_ROWS)
                .for_each(|(((residual, codes), scales), changes)| {
                    for (search, start) in searches.iter().zip((from..).step_by(spec.m())) {
                        let code = &mut codes[start / spec.m()];
                        let scale = scales[start / span];
                        let end = start + search.width;
                        let change = search.improve(code, scale, &residual[start..end]);
                        for (i, c) in change.iter().enumerate().take(search.width) {
                            changes[start - from + i] = *c;
                            if *c != 0.0 {
                                let line = &h[(start + i) * cols..][from..from + width];
                                for (r, h) in residual[from..from + width].iter_mut().zip(line) {
                                    *r -= c * h;
                                }
                            }
                        }
                    }
                });
            residual.update(&changes, from)?;
        }
        Ok(())
    }
}

/// Kept positions and whether their signs are negative.
type NmPattern = [Option<(usize, bool)>; 2];

/// Finds the best code of one group of columns; shared by all rows.
struct GroupSearch {
    spec: Nm,
    /// Columns of the group.
    width: usize,
    /// H of the group, [8, 8].
    h: [[f32; 8]; 8],
    /// Codes with their patterns s and sᵀHs; a code and its negative share one entry.
    codes: Vec<(u16, NmPattern, f32)>,
}

impl GroupSearch {
    fn new(spec: Nm, hessian: &[f32], cols: usize, start: usize) -> Self {
        let width = spec.m().min(cols - start);
        let mut h = [[0.0; 8]; 8];
        for i in 0..width {
            for j in 0..width {
                h[i][j] = hessian[(start + i) * cols + start + j];
            }
        }
        // Codes with a positive first sign; the negative of a code only flips the linear term.
        let half = 1u16 << (spec.code_bits() - 1);
        let entry = |code: u16| {
            let pattern = spec.pattern(code);
            let inside = pattern.into_iter().flatten().all(|(p, _)| p < width);
            let quadratic = match pattern {
                [Some((i, _)), None] => h[i][i],
                [Some((i, a)), Some((j, b))] => {
                    let cross = 2.0 * h[i][j];
                    h[i][i] + h[j][j] + if a == b { cross } else { -cross }
                }
                _ => 0.0,
            };
            inside.then_some((code, pattern, quadratic))
        };
        Self { spec, width, h, codes: (0..half).filter_map(entry).collect() }
    }

    /// Replaces `code` by the best one; returns the change of the group's weights. `residual` is
    /// (W − Q)·H at the group's columns.
    fn improve(&self, code: &mut u16, scale: f32, residual: &[f32]) -> [f32; 8] {
        let mut present = [0.0f32; 8];
        for (position, negative) in self.spec.pattern(*code).into_iter().flatten() {
            present[position] = if negative { -scale } else { scale };
        }
        // The target of the group: the residual without the group's own contribution.
        let mut target = [0.0f32; 8];
        for i in 0..self.width {
            target[i] = residual[i];
            for j in 0..self.width {
                target[i] += present[j] * self.h[j][i];
            }
        }
        let mut best = (f32::INFINITY, *code);
        let sign_bit = 1 << (self.spec.code_bits() - 1);
        for (candidate, pattern, quadratic) in &self.codes {
            let mut linear = 0.0;
            for (position, negative) in pattern.iter().flatten() {
                linear += if *negative { -target[*position] } else { target[*position] };
            }
            let cost = scale * (scale * quadratic - 2.0 * linear.abs());
            if cost < best.0 {
                best = (cost, if linear < 0.0 { candidate | sign_bit } else { *candidate });
            }
        }
        *code = best.1;
        let mut change = [0.0f32; 8];
        for (position, negative) in self.spec.pattern(*code).into_iter().flatten() {
            if position < self.width {
                change[position] = if negative { -scale } else { scale };
            }
        }
        for (c, p) in change.iter_mut().zip(present) {
            *c -= p;
        }
        change
    }
}

/// A first scale for a block: the mean of the N largest magnitudes of each group.
fn mean_of_largest(block: &[f32], spec: Nm) -> f32 {
    let (mut sum, mut count) = (0.0, 0);
    for group in block.chunks(spec.m()) {
        let mut magnitudes = [0.0f32; 8];
        for (m, w) in magnitudes.iter_mut().zip(group) {
            *m = w.abs();
        }
        magnitudes.sort_unstable_by(|a, b| b.total_cmp(a));
        sum += magnitudes[..spec.n()].iter().sum::<f32>();
        count += spec.n().min(group.len());
    }
    sum / count.max(1) as f32
}

/// The code whose kept positions gain most: h (2|w|s − s²) for keeping w at scale s.
fn code_of_largest_gain(group: &[f32], importance: &[f32], scale: f32, spec: Nm) -> u16 {
    let gain = |k: usize| importance[k] * (2.0 * group[k].abs() - scale);
    let mut best: [Option<usize>; 2] = [None, None];
    for k in 0..group.len() {
        if best[0].is_none_or(|b| gain(k) > gain(b)) {
            best = [Some(k), best[0]];
        } else if best[1].is_none_or(|b| gain(k) > gain(b)) {
            best[1] = Some(k);
        }
    }
    let kept = |k: usize| (k, group[k] < 0.0);
    let first = kept(best[0].unwrap_or(0));
    let second = best[1].filter(|k| spec.n() == 2 && gain(*k) > 0.0).map(kept);
    spec.code(first, second).expect("positions inside the group")
}
