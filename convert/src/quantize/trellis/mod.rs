//! The trellis encoding: streams with error compensation unit by unit, then alternating closed-form refits of the scales
//! and searches for better streams under the Hessian.

mod col_factors;
mod metric;
mod tables;
#[cfg(test)]
mod tests;

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::trellis::{STEP_COLS, window};
use stb_format::encoding::{Trellis, TrellisParts, TrellisRate};
use stb_format::half::f16;
use stb_kernels::ops::trellis::{COLS, ROWS, TrellisSearch, TrellisValues};
use stb_runtime::Result;

use self::col_factors::ScaledInput;
use self::metric::{UnitMetric, unit_error, unit_target};
use self::tables::{RateTables, tables_of};
use super::compensation::{Compensation, Propagation};
use super::fit::Fitting;
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds};
use super::tile_scales::{CANDIDATE_BITS, CANDIDATE_BLOCK, round_rows};
use crate::hessian::Factor;

/// Options of the trellis quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrellisOptions {
    /// Rate, scale block, scale bits and whether columns have factors.
    pub spec: Trellis,
    /// Rounds of searching all streams again and refitting all scales.
    pub sweeps: usize,
}

/// Columns whose errors are spread over the rest of the matrix at once; a multiple of every unit.
const BLOCK: usize = 128;

/// Streams and scales of a layer while they are optimized.
struct TrellisFit<'a> {
    input: &'a Input<'a>,
    fitting: Fitting<'a>,
    spec: Trellis,
    rate: &'static RateTables,
    values: TrellisValues,
    units: usize,
    blocks: usize,
    /// Columns per scale.
    span: usize,
    /// [tiles, units] streams.
    streams: Vec<u8>,
    /// [rows, blocks]: the scales as stored, so that streams are chosen with rounded scales.
    scales: Vec<f32>,
    row_scales: Vec<f16>,
    block_codes: Vec<u8>,
}

impl TrellisOptions {
    /// The candidates of a budget, with or without column factors.
    pub(crate) fn candidates(col_factors: bool) -> impl Iterator<Item = Self> {
        TrellisRate::ALL.iter().filter_map(move |rate| {
            let (bits, weights) = (rate.step_bits() as u8, rate.step_weights() as u8);
            let spec = Trellis::new(bits, weights, CANDIDATE_BITS, CANDIDATE_BLOCK)?;
            Some(Self { spec: spec.with_col_factors(col_factors), sweeps: 2 })
        })
    }
}

impl TrellisOptions {
    /// The candidate of 2 bits per weight without column factors, then with them.
    pub(crate) fn with_and_without_col_factors() -> Option<[Self; 2]> {
        let spec = Trellis::new(2, 1, CANDIDATE_BITS, CANDIDATE_BLOCK)?;
        Some([false, true].map(|factors| Self { spec: spec.with_col_factors(factors), sweeps: 2 }))
    }
}

impl LinearQuantizer for TrellisOptions {
    fn encoding(&self) -> Encoding {
        Encoding::Trellis(self.spec)
    }

    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        // Weights of 8 bits; scales as initial value, logarithm and two moments.
        let block = if self.spec.block() == 0 { cols } else { self.spec.block() as u64 };
        rows * cols + rows * cols * 16 / block.max(1)
    }

    /// The Hessian and its factors, scaled.
    fn scratch_memory(&self, cols: u64) -> u64 {
        if self.spec.has_col_factors() { 3 * 4 * cols * cols } else { 0 }
    }

    fn quantize(&self, input: &Input<'_>, _: Option<&Pruned>) -> Result<Packed> {
        quantize(input, self)
    }
}

/// Quantizes one linear layer.
fn quantize(input: &Input<'_>, options: &TrellisOptions) -> Result<Packed> {
    let mut seconds = Seconds::default();
    let clock = Instant::now();
    let spec = options.spec;
    let scaled = spec.has_col_factors().then(|| ScaledInput::new(input));
    let input = &scaled.as_ref().map_or(*input, |scaled| scaled.input(input));
    let units = input.cols.div_ceil(spec.unit_cols());
    let span = if spec.block() == 0 { input.cols } else { spec.block() };
    let blocks = input.cols.div_ceil(span);
    let rate = tables_of(spec);
    let mut fit = TrellisFit {
        input,
        fitting: Fitting::new(input)?,
        spec,
        rate,
        values: TrellisValues::new(spec, rate.tables),
        units,
        blocks,
        span,
        streams: vec![0; input.rows.div_ceil(ROWS) * units * spec.unit_bytes()],
        scales: vec![0.0; input.rows * blocks],
        row_scales: Vec::new(),
        block_codes: Vec::new(),
    };
    fit.choose_with_compensation()?;
    let target = fit.fitting.times_hessian(input.weights)?;
    fit.refit_scales(&target)?;
    for _ in 0..options.sweeps {
        fit.sweep(&target)?;
        fit.refit_scales(&target)?;
    }
    let parts = TrellisParts {
        spec,
        rows: input.rows,
        cols: input.cols,
        tables: rate.tables.to_vec(),
        col_factors: scaled.as_ref().map_or_else(Vec::new, |scaled| scaled.factors.clone()),
        row_scales: fit.row_scales,
        block_codes: fit.block_codes,
        streams: fit.streams,
    };
    seconds.quantize = clock.elapsed().as_secs_f64();
    let payload = parts.pack();
    seconds.pack = clock.elapsed().as_secs_f64() - seconds.quantize;
    Ok(Packed { encoding: Encoding::Trellis(spec), payload, salient: None, seconds })
}

/// Scratch of a thread.
#[derive(Default)]
struct Scratch {
    search: TrellisSearch,
    stream: Vec<u8>,
}

impl TrellisFit<'_> {
    /// The units of columns `from..from + width` with their metrics: `s` is the matrix of which each unit takes a part.
    fn metrics(
        &self,
        from: usize,
        width: usize,
        s: impl Fn(usize, usize, usize) -> f64,
    ) -> Vec<(usize, UnitMetric)> {
        let (cols, step_weights) = (self.spec.unit_cols(), self.spec.step_weights());
        let starts = (from..from + width).step_by(cols);
        let metric = |start: usize| {
            let inside = cols.min(self.input.cols - start);
            (start, UnitMetric::new(|i, j| s(start, i, j), inside, cols, step_weights))
        };
        starts.map(metric).collect()
    }

    /// The first streams and scales, block by block and unit by unit; the error of each unit is spread over the later
    /// columns.
    fn choose_with_compensation(&mut self) -> Result<()> {
        let (input, spec, span, blocks) = (self.input, self.spec, self.span, self.blocks);
        let (cols, m) = (input.cols, &input.factor.m);
        let (unit_cols, unit_bytes) = (spec.unit_cols(), spec.unit_bytes());
        let (isa, step_weights) = (input.compute.isa, spec.step_weights());
        let mut weights = input.weights.to_vec();
        let mode = Propagation::Solve;
        let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
        // A scale is estimated from its whole block, which may begin with the last of these columns.
        let ahead = if span < cols { BLOCK + span } else { BLOCK };
        let deviation = self.rate.deviation;
        for from in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - from);
            // The error of a unit after the later columns have been adjusted: S = M Mᵀ with its part of M.
            let metrics = self.metrics(from, width, |start, i, j| {
                let at = |i: usize, k: usize| f64::from(m[(start + i) * cols + start + k]);
                let inside = unit_cols.min(cols - start);
                (i.max(j)..inside).map(|k| at(i, k) * at(j, k)).sum()
            });
            let mut errors = vec![0.0; input.rows * width];
            let values = &self.values;
            weights
                .par_chunks_mut(ROWS * cols)
                .zip(self.streams.par_chunks_exact_mut(self.units * unit_bytes))
                .zip(self.scales.par_chunks_mut(ROWS * blocks))
                .zip(errors.par_chunks_mut(ROWS * width))
                .for_each_init(Scratch::default, |scratch, (((rows, streams), scales), errors)| {
                    for (start, metric) in &metrics {
                        let (start, end) = (*start, cols.min(start + unit_cols));
                        if start.is_multiple_of(span) {
                            let lines =
                                rows.chunks_exact(cols).zip(scales.chunks_exact_mut(blocks));
                            for (row, scales) in lines {
                                let block = &row[start..cols.min(start + span)];
                                scales[start / span] = root_mean_square(block) / deviation;
                            }
                        }
                        let scale = |r: usize| scales[r * blocks + start / span];
                        let count = rows.len() / cols;
                        let target = unit_target(count, end - start, step_weights, scale, |r| {
                            row_part(rows, cols, r, start, end)
                        });
                        let unit = start / unit_cols;
                        let stream = &mut streams[unit * unit_bytes..][..unit_bytes];
                        scratch.search.run(isa, values, &metric.of_search, &target, stream);
                        for r in 0..count {
                            let row = &mut rows[r * cols..][..cols];
                            let found = unit_row(values, stream, spec, r);
                            let error = &mut errors[r * width..][start - from..end - from];
                            for (k, e) in error.iter_mut().enumerate() {
                                *e = row[start + k] - found[k] * scale(r);
                            }
                            spread_error(error, row, input.factor, start, from + width);
                        }
                    }
                });
            compensation.spread(&mut weights, &errors, from, width, ahead)?;
        }
        self.store_scales();
        Ok(())
    }

    /// The weights of the streams in units of the scale, [rows, cols].
    fn units(&self) -> Vec<f32> {
        let (cols, spec) = (self.input.cols, self.spec);
        let (unit_cols, unit_bytes) = (spec.unit_cols(), spec.unit_bytes());
        let mut out = vec![0.0; self.input.rows * cols];
        out.par_chunks_mut(ROWS * cols)
            .zip(self.streams.par_chunks_exact(self.units * unit_bytes))
            .for_each(|(rows, streams)| {
                for (r, row) in rows.chunks_exact_mut(cols).enumerate() {
                    let units = row.chunks_mut(unit_cols).zip(streams.chunks_exact(unit_bytes));
                    for (row, stream) in units {
                        let found = unit_row(&self.values, stream, spec, r);
                        row.copy_from_slice(&found[..row.len()]);
                    }
                }
            });
        out
    }

    /// The weights as stored, [rows, cols].
    fn weights(&self) -> Vec<f32> {
        let mut out = self.units();
        out.par_chunks_exact_mut(self.input.cols)
            .zip(self.scales.par_chunks_exact(self.blocks))
            .for_each(|(row, scales)| {
                for (block, scale) in row.chunks_mut(self.span).zip(scales) {
                    block.iter_mut().for_each(|w| *w *= scale);
                }
            });
        out
    }

    /// The scales that minimize the output error for the present streams. `target` is W·H.
    fn refit_scales(&mut self, target: &[f32]) -> Result<()> {
        let units = self.units();
        self.fitting.best_scales(&units, self.span, target, &mut self.scales)?;
        self.scales.iter_mut().for_each(|scale| *scale = scale.max(0.0));
        self.store_scales();
        Ok(())
    }

    /// Rounds the scales to values that the file can store.
    fn store_scales(&mut self) {
        let bits = self.spec.scale_bits();
        (self.row_scales, self.block_codes) = round_rows(&mut self.scales, self.blocks, bits);
    }

    /// Coordinate descent: searches the stream of each unit in turn with all other units fixed, and keeps it if the output
    /// error falls. `target` is W·H.
    fn sweep(&mut self, target: &[f32]) -> Result<()> {
        let (input, spec, blocks) = (self.input, self.spec, self.blocks);
        let cols = input.cols;
        let (unit_cols, unit_bytes) = (spec.unit_cols(), spec.unit_bytes());
        let h = input.hessian.matrix();
        // (W − Q)·H, kept up to date.
        let mut residual = self.fitting.residual(&self.weights(), target, BLOCK)?;
        for from in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - from);
            let metrics = self
                .metrics(from, width, |start, i, j| f64::from(h[(start + i) * cols + start + j]));
            let search = UnitSearch { input, spec, values: &self.values, span: self.span, blocks };
            let mut changes = vec![0.0; input.rows * width];
            residual
                .values
                .par_chunks_mut(ROWS * cols)
                .zip(self.streams.par_chunks_exact_mut(self.units * unit_bytes))
                .zip(self.scales.par_chunks(ROWS * blocks))
                .zip(changes.par_chunks_mut(ROWS * width))
                .for_each_init(
                    Scratch::default,
                    |scratch, (((residual, streams), scales), changes)| {
                        for (start, metric) in &metrics {
                            let stream = &mut streams[start / unit_cols * unit_bytes..];
                            let stream = &mut stream[..unit_bytes];
                            let better =
                                search.improve(scratch, *start, metric, residual, scales, stream);
                            let Some(better) = better else { continue };
                            let rows = changes.chunks_exact_mut(width);
                            let rows = rows.zip(residual.chunks_exact_mut(cols)).zip(better);
                            for ((changes, residual), change) in rows {
                                let inside = unit_cols.min(cols - start);
                                changes[start - from..][..inside]
                                    .copy_from_slice(&change[..inside]);
                                let residual = &mut residual[from..from + width];
                                let moved = change.iter().enumerate().filter(|(_, c)| **c != 0.0);
                                for (k, change) in moved {
                                    let line = &h[(start + k) * cols..][from..from + width];
                                    residual
                                        .iter_mut()
                                        .zip(line)
                                        .for_each(|(r, h)| *r -= change * h);
                                }
                            }
                        }
                    },
                );
            residual.update(&changes, from)?;
        }
        Ok(())
    }
}

/// What the searches for better streams share.
struct UnitSearch<'a> {
    input: &'a Input<'a>,
    spec: Trellis,
    values: &'a TrellisValues,
    /// Columns per scale, and scales of a row.
    span: usize,
    blocks: usize,
}

impl UnitSearch<'_> {
    /// Replaces the stream of the unit from column `start` on by a better one; returns the change of its weights,
    /// [row][column], or `None` if there is no better one. `residual` and `scales` are the rows of the tile.
    fn improve(
        &self,
        scratch: &mut Scratch,
        start: usize,
        metric: &UnitMetric,
        residual: &[f32],
        scales: &[f32],
        stream: &mut [u8],
    ) -> Option<[[f32; COLS]; ROWS]> {
        let (cols, step_weights) = (self.input.cols, self.spec.step_weights());
        let end = cols.min(start + self.spec.unit_cols());
        let scale = |r: usize| scales[r * self.blocks + start / self.span];
        let present: [[f32; COLS]; ROWS] =
            std::array::from_fn(|r| unit_row(self.values, stream, self.spec, r));
        let count = residual.len() / cols;
        let target = unit_target(count, end - start, step_weights, scale, |r| {
            let mut target = metric.step(&row_part(residual, cols, r, start, end));
            for (target, present) in target.iter_mut().zip(present[r]) {
                *target += present * scale(r);
            }
            target
        });
        let Scratch { search, stream: better } = scratch;
        better.resize(stream.len(), 0);
        search.run(self.input.compute.isa, self.values, &metric.of_search, &target, better);
        let found: [[f32; COLS]; ROWS] =
            std::array::from_fn(|r| unit_row(self.values, better, self.spec, r));
        let error = |rows| unit_error(&target, &metric.of_search, rows, step_weights);
        if error(&found) >= error(&present) {
            return None;
        }
        stream.copy_from_slice(better);
        let mut changes = [[0.0; COLS]; ROWS];
        for (r, changes) in changes.iter_mut().enumerate().take(count) {
            for k in 0..end - start {
                changes[k] = (found[r][k] - present[r][k]) * scale(r);
            }
        }
        Some(changes)
    }
}

/// Spreads `error`, that of the columns from `start` on, over the later columns of a row up to `end`: subtracts
/// (W − Q)·M_gg·U.
fn spread_error(error: &[f32], row: &mut [f32], factor: &Factor, start: usize, end: usize) {
    let (cols, later) = (factor.size, start + error.len());
    for j in 0..error.len() {
        let column = |i: usize| factor.m[(start + i) * cols + start + j];
        let scaled: f32 = (0..=j).map(|i| error[i] * column(i)).sum();
        let line = &factor.u[(start + j) * cols..][later..end];
        for (w, u) in row[later..end].iter_mut().zip(line) {
            *w -= scaled * u;
        }
    }
}

/// The columns `start..end` of row `r` of a tile, padded with zeros.
fn row_part(rows: &[f32], cols: usize, r: usize, start: usize, end: usize) -> [f32; COLS] {
    let mut part = [0.0; COLS];
    part[..end - start].copy_from_slice(&rows[r * cols..][start..end]);
    part
}

/// The weights of row `r` of a unit in units of the scale, in the order of columns.
fn unit_row(values: &TrellisValues, stream: &[u8], spec: Trellis, r: usize) -> [f32; COLS] {
    let mut row = [0.0; COLS];
    for c in 0..STEP_COLS {
        let window = window(stream, spec.step_bits(), r * STEP_COLS + c);
        for v in 0..spec.step_weights() {
            row[v * STEP_COLS + c] = values.of(v, window);
        }
    }
    row
}

/// The standard deviation of a block of weights around zero.
fn root_mean_square(block: &[f32]) -> f32 {
    let sum: f32 = block.iter().map(|w| w * w).sum();
    (sum / block.len().max(1) as f32).sqrt()
}
