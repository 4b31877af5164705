//! Measures two additions to N:M codes: a second level of magnitudes, and salient columns in 4-bit integers.
//! They gain too little for their bits, so neither is in the format.

use stb_convert::hessian::{Factor, Hessian};
use stb_convert::quantize::int_group::IntOptions;
use stb_convert::quantize::nm::NmOptions;
use stb_convert::quantize::{Input, LinearQuantizer, Packed};
use stb_format::encoding::{IntGroup, Nm};
use stb_kernels::Isa;

use super::{BLOCK, Layer};

/// The error of the best N:M code whose kept weights have one of two magnitudes, with one scale per block and
/// one ratio of magnitudes in all: relative to Σ w².
pub fn two_levels(layer: &Layer, n: usize, m: usize) -> f64 {
    let ratios = (12..36).map(|r| f64::from(r) / 10.0);
    let errors = ratios.map(|ratio| {
        let (mut error, mut all) = (0.0, 0.0);
        for block in layer.weights.chunks(layer.cols).flat_map(|row| row.chunks(BLOCK)) {
            let mut kept: Vec<f64> = Vec::new();
            for group in block.chunks(m) {
                let mut sizes: Vec<f64> = group.iter().map(|w| f64::from(w.abs())).collect();
                sizes.sort_by(|a, b| b.total_cmp(a));
                kept.extend(sizes.into_iter().take(n));
            }
            let squares: f64 = block.iter().map(|w| f64::from(*w).powi(2)).sum();
            all += squares;
            error += squares - explained(&kept, ratio);
        }
        error / all
    });
    errors.fold(f64::INFINITY, f64::min)
}

/// The part of Σ w² that magnitudes s and ratio · s explain. Fits s and the choice between both in turn.
fn explained(kept: &[f64], ratio: f64) -> f64 {
    let mut scale = kept.iter().sum::<f64>() / kept.len() as f64 / (0.5 + 0.5 * ratio);
    let mut best = 0.0;
    for _ in 0..12 {
        let (mut product, mut squares) = (0.0, 0.0);
        for w in kept {
            let level = if *w > 0.5 * (1.0 + ratio) * scale { ratio } else { 1.0 };
            product += w * level;
            squares += level * level;
        }
        scale = product / squares;
        best = product * product / squares;
    }
    best
}

/// The relative error of the outputs and the bits per weight if the most salient `share` of the columns are
/// 4-bit integers and the others N:M codes. Salient columns are quantized last, so that they compensate the
/// error of the others.
pub fn salient(layer: &Layer, spec: Nm, share: f64, code_bits: f64) -> anyhow::Result<(f64, f64)> {
    let (rows, cols) = (layer.rows, layer.cols);
    let count = (share * cols as f64).round() as usize;
    let score = |j: usize| -> f64 {
        let column: f64 = layer.weights.iter().skip(j).step_by(cols).map(|w| square(*w)).sum();
        column / square(layer.factor.u[j * (cols + 1)])
    };
    let mut order: Vec<usize> = (0..cols).collect();
    order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    let mut chosen = order[..count].to_vec();
    chosen.sort_unstable();
    let rest: Vec<usize> = (0..cols).filter(|j| !chosen.contains(j)).collect();

    let h = |i: usize, j: usize| f64::from(layer.hessian.matrix()[i * cols + j]);
    let part = |a: &[usize], b: &[usize]| -> Vec<f64> {
        a.iter().flat_map(|i| b.iter().map(move |j| (*i, *j))).map(|(i, j)| h(i, j)).collect()
    };
    let inner = part(&chosen, &chosen);
    // H_ss⁻¹ H_sn, [salient, rest].
    let spread = solve(inner.clone(), part(&chosen, &rest), count);
    let cross = part(&chosen, &rest);
    let n = rest.len();
    let mut outer = part(&rest, &rest);
    for k in 0..count {
        for i in 0..n {
            for j in 0..n {
                outer[i * n + j] -= cross[k * n + i] * spread[k * n + j];
            }
        }
    }
    let columns = |of: &[usize]| -> Vec<f32> {
        let row = |row: &[f32]| of.iter().map(|j| row[*j]).collect::<Vec<f32>>();
        layer.weights.chunks_exact(cols).flat_map(row).collect()
    };
    let options = NmOptions { spec, sweeps: 4, refit: true };
    let (weights, codes) = (columns(&rest), |i: &Input<'_>| options.quantize(i, None));
    let (stored, mut error) = quantized(&weights, rows, &outer, codes)?;

    // The salient weights that minimize the error of the outputs, given the codes.
    let mut targets = columns(&chosen);
    for (r, target) in targets.chunks_exact_mut(count.max(1)).enumerate() {
        for (k, target) in target.iter_mut().enumerate() {
            let row = r * n..(r + 1) * n;
            let errors = weights[row.clone()].iter().zip(&stored[row]);
            let moved: f64 = errors
                .zip(&spread[k * n..(k + 1) * n])
                .map(|((w, q), s)| f64::from(w - q) * s)
                .sum();
            *target += moved as f32;
        }
    }
    if let Some(integers) = IntGroup::new(4, 128).filter(|_| count > 0) {
        let options = IntOptions::full(integers, 4);
        error += quantized(&targets, rows, &inner, |i| options.quantize(i, None))?.1;
    }
    let whole = part(&(0..cols).collect::<Vec<_>>(), &(0..cols).collect::<Vec<_>>());
    let output = energy(&layer.weights, &whole, cols);
    let scales = 16.0 * count.div_ceil(128) as f64;
    let bits = (n as f64 * code_bits + count as f64 * 4.0 + scales) / cols as f64;
    Ok((error / output, bits + 1.0 / rows as f64))
}

/// The layer with columns divided by factors and inputs multiplied by them. Quantizing it is quantizing with a
/// factor per column.
pub fn scaled(layer: &Layer, factors: &[f32]) -> anyhow::Result<Layer> {
    let cols = layer.cols;
    let divided = |(i, w): (usize, &f32)| w / factors[i % cols];
    let weights = layer.weights.iter().enumerate().map(divided).collect();
    let hessian = layer.hessian.matrix().iter().enumerate();
    let hessian = hessian.map(|(i, h)| h * factors[i / cols] * factors[i % cols]).collect();
    Layer::new(weights, cols, Hessian::from_matrix(hessian, cols), 0.0)
}

/// The root mean square of each column of weights, and of its inputs up to a constant. Column factors are
/// powers of these.
pub fn column_sizes(layer: &Layer) -> [Vec<f32>; 2] {
    let cols = layer.cols;
    let mut weights = vec![0f64; cols];
    for row in layer.weights.chunks_exact(cols) {
        weights.iter_mut().zip(row).for_each(|(sum, w)| *sum += square(*w));
    }
    let root = |sum: f64| (sum / layer.rows as f64).sqrt().max(1e-6) as f32;
    let inputs = layer.hessian.diagonal().iter().map(|h| h.sqrt()).collect();
    [weights.into_iter().map(root).collect(), inputs]
}

/// Quantizes `weights`, [rows, n], with a Hessian [n, n]. Returns the quantized weights and tr(ΔW H ΔWᵀ).
fn quantized(
    weights: &[f32],
    rows: usize,
    hessian: &[f64],
    quantize: impl Fn(&Input<'_>) -> stb_runtime::Result<Packed>,
) -> anyhow::Result<(Vec<f32>, f64)> {
    let cols = weights.len() / rows;
    let input_hessian = Hessian::from_matrix(hessian.iter().map(|h| *h as f32).collect(), cols);
    let factor = Factor::new(&input_hessian)?;
    let norms = vec![1.0; cols];
    let compute = Isa::detect()?.into();
    let input = Input {
        compute,
        weights,
        rows,
        cols,
        hessian: &input_hessian,
        factor: &factor,
        norms: &norms,
        col_spreads: None,
    };
    let packed = quantize(&input)?;
    let stored = packed.encoding.view(rows as u64, cols as u64, &packed.payload)?.decode();
    let difference: Vec<f32> = weights.iter().zip(&stored).map(|(w, q)| w - q).collect();
    let error = energy(&difference, hessian, cols);
    Ok((stored, error))
}

/// tr(W H Wᵀ).
fn energy(weights: &[f32], hessian: &[f64], cols: usize) -> f64 {
    let row = |row: &[f32]| -> f64 {
        let product =
            |h: &[f64]| -> f64 { h.iter().zip(row).map(|(h, w)| h * f64::from(*w)).sum() };
        row.iter().zip(hessian.chunks_exact(cols)).map(|(w, h)| f64::from(*w) * product(h)).sum()
    };
    weights.chunks_exact(cols).map(row).sum()
}

/// A⁻¹ B by elimination without pivots, A [n, n] positive definite, B [n, m].
fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
    let m = b.len().checked_div(n).unwrap_or(0);
    for k in 0..n {
        for i in (0..n).filter(|i| *i != k) {
            let factor = a[i * n + k] / a[k * n + k];
            if factor != 0.0 {
                (k..n).for_each(|j| a[i * n + j] -= factor * a[k * n + j]);
                (0..m).for_each(|j| b[i * m + j] -= factor * b[k * m + j]);
            }
        }
    }
    for (i, row) in b.chunks_exact_mut(m.max(1)).enumerate() {
        row.iter_mut().for_each(|v| *v /= a[i * n + i]);
    }
    b
}

fn square(v: f32) -> f64 {
    f64::from(v).powi(2)
}
