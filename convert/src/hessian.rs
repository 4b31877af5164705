//! The Hessian of a layer's inputs, and its factors for error compensation.

use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::*;
use rayon::prelude::*;
use stb_kernels::{Isa, Panels, dense, gemm};
use stb_runtime::{Error, Result};

use crate::products::{TASK_ROWS, add_cross_products, product, transpose};

/// H = (2/n) Σ Xᵀ X over n calibration sequences, X [tokens, in] (the scale of GPTQ and BiLLM).
#[derive(Clone, Debug)]
pub struct Hessian {
    /// Input features.
    pub size: usize,
    /// [in, in]; only the lower triangle until [`Hessian::finish`].
    matrix: Vec<f32>,
    sequences: usize,
}

impl Hessian {
    /// Zero, for `size` input features.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self { size, matrix: vec![0.0; size * size], sequences: 0 }
    }

    /// A Hessian from a finished symmetric matrix, [size, size].
    ///
    /// # Panics
    /// If the number of elements is wrong.
    #[must_use]
    pub fn from_matrix(matrix: Vec<f32>, size: usize) -> Self {
        assert_eq!(matrix.len(), size * size);
        Self { size, matrix, sequences: 0 }
    }

    /// Adds Xᵀ X of a batch, `x` [tokens, in]. Rounding depends on the order of calls, not on the number of
    /// threads.
    ///
    /// # Panics
    /// If the length of `x` is no multiple of the input features.
    pub fn add(&mut self, isa: Isa, x: &[f32]) {
        let size = self.size;
        assert!(x.len().is_multiple_of(size), "whole tokens");
        let tokens = x.len() / size;
        // An expert may have no tokens.
        if tokens == 0 {
            return;
        }
        let mut panels = Panels::default();
        // The panels hold the columns of H; the product sums over tokens.
        panels.pack_transposed(x, size, tokens, size);
        let transposed = transpose(x, tokens, size); // [in, tokens]
        let left = dense(&transposed, size, tokens);
        self.matrix.par_chunks_mut(TASK_ROWS * size).enumerate().for_each_init(
            Vec::new,
            |product, (task, rows)| {
                let first = task * TASK_ROWS;
                let used = panels.first((first + rows.len() / size).min(size), tokens);
                let stride = used.row_stride();
                product.resize(rows.len() / size * stride, 0.0);
                gemm(isa, &left, used, first, product);
                for (row, product) in rows.chunks_exact_mut(size).zip(product.chunks(stride)) {
                    for (h, p) in row.iter_mut().zip(&product[..used.tokens()]) {
                        *h += p;
                    }
                }
            },
        );
    }

    /// Counts a sequence whose tokens have all been added.
    pub fn count_sequence(&mut self) {
        self.sequences += 1;
    }

    /// Scales by 2/n and fills the upper triangle.
    pub fn finish(&mut self) {
        self.finish_tokens(self.sequences);
    }

    /// [`Hessian::finish`] with n = `tokens`, so that the diagonal is twice the mean square of each feature.
    pub(crate) fn finish_tokens(&mut self, tokens: usize) {
        let scale = 2.0 / tokens.max(1) as f32;
        self.matrix.par_iter_mut().for_each(|h| *h *= scale);
        let size = self.size;
        for i in 0..size {
            for j in 0..i {
                self.matrix[j * size + i] = self.matrix[i * size + j];
            }
        }
    }

    /// F H F for a diagonal F with these `factors`, one per input feature: the Hessian of inputs times the factors.
    pub(crate) fn scaled(&self, factors: &[f32]) -> Self {
        let mut matrix = self.matrix.clone();
        matrix.par_chunks_mut(self.size.max(1)).zip(factors).for_each(|(row, left)| {
            row.iter_mut().zip(factors).for_each(|(h, right)| *h *= left * right);
        });
        Self { matrix, ..*self }
    }

    /// The elements, [in, in].
    #[must_use]
    pub fn matrix(&self) -> &[f32] {
        &self.matrix
    }

    /// The diagonal: twice the mean squared norm of each input feature.
    #[must_use]
    pub fn diagonal(&self) -> Vec<f32> {
        self.matrix.iter().step_by(self.size + 1).copied().collect()
    }

    /// Indices of the input features that are zero in all tokens.
    #[must_use]
    pub fn dead(&self) -> Vec<usize> {
        let zero = self.diagonal().into_iter().enumerate().filter(|(_, d)| *d == 0.0);
        zero.map(|(j, _)| j).collect()
    }

    /// Adds `damping` · mean(diag H) to the diagonal; dead features get 1 before that.
    pub fn damp(&mut self, damping: f64) {
        for j in self.dead() {
            self.matrix[j * (self.size + 1)] = 1.0;
        }
        let diagonal = self.diagonal();
        let mean = diagonal.iter().map(|d| f64::from(*d)).sum::<f64>() / self.size as f64;
        let add = (damping * mean) as f32;
        self.matrix.iter_mut().step_by(self.size + 1).for_each(|d| *d += add);
    }

    /// Shrinks the Hessian of few tokens: with n `tokens` and d features it gets the weight n / (n + d), so one of
    /// d tokens a half, and `target` with the same trace the rest; without a target, a multiple of the identity.
    /// Without tokens, the target itself remains.
    pub fn shrink(&mut self, tokens: usize, target: Option<&Self>) {
        let size = self.size;
        let own = tokens as f32 / (tokens + size).max(1) as f32;
        let trace = |hessian: &Self| hessian.diagonal().iter().map(|d| f64::from(*d)).sum::<f64>();
        let mean = match trace(self) / size.max(1) as f64 {
            mean if mean > 0.0 => mean,
            _ => target.map_or(1.0, |target| trace(target) / size.max(1) as f64),
        };
        self.matrix.par_iter_mut().for_each(|h| *h *= own);
        match target {
            Some(target) => {
                let target_mean = trace(target) / size.max(1) as f64;
                let scale = if target_mean > 0.0 { mean / target_mean } else { 0.0 };
                let factor = (1.0 - own) * scale as f32;
                self.matrix
                    .par_iter_mut()
                    .zip(&target.matrix)
                    .for_each(|(h, target)| *h += factor * target);
            }
            None => {
                let add = (1.0 - own) * mean as f32;
                self.matrix.iter_mut().step_by(size + 1).for_each(|d| *d += add);
            }
        }
    }

    /// Multiplies the diagonal by 1 + `ridge`, which does not depend on the scale of a feature. Dead features get 1,
    /// and a damping of 1e-4 keeps the matrix positive definite.
    pub fn add_ridge(&mut self, ridge: f64) {
        let factor = (1.0 + ridge) as f32;
        self.matrix.iter_mut().step_by(self.size + 1).for_each(|d| *d *= factor);
        self.damp(1e-4);
    }
}

/// Bytes of a Hessian of `size` input features and its factors: H, M and U in f32.
#[must_use]
pub fn memory(size: u64) -> u64 {
    size * size * 12
}

/// Bytes of scratch for the factorization of a Hessian: two f64 copies.
#[must_use]
pub fn factoring_memory(size: u64) -> u64 {
    size * size * 16
}

/// (2/n) Σ Aᵀ X over n calibration sequences, A [tokens, rows] and X [tokens, cols]: the cross
/// term between the inputs X of a layer and another quantity A.
#[derive(Clone, Debug)]
pub struct CrossHessian {
    /// [rows, cols].
    matrix: Vec<f32>,
    cols: usize,
    sequences: usize,
}

impl CrossHessian {
    /// Zero, [rows, cols].
    #[must_use]
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { matrix: vec![0.0; rows * cols], cols, sequences: 0 }
    }

    /// Adds `sequences` sequences: `a` is [tokens, rows], `x` [tokens, cols].
    ///
    /// # Panics
    /// If the numbers of tokens differ.
    pub fn add(&mut self, isa: Isa, a: &[f32], x: &[f32], sequences: usize) {
        let rows = self.matrix.len() / self.cols;
        add_cross_products(isa, a, rows, x, self.cols, &mut self.matrix);
        self.sequences += sequences;
    }

    /// The elements, [rows, cols], with the same scale as the Hessian.
    #[must_use]
    pub fn finish(mut self) -> Vec<f32> {
        let scale = 2.0 / self.sequences.max(1) as f32;
        self.matrix.par_iter_mut().for_each(|m| *m *= scale);
        self.matrix
    }
}

/// H = M Mᵀ with M upper triangular, and U = M⁻¹, so that H⁻¹ = Uᵀ U: the factor whose rows spread
/// the error of a column over the later ones (GPTQ). One factorization gives both; the diagonal
/// blocks of M are the inverses of those of U, which makes exact block updates a product.
#[derive(Clone, Debug)]
pub struct Factor {
    /// Input features.
    pub size: usize,
    /// U, [in, in], upper triangular.
    pub u: Vec<f32>,
    /// M, [in, in], upper triangular.
    pub m: Vec<f32>,
}

impl Factor {
    /// Factors a damped Hessian, in f64.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not positive definite: NaN activations or no damping.
    pub fn new(hessian: &Hessian) -> Result<Self> {
        let n = hessian.size;
        // The input of a linear layer that the decoder layer does not have.
        if n == 0 {
            return Ok(Self { size: 0, u: Vec::new(), m: Vec::new() });
        }
        // The upper factor is the lower factor of the matrix with rows and columns reversed.
        let mut lower = Mat::<f64>::from_fn(n, n, |i, j| {
            f64::from(hessian.matrix[(n - 1 - i) * n + (n - 1 - j)])
        });
        let par = Par::Seq;
        let scratch = cholesky_in_place_scratch::<f64>(n, par, default());
        let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
        let stack = faer::dyn_stack::MemStack::new(&mut memory);
        cholesky_in_place(lower.as_mut(), default(), par, stack, default())
            .map_err(|_| not_positive_definite())?;
        let mut inverse = Mat::<f64>::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), lower.as_ref(), par);
        let reversed = |matrix: &Mat<f64>| {
            let mut out = vec![0.0; n * n];
            out.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
                for j in i..n {
                    row[j] = matrix[(n - 1 - i, n - 1 - j)] as f32;
                }
            });
            out
        };
        Ok(Self { size: n, u: reversed(&inverse), m: reversed(&lower) })
    }

    /// The factors of [`Hessian::scaled`], for `factors` other than zero: F M, and U F⁻¹.
    pub(crate) fn scaled(&self, factors: &[f32]) -> Self {
        let Self { size, mut u, mut m } = self.clone();
        u.par_chunks_mut(size.max(1)).for_each(|row| {
            row.iter_mut().zip(factors).for_each(|(u, factor)| *u /= factor);
        });
        m.par_chunks_mut(size.max(1)).zip(factors).for_each(|(row, factor)| {
            row.iter_mut().for_each(|m| *m *= factor);
        });
        Self { size, u, m }
    }

    /// 1 / U_jj² for each column: the cost of a squared error in that column after compensation.
    #[must_use]
    pub fn importance(&self) -> Vec<f32> {
        self.m.iter().step_by(self.size + 1).map(|m| m * m).collect()
    }
}

/// The error for a Hessian that cannot be factored.
pub(crate) fn not_positive_definite() -> Error {
    Error::invalid(
        "the Hessian of the calibration inputs is not positive definite; use more calibration text \
         or a larger damping",
    )
}

/// (W H Wᵀ)_ii of each row of `weights`, [rows, in], on the CPU.
pub(crate) fn output_errors(isa: Isa, weights: &[f32], hessian: &Hessian) -> Vec<f64> {
    let cols = hessian.size;
    let mut panels = Panels::default();
    panels.pack(hessian.matrix(), cols);
    let part = |rows: &[f32]| -> Vec<f64> {
        let mut out = Vec::new();
        let stride = product(isa, rows, cols, &panels, &mut out);
        let dot = |(w, h): (&[f32], &[f32])| -> f64 {
            w.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum()
        };
        rows.chunks_exact(cols).zip(out.chunks_exact(stride)).map(dot).collect()
    };
    let parts: Vec<Vec<f64>> = weights.par_chunks(TASK_ROWS * cols).map(part).collect();
    parts.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_match_their_definitions() {
        let (n, tokens) = (37, 90);
        let x: Vec<f32> = (0..n * tokens).map(|i| ((i * i * 31 + i) % 101) as f32 - 50.0).collect();
        let mut hessian = Hessian::new(n);
        let isa = Isa::detect().unwrap();
        hessian.add(isa, &x[..n * 40]);
        hessian.count_sequence();
        hessian.add(isa, &x[n * 40..]);
        hessian.count_sequence();
        hessian.finish();
        for i in 0..n {
            for j in 0..n {
                let sum: f64 =
                    (0..tokens).map(|t| f64::from(x[t * n + i]) * f64::from(x[t * n + j])).sum();
                let h = f64::from(hessian.matrix()[i * n + j]);
                assert!((h - sum).abs() <= 1e-3 * sum.abs().max(1e3), "{i} {j}: {h} {sum}");
            }
        }
        hessian.damp(0.01);
        let factor = Factor::new(&hessian).unwrap();
        for i in 0..n {
            for j in 0..n {
                let at = |m: &[f32], r: usize, c: usize| f64::from(m[r * n + c]);
                let h: f64 = (0..n).map(|k| at(&factor.m, i, k) * at(&factor.m, j, k)).sum();
                assert!((h - at(hessian.matrix(), i, j)).abs() < 1.0, "{i} {j}");
                let one: f64 = (0..n).map(|k| at(&factor.m, i, k) * at(&factor.u, k, j)).sum();
                assert!((one - f64::from(i == j)).abs() < 1e-4, "{i} {j}: {one}");
                assert!(i <= j || (at(&factor.u, i, j) == 0.0 && at(&factor.m, i, j) == 0.0));
            }
        }
    }

    /// An expert that no calibration token uses.
    #[test]
    fn no_tokens_leave_the_target() {
        let target = Hessian::from_matrix(vec![2.0, 1.0, 1.0, 2.0], 2);
        let mut hessian = Hessian::new(2);
        hessian.add(Isa::detect().unwrap(), &[]);
        hessian.count_sequence();
        hessian.finish();
        hessian.shrink(0, Some(&target));
        assert_eq!(hessian.matrix(), target.matrix());
    }

    #[test]
    fn few_tokens_are_shrunk_towards_the_target_of_the_same_trace() {
        let target = Hessian::from_matrix(vec![2.0, 1.0, 1.0, 2.0], 2);
        let few = || Hessian::from_matrix(vec![4.0, 0.0, 0.0, 4.0], 2);
        let mut hessian = few();
        hessian.shrink(2, Some(&target));
        assert_eq!(hessian.matrix(), [4.0, 1.0, 1.0, 4.0]);
        let mut hessian = Hessian::from_matrix(vec![4.0, 2.0, 2.0, 0.0], 2);
        hessian.shrink(2, None);
        assert_eq!(hessian.matrix(), [3.0, 1.0, 1.0, 1.0]);
        let mut hessian = Hessian::from_matrix(vec![0.0; 4], 2);
        hessian.shrink(0, Some(&target));
        assert_eq!(hessian.matrix(), target.matrix());
        let mut hessian = Hessian::from_matrix(vec![0.0; 4], 2);
        hessian.shrink(0, None);
        assert_eq!(hessian.matrix(), [1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn a_broken_matrix_is_an_error() {
        let hessian = Hessian::from_matrix(vec![1.0, 2.0, 2.0, 1.0], 2);
        assert!(Factor::new(&hessian).is_err());
    }
}
