//! The error of a unit of trellis codes, in the form that the search takes.
//!
//! The output error of a unit is Σ_rows eᵀ S e with e = target − weights and a matrix S that all rows share. With S = M Mᵀ
//! and M upper triangular it is a sum over columns of M_jj² (e_j + Σ_{i<j} e_i M_ij / M_jj)²: the error of a column is
//! measured against a target that depends on the errors of the columns before it in the same row.

use stb_format::encoding::trellis::STEP_COLS;
use stb_kernels::ops::trellis::{COLS, ROWS, TrellisMetric, TrellisTarget};

/// The error of a unit as a function of its weights; shared by all rows.
#[derive(Clone, Debug)]
pub(super) struct UnitMetric {
    /// For the search: D_j = M_jj² and F_ji = M_ij / M_jj.
    pub of_search: TrellisMetric,
    /// The inverse of S, in the order of columns.
    inverse: [[f32; COLS]; COLS],
}

/// The column of a unit that is searched at place `at` of a row: the weights of a step are 4 columns apart.
pub(super) fn column_at(at: usize, step_weights: usize) -> usize {
    at / step_weights + at % step_weights * STEP_COLS
}

impl UnitMetric {
    /// The metric of S, `width` × `width` and positive definite; columns from `width` to the `cols` of a unit do not count.
    pub(super) fn new(
        s: impl Fn(usize, usize) -> f64,
        width: usize,
        cols: usize,
        step_weights: usize,
    ) -> Self {
        let mut metric = Self { of_search: TrellisMetric::default(), inverse: [[0.0; COLS]; COLS] };
        let places: Vec<usize> =
            (0..cols).filter(|at| column_at(*at, step_weights) < width).collect();
        let column = |k: usize| column_at(places[k], step_weights);
        // S = M Mᵀ, from the last column to the first.
        let n = width;
        let mut m = vec![0.0f64; n * n];
        for j in (0..n).rev() {
            for i in (0..=j).rev() {
                let known: f64 = (j + 1..n).map(|k| m[i * n + k] * m[j * n + k]).sum();
                let rest = s(column(i), column(j)) - known;
                m[i * n + j] =
                    if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / m[j * n + j] };
            }
        }
        for j in 0..n {
            metric.of_search.weights[places[j]] = (m[j * n + j] * m[j * n + j]) as f32;
            for i in 0..j {
                metric.of_search.feedback[places[j]][places[i]] =
                    (m[i * n + j] / m[j * n + j]) as f32;
            }
        }
        // S⁻¹ = M⁻ᵀ M⁻¹: solves M y = e_k, then Mᵀ x = y.
        for k in 0..n {
            let mut x = vec![0.0f64; n];
            x[k] = 1.0;
            for i in (0..n).rev() {
                let sum: f64 = (i + 1..n).map(|j| m[i * n + j] * x[j]).sum();
                x[i] = (x[i] - sum) / m[i * n + i];
            }
            for i in 0..n {
                let sum: f64 = (0..i).map(|j| m[j * n + i] * x[j]).sum();
                x[i] = (x[i] - sum) / m[i * n + i];
            }
            for (i, x) in x.into_iter().enumerate() {
                metric.inverse[column(i)][column(k)] = x as f32;
            }
        }
        metric
    }

    /// S⁻¹ `residual`: the change of the weights of a row that removes the residual.
    pub(super) fn step(&self, residual: &[f32]) -> [f32; COLS] {
        let mut step = [0.0; COLS];
        for (step, line) in step.iter_mut().zip(&self.inverse) {
            *step = line.iter().zip(residual).map(|(a, b)| a * b).sum();
        }
        step
    }
}

/// The error of a unit with the weights `found`, [row][column], in units of the scale.
pub(super) fn unit_error(
    target: &TrellisTarget,
    metric: &TrellisMetric,
    found: &[[f32; COLS]; ROWS],
    step_weights: usize,
) -> f32 {
    let of_row = |r: usize| {
        let error = |at: usize| target.weights[r][at] - found[r][column_at(at, step_weights)];
        let squares = (0..STEP_COLS * step_weights).map(|j| {
            let feedback = (0..j).map(|i| metric.feedback[j][i] * error(i)).sum::<f32>();
            let e = error(j) + feedback;
            metric.weights[j] * e * e
        });
        squares.sum::<f32>() * target.importance[r]
    };
    (0..ROWS).map(of_row).sum()
}

/// The target of a unit with `count` rows and `width` columns, given its weights in the order of columns; rows with a
/// scale of zero do not count.
pub(super) fn unit_target(
    count: usize,
    width: usize,
    step_weights: usize,
    scale: impl Fn(usize) -> f32,
    weights: impl Fn(usize) -> [f32; COLS],
) -> TrellisTarget {
    let mut target = TrellisTarget::default();
    for r in 0..count.min(ROWS) {
        let scale = scale(r);
        if scale > 0.0 {
            target.importance[r] = scale * scale;
            let weights = weights(r);
            for at in 0..STEP_COLS * step_weights {
                let column = column_at(at, step_weights);
                if column < width {
                    target.weights[r][at] = weights[column] / scale;
                }
            }
        }
    }
    target
}
