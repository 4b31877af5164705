//! Kernels for the CPU: a trait of vector operations, one implementation per instruction set, and
//! the algorithms over it.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod bytes;
mod gemm;
mod gemm8;
mod int8;
mod int_group;
pub mod kv;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neon;
mod nm;
mod nm8;
pub mod ops;
pub mod probe;
mod rows;
pub(crate) mod scalar;
mod stbllm8;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vbmi;

use stb_format::encoding::MatrixView;

use crate::isa::{Isa, Task};

pub(crate) use bytes::Bytes;
pub use gemm::{Panels, PanelsRef, gemm};
pub use gemm8::{ActivationsQ8, RoundingPart, gemm_min_batch, gemm_q8, has_gemm_q8, prefill_batch};
use int8::Rounded;

/// Operations on 16 lanes of f32 (`F`) or u32 (`I`). A value of the implementing type proves that
/// the machine has its instructions. Every implementation gives the same bits.
pub(crate) trait Simd: Copy {
    /// 16 × f32.
    type F: Copy;
    /// 16 × u32, two's complement where signed.
    type I: Copy;
    /// Rows of the matrix-multiplication micro-kernel.
    const GEMM_ROWS: usize;
    /// Vectors of 16 activations of the micro-kernel.
    const GEMM_VECTORS: usize;

    /// Runs a task compiled for this instruction set.
    fn enter<T: Task>(self, task: T) -> T::Output;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, v: &[f32; 16]) -> Self::F;
    /// From little-endian binary32.
    fn load_bytes(self, v: &[u8; 64]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a × b + c, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// The bits of the numbers.
    fn cast_i(self, a: Self::F) -> Self::I;
    /// The numbers with these bits.
    fn cast_f(self, a: Self::I) -> Self::F;
    /// From signed integers, rounded.
    fn to_f32(self, a: Self::I) -> Self::F;
    /// To signed integers, toward zero; the lanes must be in range.
    fn to_i32(self, a: Self::F) -> Self::I;

    fn splat_i(self, v: u32) -> Self::I;
    fn widen_u8(self, v: &[u8; 16]) -> Self::I;
    /// From little-endian 16-bit numbers.
    fn widen_u16(self, v: &[u8; 32]) -> Self::I;
    /// From little-endian binary16.
    fn f16_to_f32(self, v: &[u8; 32]) -> Self::F;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// `by` < 32.
    fn shl(self, a: Self::I, by: u32) -> Self::I;
    /// Logical; `by` < 32.
    fn shr(self, a: Self::I, by: u32) -> Self::I;
    /// All ones where a > b as signed numbers, else zero.
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `v` in lane i where bit i is set, else zero.
    fn select_bits(self, bits: u16, v: u32) -> Self::I;
    /// `table[index & 15]` for each lane.
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F;
    /// Low bits of `bits` in order at the set bits of `mask`.
    fn deposit(self, bits: u64, mask: u64) -> u64;

    /// The low 16 bits of each lane, little-endian.
    #[inline(always)]
    fn store_low_u16(self, v: Self::I, to: &mut [u8; 32]) {
        let mut lanes = [0.0; 16];
        self.store(self.cast_f(v), &mut lanes);
        for (to, lane) in to.as_chunks_mut::<2>().0.iter_mut().zip(lanes) {
            *to = (lane.to_bits() as u16).to_le_bytes();
        }
    }

    /// The sum of all lanes, in one fixed order.
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let mut v = [0.0; 16];
        self.store(a, &mut v);
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                v[i] += v[i + half];
            }
            half /= 2;
        }
        v[0]
    }
}

/// Activations are padded with zeros to a multiple of this, so that kernels read whole vectors.
pub(crate) const PAD: usize = 128;

/// Reusable memory for the activations of one product at a time.
#[derive(Default, Debug)]
pub struct Workspace {
    x: Vec<f32>,
    rounded: Rounded,
    is_rounded: bool,
}

/// Activations ready for [`gemv`] with one matrix: padded, column factors applied; rounded to 8
/// bits if that was asked for and there is a kernel for it.
#[derive(Clone, Copy, Debug)]
pub struct Prepared<'a> {
    x: &'a [f32],
    rounded: Option<&'a Rounded>,
}

impl Workspace {
    /// Prepares `x` (one element per column of `matrix`) as it is.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn prepare(&mut self, matrix: &MatrixView<'_>, x: &[f32]) -> Prepared<'_> {
        self.set(matrix, x);
        if let MatrixView::Nm(nm) = matrix {
            nm::multiply_factors(scalar::Scalar, nm, &mut self.x);
        }
        self.is_rounded = false;
        self.prepared()
    }

    /// What was prepared last.
    #[must_use]
    pub fn prepared(&self) -> Prepared<'_> {
        Prepared { x: &self.x, rounded: self.is_rounded.then_some(&self.rounded) }
    }

    /// Prepares `x` rounded to 8 bits with one scale per 128 columns, for encodings that have a kernel
    /// for it: integer groups, and joint codes and the STBLLM structure with blocks of whole 128
    /// columns or none. A product then differs from the exact one by at most
    /// Σ_blocks max|x| / 254 · Σ|w|, and by summation in f32. For other encodings the same as
    /// [`Workspace::prepare`].
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn prepare_q8(&mut self, isa: Isa, matrix: &MatrixView<'_>, x: &[f32]) -> Prepared<'_> {
        self.set(matrix, x);
        if !int8::supports(matrix) {
            return self.prepare(matrix, x);
        }
        self.set(matrix, x);
        self.is_rounded = true;
        isa.run(Round { matrix, x: &mut self.x, to: &mut self.rounded });
        self.prepared()
    }

    fn set(&mut self, matrix: &MatrixView<'_>, x: &[f32]) {
        assert_eq!(x.len(), matrix.cols(), "one activation per column");
        self.x.clear();
        self.x.extend_from_slice(x);
        self.x.resize(x.len().next_multiple_of(PAD), 0.0);
    }
}

/// Whether activations that are prepared for `a` (rounded, if `rounded`) serve `b` as well.
#[must_use]
pub fn shares_activations(a: &MatrixView<'_>, b: &MatrixView<'_>, rounded: bool) -> bool {
    let factors = |m: &MatrixView<'_>| matches!(m, MatrixView::Nm(m) if !m.col_factors.is_empty());
    let arrangement = |m: &MatrixView<'_>| match m {
        MatrixView::Nm(nm) if int8::supports(m) => (nm.spec.n(), nm.spec.m()),
        MatrixView::Stbllm(_) if int8::supports(m) => (32, 0),
        MatrixView::IntGroup(m) => (16 + usize::from(m.spec.is_odd()), usize::from(m.spec.bits())),
        _ => (0, 0),
    };
    a.cols() == b.cols()
        && !factors(a)
        && !factors(b)
        && (!rounded || arrangement(a) == arrangement(b))
}

struct Round<'a> {
    matrix: &'a MatrixView<'a>,
    x: &'a mut [f32],
    to: &'a mut Rounded,
}

impl Task for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        if let MatrixView::Nm(m) = self.matrix {
            nm::multiply_factors(s, m, self.x);
        }
        self.to.set(s, self.matrix, self.x);
    }
}

/// `y[r] = Σ_c w[first + r, c] · x[c]` for the rows that `y` has room for.
///
/// # Panics
/// If `first` is not a multiple of [`crate::ROW_TILE`], if the rows are not inside the matrix, or
/// if `x` was prepared for a matrix of another width.
pub fn gemv(isa: Isa, matrix: &MatrixView<'_>, x: Prepared<'_>, first: usize, y: &mut [f32]) {
    assert!(first.is_multiple_of(crate::ROW_TILE), "work is split at row tiles");
    assert!(first + y.len() <= matrix.rows(), "rows outside the matrix");
    assert_eq!(x.x.len(), matrix.cols().next_multiple_of(PAD), "activations of another width");
    isa.run(Gemv { matrix, x, first, y });
}

/// [`gemv`] for several tokens: `y` holds the rows for the first token, then for the next.
///
/// # Panics
/// As [`gemv`], or if `y` is not as many rows for each token.
pub fn gemv_batch(
    isa: Isa,
    matrix: &MatrixView<'_>,
    x: &[Prepared<'_>],
    first: usize,
    y: &mut [f32],
) {
    assert!(!x.is_empty() && y.len().is_multiple_of(x.len()), "as many rows for each token");
    assert!(first.is_multiple_of(crate::ROW_TILE), "work is split at row tiles");
    assert!(first + y.len() / x.len() <= matrix.rows(), "rows outside the matrix");
    let width = matrix.cols().next_multiple_of(PAD);
    assert!(x.iter().all(|x| x.x.len() == width), "activations of another width");
    let rows = y.len() / x.len();
    let shares = matches!(matrix, MatrixView::Nm(_) | MatrixView::IntGroup(_));
    for (x, y) in x.chunks(TOGETHER).zip(y.chunks_mut(TOGETHER * rows)) {
        let rounded: Option<Vec<&Rounded>> = x.iter().map(|x| x.rounded).collect();
        match rounded {
            Some(x) if shares && x.len() > 1 => isa.run(Tokens { matrix, x: &x, rows, first, y }),
            _ => {
                for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                    gemv(isa, matrix, *x, first, y);
                }
            }
        }
    }
}

/// Up to how many tokens share what codes are taken apart to: twice as many have tables that the first
/// cache does not hold.
const TOGETHER: usize = 4;

/// Products for up to [`TOGETHER`] tokens; those that are missing are computed and thrown away.
struct Tokens<'a> {
    matrix: &'a MatrixView<'a>,
    x: &'a [&'a Rounded],
    rows: usize,
    first: usize,
    y: &'a mut [f32],
}

impl Task for Tokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, x, rows, first, y } = self;
        let mut all = [x[0]; TOGETHER];
        all[..x.len()].copy_from_slice(x);
        match matrix {
            MatrixView::Nm(m) => nm8::gemv(s, m, all, rows, first, y),
            MatrixView::IntGroup(m) => int_group::gemv(s, m, all, rows, first, y),
            _ => unreachable!("an encoding whose tokens share work"),
        }
    }
}

struct Gemv<'a> {
    matrix: &'a MatrixView<'a>,
    x: Prepared<'a>,
    first: usize,
    y: &'a mut [f32],
}

impl Task for Gemv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, x, first, y } = self;
        match (matrix, x.rounded) {
            (MatrixView::Nm(m), Some(x)) => return nm8::gemv(s, m, [x], y.len(), first, y),
            (MatrixView::Stbllm(m), Some(x)) => return stbllm8::gemv(s, m, x, first, y),
            (MatrixView::IntGroup(m), Some(x)) => {
                return int_group::gemv(s, m, [x], y.len(), first, y);
            }
            _ => {}
        }
        let x = x.x;
        match matrix {
            MatrixView::Nm(m) => nm::gemv(s, m, x, first, y),
            MatrixView::Dense(m) => rows::gemv(s, m, x, first, y),
            MatrixView::IntGroup(m) => rows::gemv(s, m, x, first, y),
            MatrixView::Stbllm(m) => rows::gemv(s, m, x, first, y),
        }
    }
}

/// The 16 floats from `at`.
///
/// # Panics
/// If they are not all inside `v`.
#[inline(always)]
pub(crate) fn lanes(v: &[f32], at: usize) -> &[f32; 16] {
    v[at..at + 16].first_chunk().expect("a slice of 16")
}
