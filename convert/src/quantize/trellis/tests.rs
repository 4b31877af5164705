use stb_kernels::Isa;
use stb_random::Rng;

use super::*;
use crate::hessian::{Factor, Hessian, output_errors};
use crate::quantize::decode;

/// Sums of uniform numbers: nearly normal, with variance 1.
fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| (0..12).map(|_| rng.float()).sum::<f32>() / 2.0).collect()
}

/// The error of the output relative to the output, and the packed matrix.
fn quantized(
    options: TrellisOptions,
    weights: &[f32],
    rows: usize,
    hessian: &Hessian,
) -> (f64, Packed) {
    let isa = Isa::detect().unwrap();
    let factor = Factor::new(hessian).unwrap();
    let (cols, norms) = (weights.len() / rows, vec![1.0; weights.len() / rows]);
    let compute = isa.into();
    let input = Input {
        compute,
        weights,
        rows,
        cols,
        hessian,
        factor: &factor,
        norms: &norms,
        col_spreads: None,
    };
    let packed = options.quantize(&input, None).unwrap();
    packed.encoding.check_payload(rows as u64, cols as u64, &packed.payload).unwrap();
    let found = decode(&packed, rows, cols);
    let error: Vec<f32> = weights.iter().zip(&found).map(|(w, q)| w - q).collect();
    let sum = |values: &[f32]| output_errors(isa, values, hessian).iter().sum::<f64>();
    (sum(&error) / sum(weights), packed)
}

/// Columns of large weights, as in embeddings: with column factors the error is about that of weights of one distribution,
/// without them most of it is in the large columns.
#[test]
fn column_factors_even_out_columns_of_large_weights() {
    let mut rng = Rng(7);
    let (rows, cols) = (64, 200);
    let mut identity = vec![0.0; cols * cols];
    identity.iter_mut().step_by(cols + 1).for_each(|d| *d = 1.0);
    let hessian = Hessian::from_matrix(identity, cols);
    let mut weights = normal(&mut rng, rows * cols);
    for row in weights.chunks_exact_mut(cols) {
        for column in [3, 90, 199] {
            row[column] *= 8.0;
        }
        // A column of zeros has a factor, too.
        row[17] = 0.0;
    }
    let plain = options(2, 1, 0);
    let factors = TrellisOptions { spec: plain.spec.with_col_factors(true), ..plain };
    let (plain, _) = quantized(plain, &weights, rows, &hessian);
    let (error, packed) = quantized(factors, &weights, rows, &hessian);
    assert!(error < 0.11 && plain > 2.0 * error, "{error} with factors, {plain} without");
    assert!(packed.encoding.to_string().ends_with("+cols"));
}

fn options(step_bits: u8, step_weights: u8, sweeps: usize) -> TrellisOptions {
    TrellisOptions { spec: Trellis::new(step_bits, step_weights, 4, 128).unwrap(), sweeps }
}

/// The squared error per weight of independent normal weights, for each rate: scalar codes of the same rate have .363 (1
/// bit), .117, .035 and .0095.
#[test]
fn errors_of_normal_weights_are_those_of_the_trellis() {
    let mut rng = Rng(3);
    let (rows, cols) = (48, 256);
    let mut identity = vec![0.0; cols * cols];
    identity.iter_mut().step_by(cols + 1).for_each(|d| *d = 1.0);
    let hessian = Hessian::from_matrix(identity, cols);
    let weights = normal(&mut rng, rows * cols);
    let limits = [0.57, 0.305, 0.172, 0.091, 0.055, 0.0265, 0.0083];
    for (rate, limit) in TrellisRate::ALL.iter().zip(limits) {
        let options = options(rate.step_bits() as u8, rate.step_weights() as u8, 0);
        let (error, _) = quantized(options, &weights, rows, &hessian);
        assert!(error < limit && error > 0.85 * limit, "{rate:?}: {error}");
    }
}

/// A correlated Hessian, rows and columns that do not fill tiles and units, and a row of zeros: each round of searches
/// lowers the error of the output.
#[test]
fn sweeps_lower_the_output_error() {
    let mut rng = Rng(5);
    let (rows, cols, tokens) = (37, 203, 600);
    let mut hessian = Hessian::new(cols);
    let mut x = normal(&mut rng, tokens * cols);
    for x in x.chunks_exact_mut(cols) {
        let shared = 2.0 * x[0];
        x.iter_mut().for_each(|v| *v += shared);
    }
    hessian.add(Isa::detect().unwrap(), &x);
    hessian.count_sequence();
    hessian.finish();
    hessian.damp(0.01);
    let mut weights = normal(&mut rng, rows * cols);
    weights[5 * cols..6 * cols].fill(0.0);
    for (step_bits, step_weights) in [(2, 1), (3, 2)] {
        let error = |sweeps| {
            quantized(options(step_bits, step_weights, sweeps), &weights, rows, &hessian).0
        };
        let errors = [error(0), error(1), error(3)];
        assert!(errors[0] > 1.02 * errors[1] && errors[1] > errors[2], "{errors:?}");
    }
    let (_, packed) = quantized(options(2, 1, 1), &weights, rows, &hessian);
    assert!(decode(&packed, rows, cols)[5 * cols..6 * cols].iter().all(|w| *w == 0.0));
}
