//! Compares every kernel, on every instruction set of this machine, with one naive oracle: the exact decoder of
//! the format and a product in f64. All instruction sets must agree bit for bit.

mod common;

use common::random::{encodings, payload};
use stb_format::Encoding;
use stb_format::encoding::{CoarseRowsView, Dense, MatrixView};
use stb_format::half::f16;
use stb_kernels::{
    ActivationsQ8, GemvScratch, Isa, PackedGemmQ8, Panels, ROW_TILE, gemm, gemm_q8, gemv,
    gemv_batch, ops, packed,
};
use stb_random::Rng;

/// Shapes with ragged rows, columns, groups, units, blocks and chunks.
const SHAPES: [(usize, usize); 7] =
    [(1, 1), (16, 64), (33, 172), (80, 352), (17, 31), (70, 700), (5, 1100)];

/// The shapes that the encoding allows.
fn shapes(encoding: &Encoding) -> impl Iterator<Item = (usize, usize)> {
    let least = match encoding {
        Encoding::MixedRows(spec) => spec.count() as usize,
        _ => 1,
    };
    SHAPES.into_iter().filter(move |(rows, _)| *rows >= least)
}

fn close(found: f32, exact: f64, magnitude: f64, what: &str) {
    // Summation in f32: a few rounding errors of the sum of magnitudes.
    let tolerance = 1e-5 * magnitude + 1e-30;
    assert!((f64::from(found) - exact).abs() <= tolerance, "{what}: {found} instead of {exact}");
}

#[test]
fn products_match_the_oracle_on_every_isa() {
    let mut rng = Rng(1);
    for encoding in encodings() {
        for (rows, cols) in shapes(&encoding) {
            let bytes = payload(&mut rng, &encoding, rows, cols);
            encoding.check_payload(rows as u64, cols as u64, &bytes).unwrap();
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            let weights = view.decode();
            let tokens = 1 + rng.below(40);
            let x = rng.floats(tokens * cols);
            let exact = |r: usize, t: usize| {
                let terms = (0..cols)
                    .map(|c| f64::from(weights[r * cols + c]) * f64::from(x[t * cols + c]));
                terms.fold((0.0, 0.0), |(sum, abs), term| (sum + term, abs + term.abs()))
            };
            let mut reference: Option<(Vec<u32>, Vec<u32>)> = None;
            for isa in Isa::available() {
                let what = format!("{encoding} {rows}x{cols} {}", isa.name());
                let mut scratch = GemvScratch::default();
                let prepared = packed(&view).prepare(isa, &x[..cols], &mut scratch);
                let mut y = vec![f32::NAN; rows];
                gemv(isa, packed(&view), prepared, 0, &mut y);
                for r in 0..rows {
                    let (sum, abs) = exact(r, 0);
                    close(y[r], sum, abs, &what);
                }
                let mut panels = Panels::default();
                panels.pack(&x, cols);
                let stride = panels.all().row_stride();
                let mut z = vec![f32::NAN; rows * stride];
                gemm(isa, packed(&view), panels.all(), 0, &mut z);
                for (r, t) in (0..rows).flat_map(|r| (0..tokens).map(move |t| (r, t))) {
                    let (sum, abs) = exact(r, t);
                    close(z[r * stride + t], sum, abs, &what);
                }
                let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<u32>>();
                let found = (bits(&y), bits(&z));
                let reference = reference.get_or_insert_with(|| found.clone());
                assert!(*reference == found, "{what}: other bits than the best set");
            }
        }
    }
}

/// Activations of a block whose largest is below 127 / `f32::MAX` have no 8-bit codes.
const COUNTS_AS_ZERO: f64 = 3.74e-37;

/// Products with 8-bit activations stay within the documented bound and have the same bits on every set and for
/// every split, also for outliers and zeros.
#[test]
fn q8_products_keep_their_bound_on_every_isa() {
    let mut rng = Rng(6);
    let mut kernels = 0;
    for encoding in encodings() {
        for (rows, cols) in shapes(&encoding) {
            let bytes = payload(&mut rng, &encoding, rows, cols);
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            let weights = view.decode();
            for kind in 0..4 {
                let mut x = rng.floats(cols);
                match kind {
                    1 => x[rng.below(cols)] = 1e4,
                    2 => x.fill(0.0),
                    3 => x.iter_mut().for_each(|v| *v *= 1e-36),
                    _ => {}
                }
                let factors = match &view {
                    MatrixView::Nm(m) => m.col_factors,
                    MatrixView::Trellis(m) => m.col_factors,
                    MatrixView::MixedRows(m) => match m.coarse {
                        CoarseRowsView::Trellis(m) => m.col_factors,
                        _ => &[],
                    },
                    _ => &[],
                };
                let factor =
                    |c: usize| factors.get(c).map_or(1.0, |b| f16::from_le_bytes(*b).to_f64());
                // a / 254 for the block of column c, where a is the largest |x · factor|.
                let step = |c: usize| {
                    let block = c / 128 * 128..(c / 128 * 128 + 128).min(cols);
                    let largest = block.map(|c| (f64::from(x[c]) * factor(c)).abs());
                    largest.fold(0.0, f64::max) / 254.0
                };
                let steps: Vec<f64> = (0..cols).map(step).collect();
                let mut reference: Option<Vec<u32>> = None;
                for isa in Isa::available() {
                    let what = format!("{encoding} {rows}x{cols} {} {kind}", isa.name());
                    let mut scratch = GemvScratch::default();
                    let prepared = packed(&view).prepare_q8(isa, &x, &mut scratch);
                    let mut y = vec![f32::NAN; rows];
                    for (i, y) in y.chunks_mut(3 * ROW_TILE).enumerate() {
                        gemv(isa, packed(&view), prepared, i * 3 * ROW_TILE, y);
                    }
                    for r in 0..rows {
                        let (mut sum, mut size, mut bound) = (0.0, 0.0, 0.0);
                        for c in 0..cols {
                            let w = f64::from(weights[r * cols + c]);
                            let term = w * f64::from(x[c]);
                            let factor = factor(c);
                            sum += term;
                            size += term.abs();
                            if factor != 0.0 {
                                bound += (w / factor).abs() * (steps[c] + COUNTS_AS_ZERO);
                            }
                        }
                        let tolerance = 1.001 * bound + 1e-5 * (size + bound) + 1e-40;
                        let error = (f64::from(y[r]) - sum).abs();
                        assert!(error <= tolerance, "{what}: {} for {sum} ± {tolerance}", y[r]);
                    }
                    let bits: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
                    let reference = reference.get_or_insert_with(|| bits.clone());
                    assert!(*reference == bits, "{what}: other bits than the best set");
                    kernels += usize::from(format!("{prepared:?}").contains("Some"));
                }
            }
        }
    }
    // An activation that is not finite makes the result NaN.
    for encoding in encodings() {
        let bytes = payload(&mut rng, &encoding, 16, 300);
        let view = encoding.view(16, 300, &bytes).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = rng.floats(300);
            x[130] = bad;
            for isa in Isa::available() {
                let mut scratch = GemvScratch::default();
                let prepared = packed(&view).prepare_q8(isa, &x, &mut scratch);
                if format!("{prepared:?}").contains("Some") {
                    let mut y = vec![0.0; 16];
                    gemv(isa, packed(&view), prepared, 0, &mut y);
                    assert!(y.iter().all(|v| v.is_nan()), "{encoding} {} {y:?}", isa.name());
                }
            }
        }
    }
    assert!(kernels > 100, "most N:M codes and all integer groups have a kernel");
}

/// Tokens of a small batch have the same results as alone.
#[test]
fn tokens_of_a_small_batch_do_not_depend_on_each_other() {
    let mut rng = Rng(8);
    for encoding in encodings() {
        for (rows, cols) in shapes(&encoding) {
            let bytes = payload(&mut rng, &encoding, rows, cols);
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            for tokens in [1, 3, 4, 6, 9] {
                let x = rng.floats(tokens * cols);
                for isa in Isa::available() {
                    let mut scratches: Vec<GemvScratch> = Vec::new();
                    scratches.resize_with(tokens, GemvScratch::default);
                    let mut alone = vec![0.0; tokens * rows];
                    for ((scratch, x), y) in
                        scratches.iter_mut().zip(x.chunks(cols)).zip(alone.chunks_mut(rows))
                    {
                        let x = packed(&view).prepare_q8(isa, x, scratch);
                        gemv(isa, packed(&view), x, 0, y);
                    }
                    let prepared: Vec<_> = scratches.iter().map(GemvScratch::input).collect();
                    let mut together = vec![f32::NAN; tokens * rows];
                    gemv_batch(isa, packed(&view), &prepared, 0, &mut together);
                    assert!(together == alone, "{encoding} {rows}x{cols} {tokens} {}", isa.name());
                }
            }
        }
    }
}

/// Quantizes all tokens for the q8 GEMM.
fn quantize(isa: Isa, kernel: &dyn PackedGemmQ8, x: &[f32], to: &mut ActivationsQ8) {
    let layout = kernel.layout(isa, x.len() / kernel.cols());
    let chunks = to.chunks(layout, x, kernel.cols());
    chunks.into_iter().for_each(|mut chunk| kernel.quantize(isa, &mut chunk));
}

/// The results of the portable GEMV for each token alone.
fn alone(view: &MatrixView<'_>, x: &[f32]) -> Vec<f32> {
    let (rows, scalar) = (view.rows(), Isa::scalar());
    let mut all = vec![0.0; x.len() / view.cols() * rows];
    for (x, y) in x.chunks(view.cols()).zip(all.chunks_mut(rows)) {
        let mut scratch = GemvScratch::default();
        let matrix = packed(view);
        gemv(scalar, matrix, matrix.prepare_q8(scalar, x, &mut scratch), 0, y);
    }
    all
}

/// Tokens of a GEMM have the same results as alone, bit for bit, on every set and for every split.
#[test]
fn tokens_of_a_q8_gemm_do_not_depend_on_each_other() {
    let mut rng = Rng(7);
    let mut kernels = 0;
    for encoding in encodings() {
        for (rows, cols) in shapes(&encoding) {
            let bytes = payload(&mut rng, &encoding, rows, cols);
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            let Some(kernel) = packed(&view).gemm_q8() else { continue };
            for tokens in [1, 2, 7, 16, 17, 33, 50] {
                let mut x = rng.floats(tokens * cols);
                x[rng.below(tokens * cols)] = 1e3;
                let alone = alone(&view, &x);
                for isa in Isa::available() {
                    let mut together = ActivationsQ8::default();
                    quantize(isa, kernel, &x, &mut together);
                    let size = together.group();
                    let mut y = vec![f32::NAN; together.groups() * size * rows];
                    for (group, y) in y.chunks_mut(size * rows).enumerate() {
                        for first in (0..rows).step_by(48) {
                            let part = first..rows.min(first + 48);
                            let mut y: Vec<_> =
                                y.chunks_mut(rows).map(|y| &mut y[part.clone()]).collect();
                            gemm_q8(isa, kernel, &together, group, first, &mut y);
                        }
                    }
                    for (i, (found, alone)) in y.iter().zip(&alone).enumerate() {
                        assert_eq!(
                            found.to_bits(),
                            alone.to_bits(),
                            "{encoding} {rows}x{cols} {} token {} of {tokens} row {}: {found}",
                            isa.name(),
                            i / rows,
                            i % rows,
                        );
                    }
                    kernels += 1;
                }
            }
        }
    }
    assert!(kernels > 100, "most N:M codes have a kernel");
}

/// A part of the rows gives the same bits as all of them: threads may split anywhere.
#[test]
fn results_do_not_depend_on_the_split() {
    let mut rng = Rng(2);
    let (rows, cols) = (150, 352);
    for encoding in encodings() {
        let bytes = payload(&mut rng, &encoding, rows, cols);
        let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
        let x = rng.floats(5 * cols);
        let isa = Isa::available().next().unwrap();
        let mut scratch = GemvScratch::default();
        let prepared = packed(&view).prepare(isa, &x[..cols], &mut scratch);
        let mut panels = Panels::default();
        panels.pack(&x, cols);
        let stride = panels.all().row_stride();
        let mut whole = (vec![0.0; rows], vec![0.0; rows * stride]);
        gemv(isa, packed(&view), prepared, 0, &mut whole.0);
        gemm(isa, packed(&view), panels.all(), 0, &mut whole.1);
        for count in [ROW_TILE, 3 * ROW_TILE] {
            let mut parts = (vec![0.0; rows], vec![0.0; rows * stride]);
            for (i, y) in parts.0.chunks_mut(count).enumerate() {
                gemv(isa, packed(&view), prepared, i * count, y);
            }
            for (i, y) in parts.1.chunks_mut(count * stride).enumerate() {
                gemm(isa, packed(&view), panels.all(), i * count, y);
            }
            assert!(whole == parts, "{encoding} in parts of {count}");
        }
    }
}

/// Products with strided, transposed and partial panels equal a naive product.
#[test]
fn panels_of_every_kind() {
    let mut rng = Rng(5);
    let (rows, cols, tokens) = (20, 45, 70);
    let weights = rng.floats(rows * cols);
    let x = rng.floats(tokens * 50);
    let isa = Isa::available().next().unwrap();
    for (used_cols, used_tokens) in [(cols, tokens), (cols, 33), (13, 64), (1, 1)] {
        let part: Vec<f32> =
            (0..rows * used_cols).map(|i| weights[i / used_cols * cols + i % used_cols]).collect();
        let bytes = Dense::F32.encode(&part);
        let encoding = Encoding::Dense(Dense::F32);
        let view = encoding.view(rows as u64, used_cols as u64, &bytes).unwrap();
        for transposed in [false, true] {
            let mut panels = Panels::default();
            let at = |t: usize, c: usize| if transposed { c * tokens + t } else { t * 50 + c };
            if transposed {
                panels.pack_transposed(&x, tokens, cols, tokens);
            } else {
                panels.pack_strided(&x, tokens, cols, 50);
            }
            let used = panels.first(used_tokens, used_cols);
            let mut y = vec![0.0; rows * used.row_stride()];
            gemm(isa, packed(&view), used, 0, &mut y);
            for (r, t) in (0..rows).flat_map(|r| (0..used_tokens).map(move |t| (r, t))) {
                let terms = (0..used_cols)
                    .map(|c| f64::from(weights[r * cols + c]) * f64::from(x[at(t, c)]));
                close(y[r * used.row_stride() + t], terms.sum(), cols as f64, "panels");
            }
        }
    }
}

#[test]
fn vector_operations_match_f64_on_every_isa() {
    let mut rng = Rng(3);
    for n in [1, 15, 16, 17, 33, 100] {
        let x: Vec<f32> = rng.floats(n).iter().map(|v| v * 20.0).collect();
        let w = rng.floats(n);
        let f = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        let (dx, dw) = (f(&x), f(&w));
        let mut reference: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let what = format!("{n} elements, {}", isa.name());
            let dot: f64 = dx.iter().zip(&dw).map(|(a, b)| a * b).sum();
            close(ops::dot(isa, &x, &w), dot, 20.0 * n as f64, &what);

            let mut softmax = x.clone();
            ops::softmax(isa, &mut softmax);
            let max = dx.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = dx.iter().map(|v| (v - max).exp()).sum();
            let exact = max + sum.ln();
            let found = f64::from(ops::log_sum_exp(isa, &x));
            assert!((found - exact).abs() <= 1e-5, "log-sum-exp {found} {exact}, {what}");
            for (found, v) in softmax.iter().zip(&dx) {
                let exact = (v - max).exp() / sum;
                assert!(
                    (f64::from(*found) - exact).abs() <= 2e-6 * exact + 1e-12,
                    "softmax, {what}"
                );
            }

            let mut gate = x.clone();
            ops::activate_mul(isa, stb_format::Activation::Silu, &mut gate, &w);
            for ((found, v), w) in gate.iter().zip(&dx).zip(&dw) {
                close(*found, v / (1.0 + (-v).exp()) * w, v.abs(), &format!("silu, {what}"));
            }

            let mut norm = vec![0.0; n];
            ops::rms_norm(isa, &x, &w, 1e-5, &mut norm);
            let rms = (dx.iter().map(|v| v * v).sum::<f64>() / n as f64 + 1e-5).sqrt();
            for ((found, v), w) in norm.iter().zip(&dx).zip(&dw) {
                close(*found, v / rms * w, (v / rms).abs(), &format!("norm, {what}"));
            }

            let all: Vec<u32> =
                [softmax, gate, norm].concat().iter().map(|v| v.to_bits()).collect();
            let reference = reference.get_or_insert_with(|| all.clone());
            assert!(*reference == all, "{what}: other bits than the best set");
        }
    }
}
