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
                *scale = best_scale(values, spec);
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = nearest(*value, scale.to_f32(), spec);
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
                let scale = best_scale(errors, spec);
                scales[index] = scale;
                for col in from..from + width {
                    codes[col] = nearest(row[col], scale.to_f32(), spec);
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
            let scale = best_scale(group, spec).to_f32();
            for (w, h) in group.iter().zip(h) {
                let q = scale * f32::from(nearest(*w, scale, spec));
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

fn nearest(value: f32, scale: f32, spec: IntGroup) -> i8 {
    let (low, high) = spec.limits();
    if scale == 0.0 {
        return if spec.is_odd() { 1 } else { 0 };
    }
    let (low, high) = (f32::from(low), f32::from(high));
    if spec.is_odd() {
        // Codes are low, low + 2, …
        let steps = ((value / scale - low) / 2.0).round_ties_even();
        return (low + 2.0 * steps).clamp(low, high) as i8;
    }
    (value / scale).round_ties_even().clamp(low, high) as i8
}

/// The binary16 scale with the least squared error, of those tried. All integers: the largest value
/// takes the lowest code, which has one step more than the highest, so the scale may be negative.
/// Odd integers are symmetric; with so few of them large values are best clipped, the more the
/// fewer there are.
fn best_scale(values: &[f32], spec: IntGroup) -> f16 {
    let largest = values.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 {
        return f16::ZERO;
    }
    let (low, high) = (f32::from(spec.limits().0), f32::from(spec.limits().1));
    let error = |scale: f16| -> f32 {
        let s = scale.to_f32();
        let difference = |v: &f32| v - s * f32::from(nearest(*v, s, spec));
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
    // From 1.05 of the covering scale down to this share.
    let least = [0.65, 0.2, 0.35, 0.5][usize::from(spec.bits() % 4)];
    for i in 0..TRIES {
        let share = 1.05 - (1.05 - least) * i as f32 / (TRIES - 1) as f32;
        if spec.is_odd() {
            try_scale(largest.abs() / high * share);
        } else {
            try_scale(largest / low * share);
            try_scale(largest / high * share);
        }
    }
    if spec.is_odd() {
        // The best scale for the codes that the best one so far gives.
        let scale = best.1.to_f32();
        let codes = values.iter().map(|v| (v, f32::from(nearest(*v, scale, spec))));
        let (vc, cc) = codes.fold((0.0, 0.0), |(vc, cc), (v, c)| (vc + v * c, cc + c * c));
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
    fn errors_stay_within_half_a_step() {
        let cols = 70;
        let weights: Vec<f32> =
            (0..3 * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        for (bits, group) in [(4, 32), (8, 64), (3, 32)] {
            let spec = IntGroup::new(bits, group).unwrap();
            let packed = round(&weights, 3, cols, spec);
            let view = packed.encoding.view(3, cols as u64, &packed.payload).unwrap();
            let MatrixView::IntGroup(codes) = view else { unreachable!() };
            for (i, (w, q)) in weights.iter().zip(view.decode()).enumerate() {
                let step = codes.scale(i / cols, i % cols / spec.group()).abs();
                // Clipping may cost a little more at the ends of the range.
                let step = if bits == 3 { 2.0 * step } else { step };
                assert!((w - q).abs() <= 0.9 * step, "{bits} bits, {i}: {w} {q}");
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

    /// Weights of a normal distribution: the error of the best quantiser with as many evenly spaced
    /// levels (Max, "Quantizing for minimum distortion", 1960, table II), a little less because scales
    /// are fitted to 128 weights each.
    #[test]
    fn few_bits_reach_the_known_optimum() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        // Box and Muller's way.
        let mut normal = || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (6.283_185 * uniform()).cos();
        let normal: Vec<f32> = (0..256 * 128).map(|_| normal() as f32).collect();
        for (bits, optimum) in [(1, 0.3634), (2, 0.1188), (3, 0.03744)] {
            let spec = IntGroup::new(bits, 128).unwrap();
            let error = plain_error(&normal, 128, &[1.0; 128], spec);
            let share = error / optimum;
            assert!(share > 0.93 && share < 1.02, "{bits} bits: {error} instead of {optimum}");
        }
    }
}
