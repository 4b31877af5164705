//! Integers with a scale per group of columns: rounding for embeddings, rounding with error
//! compensation (GPTQ) where the inputs are known.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{IntGroup, IntGroupParts};
use stb_format::half::f16;

use super::{Input, Packed, TASK_ROWS, propagate};

/// Scales tried for a group, as shares of the one that just covers its largest value.
const TRIES: usize = 17;

/// Rounds each weight to the nearest code; scales minimise the squared error of their group.
#[must_use]
pub fn round(weights: &[f32], rows: usize, cols: usize, spec: IntGroup) -> Packed {
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
                *scale = best_scale(values, spec.bits());
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = nearest(*value, scale.to_f32(), spec.bits());
                }
            }
        });
    pack(IntGroupParts { spec, rows, cols, codes, scales })
}

/// GPTQ: columns are rounded one after another and the error of each is spread over the later ones.
/// The scale of a group is fixed when its first column is reached.
#[must_use]
pub fn compensate(input: &Input<'_>, spec: IntGroup) -> Packed {
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
                let scale = best_scale(errors, spec.bits());
                scales[index] = scale;
                for col in from..from + width {
                    codes[col] = nearest(row[col], scale.to_f32(), spec.bits());
                    let value = scale.to_f32() * f32::from(codes[col]);
                    let line = &u[col * cols..(col + 1) * cols];
                    let error = (row[col] - value) / line[col];
                    for j in col + 1..from + width {
                        row[j] -= error * line[j];
                    }
                    errors[col - from] -= value;
                }
            });
        propagate(input.isa, &mut weights, input.factor, &errors, from, width);
    }
    pack(IntGroupParts { spec, rows, cols, codes, scales })
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

fn pack(parts: IntGroupParts) -> Packed {
    let payload = parts.pack();
    Packed { encoding: Encoding::IntGroup(parts.spec), payload, salient: None }
}

/// The lowest and highest code.
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

    #[test]
    fn zeros_stay_zeros() {
        let packed = round(&[0.0; 64], 1, 64, IntGroup::new(4, 32).unwrap());
        let view = packed.encoding.view(1, 64, &packed.payload).unwrap();
        assert!(view.decode().iter().all(|w| *w == 0.0));
    }
}
