//! Integers with a scale per group of columns: rounding for embeddings, rounding (RTN) or rounding
//! with error compensation (GPTQ) for layers whose inputs are known.
//!
//! Codes of any width from 1 to 8 bits are stored exactly, in the 4- or 8-bit encoding: the format
//! has no narrower one.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{IntGroup, IntGroupParts};
use stb_format::half::f16;

use super::{Input, Packed, Propagation, Seconds, TASK_ROWS, propagate};

/// Scales tried for a group, as shares of the one that just covers its largest value.
const TRIES: usize = 17;

/// Which integers a group may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Whether the codes lie around zero and the scale has the least squared error; otherwise they
    /// span minimum and maximum of the group, zero included (GPTQ's default). Symmetric codes of
    /// one bit are −1 and 1.
    pub symmetric: bool,
}

/// How a linear layer is quantised to integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is stored.
    pub spec: IntGroup,
    /// The codes.
    pub grid: Grid,
    /// Whether errors are compensated (GPTQ) or each weight is rounded by itself (RTN).
    pub compensate: bool,
}

impl Options {
    /// GPTQ with all codes of an encoding.
    #[must_use]
    pub fn full(spec: IntGroup) -> Self {
        let grid = Grid { bits: spec.bits(), symmetric: true };
        Self { spec, grid, compensate: true }
    }

    /// The narrowest encoding for codes of `grid`; `None` if there is none.
    #[must_use]
    pub fn new(grid: Grid, group: u16, compensate: bool) -> Option<Self> {
        // Codes less a zero point between 0 and the highest need one bit more for their sign.
        let wide = match grid {
            Grid { bits: 1..=4, symmetric: true } | Grid { bits: 1..=3, symmetric: false } => 4,
            Grid { bits: 5..=8, symmetric: true } | Grid { bits: 4..=7, symmetric: false } => 8,
            _ => return None,
        };
        Some(Self { spec: IntGroup::new(wide, group)?, grid, compensate })
    }
}

/// Rounds each weight to the nearest code; scales minimise the squared error of their group.
#[must_use]
pub fn round(weights: &[f32], rows: usize, cols: usize, spec: IntGroup) -> Packed {
    round_to(weights, rows, cols, &Options { compensate: false, ..Options::full(spec) })
}

/// Quantises one linear layer.
#[must_use]
pub fn quantise(input: &Input<'_>, options: &Options) -> Packed {
    if options.compensate {
        compensate(input, options)
    } else {
        round_to(input.weights, input.rows, input.cols, options)
    }
}

fn round_to(weights: &[f32], rows: usize, cols: usize, options: &Options) -> Packed {
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
                let levels = Levels::new(values, options.grid);
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
fn compensate(input: &Input<'_>, options: &Options) -> Packed {
    let clock = Instant::now();
    let spec = options.spec;
    let (rows, cols, u) = (input.rows, input.cols, &input.factor.u);
    let groups = cols.div_ceil(spec.group());
    let mut weights = input.weights.to_vec();
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
                let levels = Levels::new(errors, options.grid);
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
        let mode = Propagation::Solve;
        propagate(input.isa, &mut weights, input.factor, &errors, from, width, mode);
    }
    pack(IntGroupParts { spec, rows, cols, codes, scales }, clock)
}

/// Σ h (w − q)² / Σ h w² of rounding some rows, h one weight per column.
#[must_use]
pub fn plain_error(weights: &[f32], cols: usize, importance: &[f32], spec: IntGroup) -> f64 {
    let row_error = |row: &[f32]| {
        let (mut error, mut all) = (0f64, 0f64);
        for (group, h) in row.chunks(spec.group()).zip(importance.chunks(spec.group())) {
            let scale = best_scale(group, spec.bits()).to_f32();
            for (w, h) in group.iter().zip(h) {
                let q = scale * f32::from(nearest(*w, scale, spec.bits()));
                error += f64::from(h * (w - q) * (w - q));
                all += f64::from(h * w * w);
            }
        }
        (error, all)
    };
    super::ratio_of_sums(weights.par_chunks_exact(cols).map(row_error).collect())
}

fn pack(parts: IntGroupParts, clock: Instant) -> Packed {
    let quantise = clock.elapsed().as_secs_f64();
    let payload = parts.pack();
    let pack = clock.elapsed().as_secs_f64() - quantise;
    let seconds = Seconds { quantise, pack, ..Seconds::default() };
    Packed { encoding: Encoding::IntGroup(parts.spec), payload, salient: None, seconds }
}

/// The values that weights of a group can take: whole multiples of a scale.
#[derive(Clone, Copy, Debug)]
struct Levels {
    scale: f16,
    lowest: f32,
    highest: f32,
    /// Only ±scale.
    signs: bool,
}

impl Levels {
    fn new(values: &[f32], grid: Grid) -> Self {
        let Grid { bits, symmetric } = grid;
        let (low, high) = limits(bits);
        match (symmetric, bits) {
            (true, 1) => {
                let sum: f32 = values.iter().map(|v| v.abs()).sum();
                let scale = f16::from_f32(sum / values.len().max(1) as f32);
                Self { scale, lowest: -1.0, highest: 1.0, signs: true }
            }
            (true, _) => {
                Self { scale: best_scale(values, bits), lowest: low, highest: high, signs: false }
            }
            (false, _) => {
                let least = values.iter().copied().fold(0.0f32, f32::min);
                let most = values.iter().copied().fold(0.0f32, f32::max);
                let steps = high - low;
                let scale = f16::from_f32((most - least) / steps);
                let zero = if scale == f16::ZERO { 0.0 } else { -least / scale.to_f32() };
                let zero = zero.round_ties_even().clamp(0.0, steps);
                Self { scale, lowest: -zero, highest: steps - zero, signs: false }
            }
        }
    }

    fn nearest(&self, value: f32) -> i8 {
        let scale = self.scale.to_f32();
        if self.signs {
            return if value < 0.0 { -1 } else { 1 };
        }
        if scale == 0.0 {
            return 0;
        }
        (value / scale).round_ties_even().clamp(self.lowest, self.highest) as i8
    }
}

/// The lowest and highest code around zero.
fn limits(bits: u8) -> (f32, f32) {
    let half = f32::from(1i16 << (bits - 1));
    (-half, half - 1.0)
}

fn nearest(value: f32, scale: f32, bits: u8) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    let (low, high) = limits(bits);
    (value / scale).round_ties_even().clamp(low, high) as i8
}

/// The binary16 scale with the least squared error. The largest value takes the lowest code, which
/// has one step more than the highest, so the scale may be negative.
fn best_scale(values: &[f32], bits: u8) -> f16 {
    let largest = values.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 {
        return f16::ZERO;
    }
    let (low, high) = limits(bits);
    let error = |scale: f16| -> f32 {
        let s = scale.to_f32();
        let difference = |v: &f32| v - s * f32::from(nearest(*v, s, bits));
        values.iter().map(difference).map(|d| d * d).sum()
    };
    let mut best = (f32::INFINITY, f16::ZERO);
    for i in 0..TRIES {
        // 1.05 down to 0.65 of the covering scale, on either side.
        let share = 1.05 - 0.4 * i as f32 / (TRIES - 1) as f32;
        for covering in [largest / low, largest / high] {
            let scale = f16::from_f32(covering * share);
            let e = error(scale);
            if scale.is_finite() && e < best.0 {
                best = (e, scale);
            }
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use stb_format::encoding::MatrixView;

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
                let grid = Grid { bits, symmetric };
                let Some(options) = Options::new(grid, 32, false) else {
                    assert!(bits == 8 && !symmetric);
                    continue;
                };
                let packed = round_to(&weights, 2, cols, &options);
                let view = packed.encoding.view(2, cols as u64, &packed.payload).unwrap();
                let decoded = view.decode();
                for (values, found) in weights.chunks(32).zip(decoded.chunks(32)) {
                    let levels = Levels::new(values, grid);
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
        let packed = round(&[0.0; 64], 1, 64, IntGroup::new(4, 32).unwrap());
        let view = packed.encoding.view(1, 64, &packed.payload).unwrap();
        assert!(view.decode().iter().all(|w| *w == 0.0));
    }
}
