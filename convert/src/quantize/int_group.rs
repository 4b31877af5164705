//! Integers with a scale per group of columns: rounding (RTN) for embeddings, and rounding or error compensation
//! (GPTQ) for linear layers.
//!
//! Codes of any width from 1 to 8 bits are stored exactly, in the narrowest encoding that holds them.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{IntGroup, IntGroupParts};
use stb_format::half::f16;
use stb_runtime::Result;

use super::compensation::{Compensation, Propagation};
use super::fit::Fitting;
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds};
use crate::products::TASK_ROWS;

/// Columns whose errors are spread over the rest of the matrix at once.
const BLOCK: usize = 128;
/// Rounds of refitting scales and re-choosing codes in the candidates of a budget, and in tables.
pub(crate) const CANDIDATE_SWEEPS: usize = 4;
/// Scales tried for a group, between shares of the scale that just covers its largest value.
const TRIES: usize = 17;

/// Which integers a group may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntGrid {
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Whether the codes lie around zero and the scale has the least squared error (those of 1 to 3
    /// bits are odd); otherwise they span minimum and maximum of the group, zero included (GPTQ's
    /// default).
    pub symmetric: bool,
}

/// How a linear layer is quantized to integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntOptions {
    /// The stored encoding.
    pub spec: IntGroup,
    /// The codes.
    pub grid: IntGrid,
    /// Whether errors are compensated (GPTQ) or each weight is rounded independently (RTN).
    pub compensate: bool,
    /// With compensation, after it: rounds of refitting all scales and re-choosing all codes against the
    /// layer's output.
    pub sweeps: usize,
}

impl IntOptions {
    /// All codes of an encoding, with compensation and `sweeps` rounds after it.
    #[must_use]
    pub fn full(spec: IntGroup, sweeps: usize) -> Self {
        let grid = IntGrid { bits: spec.bits(), symmetric: true };
        Self { spec, grid, compensate: true, sweeps }
    }

    /// All codes of an encoding, each weight rounded independently.
    #[must_use]
    pub fn rounding(spec: IntGroup) -> Self {
        Self { compensate: false, ..Self::full(spec, 0) }
    }

    /// The candidates of a budget for a matrix of `cols` columns.
    pub(crate) fn candidates(cols: usize) -> impl Iterator<Item = Self> {
        let sweeps = |spec: IntGroup| if spec.bits() < 8 { CANDIDATE_SWEEPS } else { 0 };
        candidate_encodings(cols).into_iter().map(move |spec| Self::full(spec, sweeps(spec)))
    }

    /// The narrowest encoding for codes of `grid`, without sweeps; `None` if there is none.
    #[must_use]
    pub fn new(grid: IntGrid, group: u16, compensate: bool) -> Option<Self> {
        let stored = match grid {
            IntGrid { bits: bits @ (1..=4 | 8), symmetric: true } => bits,
            IntGrid { bits: 5..=7, symmetric: true } => 8,
            // Codes minus a zero point in their range need one more bit for the sign.
            IntGrid { bits: 1..=3, symmetric: false } => 4,
            IntGrid { bits: 4..=7, symmetric: false } => 8,
            _ => return None,
        };
        Some(Self { spec: IntGroup::new(stored, group)?, grid, compensate, sweeps: 0 })
    }
}

impl LinearQuantizer for IntOptions {
    fn encoding(&self) -> Encoding {
        Encoding::IntGroup(self.spec)
    }

    fn note(&self) -> Option<String> {
        (self.grid.bits != self.spec.bits()).then(|| {
            format!(
                "the format has no {}-bit integers: their codes are stored exactly in {} bits each",
                self.grid.bits,
                self.spec.bits()
            )
        })
    }

    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        // Codes of 8 bits; scales as binary16, initial value, logarithm and two moments.
        rows * cols + rows * cols * 18 / self.spec.group() as u64
    }

    fn quantize(&self, input: &Input<'_>, _: Option<&Pruned>) -> Result<Packed> {
        if self.compensate {
            compensate(input, self)
        } else {
            Ok(round_to(input.weights, input.rows, input.cols, self))
        }
    }
}

/// Rounds each weight to the nearest code; scales minimize the squared error of their group.
#[must_use]
pub fn round(weights: &[f32], rows: usize, cols: usize, spec: IntGroup) -> Packed {
    round_to(weights, rows, cols, &IntOptions::rounding(spec))
}

/// The candidate encodings of a budget for a matrix of `cols` columns.
pub(crate) fn candidate_encodings(cols: usize) -> Vec<IntGroup> {
    let all =
        [(1, 128), (2, 128), (2, 64), (3, 128), (3, 64), (4, 128), (4, 32), (8, 128), (8, 32)];
    let specs = all.into_iter().filter_map(|(bits, group)| IntGroup::new(bits, group));
    let mut found: Vec<IntGroup> = specs.map(|spec| fit_group(spec, cols)).collect();
    found.dedup();
    found
}

/// `spec` with the group that fits rows of `cols` columns: of all groups of at most its size the one that stores a row
/// in the fewest bytes, of equal ones the smallest, which has the least error. It is that of `spec` if that divides
/// `cols`: the last group of a row is stored in full.
#[must_use]
pub fn fit_group(spec: IntGroup, cols: usize) -> IntGroup {
    let row_bytes = |spec: &IntGroup| {
        cols.div_ceil(spec.group()) * (spec.group() * usize::from(spec.bits()) / 8 + 2)
    };
    let groups = [32, 64, 128].into_iter().filter(|group| usize::from(*group) <= spec.group());
    let specs = groups.filter_map(|group| IntGroup::new(spec.bits(), group));
    specs.min_by_key(row_bytes).unwrap_or(spec)
}

/// Bytes of codes, scales and gradients of a rounded matrix of `weights` weights during distillation.
pub(crate) fn rounded_distill_memory(spec: IntGroup, weights: u64) -> u64 {
    weights * 6 + weights * 18 / spec.group() as u64
}

/// Rounds each weight to the nearest code of its group.
pub(crate) fn round_to(weights: &[f32], rows: usize, cols: usize, options: &IntOptions) -> Packed {
    let clock = Instant::now();
    let spec = options.spec;
    let groups = cols.div_ceil(spec.group());
    let mut codes = vec![0i8; rows * cols];
    let mut scales = vec![f16::ZERO; rows * groups];
    codes
        .par_chunks_exact_mut(cols)
        .zip(scales.par_chunks_exact_mut(groups))
        .zip(weights.par_chunks_exact(cols))
        .for_each(|((codes, scales), row)| {
            let parts = codes.chunks_mut(spec.group()).zip(row.chunks(spec.group()));
            for ((codes, values), scale) in parts.zip(scales) {
                let levels = IntLevels::new(values, options);
                *scale = levels.scale;
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = levels.nearest(*value);
                }
            }
        });
    pack(IntGroupParts { spec, rows, cols, codes, scales }, clock)
}

/// GPTQ: columns are rounded one after another and the error of each is spread over the later ones.
/// The scale of a group is fixed when its first column is reached.
fn compensate(input: &Input<'_>, options: &IntOptions) -> Result<Packed> {
    let clock = Instant::now();
    let spec = options.spec;
    let (rows, cols, u) = (input.rows, input.cols, &input.factor.u);
    let groups = cols.div_ceil(spec.group());
    let mut weights = input.weights.to_vec();
    let mode = Propagation::Solve;
    let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
    let mut codes = vec![0i8; rows * cols];
    let mut scales = vec![f16::ZERO; rows * groups];
    for (index, from) in (0..cols).step_by(spec.group()).enumerate() {
        let width = spec.group().min(cols - from);
        let mut errors = vec![0.0; rows * width];
        weights
            .par_chunks_exact_mut(cols)
            .zip(codes.par_chunks_exact_mut(cols))
            .zip(scales.par_chunks_exact_mut(groups))
            .zip(errors.par_chunks_exact_mut(width))
            .with_min_len(TASK_ROWS)
            .for_each(|(((row, codes), scales), errors)| {
                errors.copy_from_slice(&row[from..from + width]);
                let levels = IntLevels::new(errors, options);
                scales[index] = levels.scale;
                for col in from..from + width {
                    codes[col] = levels.nearest(row[col]);
                    let value = levels.scale.to_f32() * f32::from(codes[col]);
                    let line = &u[col * cols..(col + 1) * cols];
                    let error = (row[col] - value) / line[col];
                    for j in col + 1..from + width {
                        row[j] -= error * line[j];
                    }
                    errors[col - from] -= value;
                }
            });
        compensation.spread(&mut weights, &errors, from, width, spec.group())?;
    }
    let mut parts = IntGroupParts { spec, rows, cols, codes, scales };
    if options.sweeps > 0 {
        let fitting = Fitting::new(input)?;
        let target = fitting.times_hessian(input.weights)?;
        refit(&fitting, &mut parts, &target)?;
        for _ in 0..options.sweeps {
            sweep(input, &fitting, options, &mut parts, &target)?;
            refit(&fitting, &mut parts, &target)?;
        }
    }
    Ok(pack(parts, clock))
}

/// The scales that minimize the output error for the present codes, rounded to what is stored. `target` is
/// W·H.
fn refit(fitting: &Fitting<'_>, parts: &mut IntGroupParts, target: &[f32]) -> Result<()> {
    let units: Vec<f32> = parts.codes.iter().map(|c| f32::from(*c)).collect();
    let mut scales: Vec<f32> = parts.scales.iter().map(|s| s.to_f32()).collect();
    fitting.best_scales(&units, parts.spec.group(), target, &mut scales)?;
    for (stored, scale) in parts.scales.iter_mut().zip(scales) {
        let scale = f16::from_f32(scale);
        if scale.is_finite() {
            *stored = scale;
        }
    }
    Ok(())
}

/// Coordinate descent: sets each code in turn to the one that minimizes the output error with all others fixed.
/// `target` is W·H.
fn sweep(
    input: &Input<'_>,
    fitting: &Fitting<'_>,
    options: &IntOptions,
    parts: &mut IntGroupParts,
    target: &[f32],
) -> Result<()> {
    let (rows, cols) = (input.rows, input.cols);
    let h = input.hessian.matrix();
    let (group, allowed) = (parts.spec.group(), IntCodes::around_zero(options));
    let groups = cols.div_ceil(group);
    let weight = |(i, code): (usize, &i8)| {
        parts.scales[i / cols * groups + i % cols / group].to_f32() * f32::from(*code)
    };
    let weights: Vec<f32> = parts.codes.iter().enumerate().map(weight).collect();
    let mut residual = fitting.residual(&weights, target, BLOCK)?;
    for from in (0..cols).step_by(BLOCK) {
        let width = BLOCK.min(cols - from);
        let mut changes = vec![0.0; rows * width];
        residual
            .values
            .par_chunks_exact_mut(cols)
            .zip(parts.codes.par_chunks_exact_mut(cols))
            .zip(parts.scales.par_chunks_exact(groups))
            .zip(changes.par_chunks_exact_mut(width))
            .with_min_len(TASK_ROWS)
            .for_each(|(((residual, codes), scales), changes)| {
                for col in from..from + width {
                    let scale = scales[col / group].to_f32();
                    let line = &h[col * cols..(col + 1) * cols];
                    if scale == 0.0 || line[col] <= 0.0 {
                        continue;
                    }
                    let now = scale * f32::from(codes[col]);
                    let code = allowed.nearest(now + residual[col] / line[col], scale);
                    let change = scale * f32::from(code) - now;
                    if change != 0.0 {
                        codes[col] = code;
                        changes[col - from] = change;
                        let block = &mut residual[from..from + width];
                        for (r, h) in block.iter_mut().zip(&line[from..]) {
                            *r -= change * h;
                        }
                    }
                }
            });
        residual.update(&changes, from)?;
    }
    Ok(())
}

fn pack(parts: IntGroupParts, clock: Instant) -> Packed {
    let quantize = clock.elapsed().as_secs_f64();
    let payload = parts.pack();
    let pack = clock.elapsed().as_secs_f64() - quantize;
    let seconds = Seconds { quantize, pack, ..Seconds::default() };
    Packed { encoding: Encoding::IntGroup(parts.spec), payload, salient: None, seconds }
}

/// The codes that a group may use.
#[derive(Clone, Copy, Debug)]
struct IntCodes {
    low: f32,
    high: f32,
    /// Whether only every second code is allowed: low, low + 2, …
    odd: bool,
    /// The smallest scale tried, as a share of the covering scale. The fewer codes there are, the more clipping of
    /// large values helps.
    least: f32,
}

impl IntCodes {
    /// The codes of a symmetric grid.
    fn around_zero(options: &IntOptions) -> Self {
        let IntOptions { spec, grid, .. } = options;
        let least =
            [0.65, 0.2, 0.35, 0.5, 0.65, 0.65, 0.65, 0.65, 0.65][usize::from(grid.bits.min(8))];
        if spec.is_odd() {
            let (low, high) = spec.limits();
            return Self { low: f32::from(low), high: f32::from(high), odd: true, least };
        }
        let half = f32::from(1i16 << (grid.bits - 1));
        Self { low: -half, high: half - 1.0, odd: false, least }
    }

    fn nearest(self, value: f32, scale: f32) -> i8 {
        let Self { low, high, odd, .. } = self;
        if scale == 0.0 {
            return i8::from(odd);
        }
        if odd {
            let steps = ((value / scale - low) / 2.0).round_ties_even();
            return (low + 2.0 * steps).clamp(low, high) as i8;
        }
        (value / scale).round_ties_even().clamp(low, high) as i8
    }
}

/// The values that weights of a group can take: integer multiples of a scale.
#[derive(Clone, Copy, Debug)]
struct IntLevels {
    scale: f16,
    codes: IntCodes,
}

impl IntLevels {
    fn new(values: &[f32], options: &IntOptions) -> Self {
        if options.grid.symmetric {
            let codes = IntCodes::around_zero(options);
            return Self { scale: best_scale(values, codes), codes };
        }
        let least = values.iter().copied().fold(0.0f32, f32::min);
        let most = values.iter().copied().fold(0.0f32, f32::max);
        let steps = f32::from((1u16 << options.grid.bits) - 1);
        let scale = f16::from_f32((most - least) / steps);
        let zero = if scale == f16::ZERO { 0.0 } else { -least / scale.to_f32() };
        let zero = zero.round_ties_even().clamp(0.0, steps);
        let codes = IntCodes { low: -zero, high: steps - zero, odd: false, least: 1.0 };
        Self { scale, codes }
    }

    fn nearest(&self, value: f32) -> i8 {
        self.codes.nearest(value, self.scale.to_f32())
    }
}

/// The binary16 scale with the least squared error of those tried. With all integers, the largest value takes the
/// lowest or the highest code; the lowest has the larger magnitude, so the scale may be negative. Odd integers are
/// symmetric.
fn best_scale(values: &[f32], codes: IntCodes) -> f16 {
    let largest = values.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 {
        return f16::ZERO;
    }
    let error = |scale: f16| -> f32 {
        let s = scale.to_f32();
        let difference = |v: &f32| v - s * f32::from(codes.nearest(*v, s));
        values.iter().map(difference).map(|d| d * d).sum()
    };
    let mut best = (f32::INFINITY, f16::ZERO);
    let mut try_scale = |scale: f32| {
        let scale = f16::from_f32(scale);
        let e = error(scale);
        if scale.is_finite() && e < best.0 {
            best = (e, scale);
        }
    };
    for i in 0..TRIES {
        // Descending from 1.05 of the covering scale.
        let share = 1.05 - (1.05 - codes.least) * i as f32 / (TRIES - 1) as f32;
        if codes.odd {
            try_scale(largest.abs() / codes.high * share);
        } else {
            try_scale(largest / codes.low * share);
            try_scale(largest / codes.high * share);
        }
    }
    if codes.odd {
        // Refit: the least-squares scale for the codes of the best scale so far.
        let scale = best.1.to_f32();
        let pairs = values.iter().map(|v| (v, f32::from(codes.nearest(*v, scale))));
        let (vc, cc) = pairs.fold((0.0, 0.0), |(vc, cc), (v, c)| (vc + v * c, cc + c * c));
        let fitted = f16::from_f32(vc / cc);
        if fitted.is_finite() && error(fitted) < best.0 {
            best.1 = fitted;
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use stb_format::encoding::MatrixView;

    #[test]
    fn groups_fit_the_row() {
        let fitted =
            |bits, group, cols| fit_group(IntGroup::new(bits, group).unwrap(), cols).group();
        // Multiples of the group keep it.
        for bits in [1, 2, 3, 4, 8] {
            for cols in [128, 1024, 4096, 11008] {
                assert_eq!(fitted(bits, 128, cols), 128, "{bits} bits, {cols} columns");
            }
        }
        // 576 columns are 4.5 groups of 128 and 9 of 64; one bit has the same bytes with both.
        for bits in [1, 2, 3, 4, 8] {
            assert_eq!(fitted(bits, 128, 576), 64, "{bits} bits");
        }
        assert_eq!(fitted(4, 128, 96), 32);
        assert_eq!(fitted(4, 64, 128), 64);
        assert_eq!(fitted(4, 32, 576), 32);
        // Never more bytes, never a larger group.
        for cols in 1..600 {
            for spec in [IntGroup::new(4, 128).unwrap(), IntGroup::new(1, 64).unwrap()] {
                let bytes = |spec| Encoding::IntGroup(spec).payload_len(&[64, cols]).unwrap();
                let fit = fit_group(spec, cols as usize);
                assert!(fit.group() <= spec.group() && bytes(fit) <= bytes(spec), "{cols}");
            }
        }
    }

    #[test]
    fn candidates_differ_and_fit() {
        let names = |cols| -> Vec<String> {
            candidate_encodings(cols)
                .into_iter()
                .map(|s| format!("{}/{}", s.bits(), s.group()))
                .collect()
        };
        assert_eq!(names(576), ["1/64", "2/64", "3/64", "4/64", "4/32", "8/64", "8/32"]);
        assert_eq!(names(1536).len(), 9);
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        let cols = 70;
        let weights: Vec<f32> =
            (0..3 * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        for (bits, group) in [(4, 32), (8, 64)] {
            let spec = IntGroup::new(bits, group).unwrap();
            let packed = round(&weights, 3, cols, spec);
            let view = packed.encoding.view(3, cols as u64, &packed.payload).unwrap();
            let MatrixView::IntGroup(codes) = view else { unreachable!() };
            for (i, (w, q)) in weights.iter().zip(view.decode()).enumerate() {
                let step = codes.scale(i / cols, i % cols / spec.group()).abs();
                // Clipping may cost a little more at the ends of the range.
                assert!((w - q).abs() <= 0.9 * step, "{bits} bits, {i}: {w} {q}");
            }
        }
    }

    /// Codes of every width and kind fit the encoding that is chosen for them.
    #[test]
    fn narrow_codes_are_stored_exactly() {
        let cols = 96;
        let weights: Vec<f32> =
            (0..2 * cols).map(|i| ((i * 7919) % 1000) as f32 / 400.0 - 0.5).collect();
        for symmetric in [true, false] {
            for bits in 1..=8 {
                let grid = IntGrid { bits, symmetric };
                let Some(options) = IntOptions::new(grid, 32, false) else {
                    assert!(bits == 8 && !symmetric);
                    continue;
                };
                let packed = round_to(&weights, 2, cols, &options);
                let view = packed.encoding.view(2, cols as u64, &packed.payload).unwrap();
                let decoded = view.decode();
                for (values, found) in weights.chunks(32).zip(decoded.chunks(32)) {
                    let levels = IntLevels::new(values, &options);
                    for (w, q) in values.iter().zip(found) {
                        assert_eq!(*q, levels.scale.to_f32() * f32::from(levels.nearest(*w)));
                    }
                    let mut distinct: Vec<f32> = found.to_vec();
                    distinct.sort_by(f32::total_cmp);
                    distinct.dedup();
                    assert!(distinct.len() <= 1 << bits, "{bits} bits: {distinct:?}");
                }
                // Half a step, or the whole range for a bit.
                let worst = weights.iter().zip(&decoded).map(|(w, q)| (w - q).abs());
                let step = 2.5 / f32::from(2u16.pow(u32::from(bits)) - 1);
                assert!(worst.fold(0.0, f32::max) <= step * 1.2, "{bits} {symmetric}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for bits in [1, 2, 3, 4, 8] {
            let packed = round(&[0.0; 64], 1, 64, IntGroup::new(bits, 32).unwrap());
            let view = packed.encoding.view(1, 64, &packed.payload).unwrap();
            assert!(view.decode().iter().all(|w| *w == 0.0));
        }
    }

    /// Weights of a normal distribution: the error of the best quantizer with as many evenly spaced
    /// levels (Max, "Quantizing for minimum distortion", 1960, table II), a little less because scales
    /// are fitted to 128 weights each.
    #[test]
    fn few_bits_reach_the_known_optimum() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        // The Box-Muller transform.
        let mut normal =
            || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        let normal: Vec<f32> = (0..256 * 128).map(|_| normal() as f32).collect();
        for (bits, optimum) in [(1, 0.3634), (2, 0.1188), (3, 0.03744)] {
            let spec = IntGroup::new(bits, 128).unwrap();
            let stored = super::super::quantizer::decode(&round(&normal, 256, 128, spec), 256, 128);
            let square = |v: f32| f64::from(v) * f64::from(v);
            let errors = normal.iter().zip(&stored).map(|(w, q)| square(w - q)).sum::<f64>();
            let error = errors / normal.iter().map(|w| square(*w)).sum::<f64>();
            let share = error / optimum;
            assert!(share > 0.93 && share < 1.02, "{bits} bits: {error} instead of {optimum}");
        }
    }

    /// With correlated inputs, sweeps after compensation lower the output error.
    #[test]
    fn sweeps_lower_the_error_of_the_output() {
        let (rows, cols, tokens) = (9, 150, 400);
        let number = |k: usize| move |i: usize| ((i * i * k + 13 * i) % 211) as f32 / 105.0 - 1.0;
        let (own, shared) = (number(31), number(7));
        let x: Vec<f32> =
            (0..tokens * cols).map(|i| own(i) + 2.0 * shared(i / cols * 5 + i % 3)).collect();
        let isa = stb_kernels::Isa::detect().unwrap();
        let mut hessian = crate::hessian::Hessian::new(cols);
        hessian.add(isa, &x);
        hessian.count_sequence();
        hessian.finish();
        hessian.damp(0.01);
        let factor = crate::hessian::Factor::new(&hessian).unwrap();
        let weights: Vec<f32> = (0..rows * cols).map(number(17)).collect();
        let norms = vec![1.0; cols];
        let (hessian, factor, norms) = (&hessian, &factor, norms.as_slice());
        let compute = isa.into();
        let col_spreads = None;
        let input =
            Input { compute, weights: &weights, rows, cols, hessian, factor, norms, col_spreads };
        for bits in 1..=4 {
            let spec = IntGroup::new(bits, 32).unwrap();
            let error = |sweeps: usize| {
                let packed = IntOptions::full(spec, sweeps).quantize(&input, None).unwrap();
                let decoded = crate::quantize::decode(&packed, rows, cols);
                crate::quantize::relative_error(&input, &decoded).unwrap()
            };
            let errors = [0, 1, 4].map(error);
            assert!(errors[1] < errors[0], "{bits} bits: {errors:?}");
            assert!(errors[2] < errors[1] * 1.001, "{bits} bits: {errors:?}");
        }
    }
}
