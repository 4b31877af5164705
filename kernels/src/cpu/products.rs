//! Products of packed matrices with activations: arguments are checked here, for all encodings.

use std::cell::RefCell;

use crate::cpu::ops::panels::{PanelsRef, WeightBlock};
use crate::cpu::ops::q8::{GemvInput, PAD};
use crate::cpu::ops::q8_batch::ActivationsQ8;
use crate::cpu::packed::{PackedGemmQ8, PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// Rows that a kernel computes together. Callers split matrices at multiples of this.
pub const ROW_TILE: usize = 16;

/// The largest batch for which [`gemv_batch`] pays off with any encoding.
pub const GEMV_MAX_BATCH: usize = 48;

/// Columns unpacked at a time; a multiple of 128.
const UNPACK_COLS: usize = 256;
/// Rows unpacked at a time.
const UNPACK_ROWS: usize = 64;

/// Whether activations prepared for `a` (quantized, if `q8`) can also be used with `b`.
#[must_use]
pub fn shares_activations(a: &dyn PackedMatrix, b: &dyn PackedMatrix, q8: bool) -> bool {
    a.cols() == b.cols()
        && a.activation_layout(q8).is_some_and(|layout| b.activation_layout(q8) == Some(layout))
}

/// `y[r] = Σ_c w[first + r, c] · x[c]` for the rows that `y` has room for.
///
/// # Panics
/// If `first` is not a multiple of [`ROW_TILE`], if the rows are not inside the matrix, or
/// if `x` was prepared for a matrix of another width.
pub fn gemv(isa: Isa, matrix: &dyn PackedMatrix, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
    check_rows(matrix, first, y.len());
    check_width(matrix, x);
    matrix.gemv(isa, x, first, y);
}

/// [`gemv`] for several tokens: `y` holds the rows for the first token, then for the next.
///
/// # Panics
/// As for [`gemv`], or if `x` is empty or the length of `y` is not a multiple of its length.
pub fn gemv_batch(
    isa: Isa,
    matrix: &dyn PackedMatrix,
    x: &[GemvInput<'_>],
    first: usize,
    y: &mut [f32],
) {
    assert!(!x.is_empty() && y.len().is_multiple_of(x.len()), "as many rows for each token");
    check_rows(matrix, first, y.len() / x.len());
    x.iter().for_each(|x| check_width(matrix, *x));
    matrix.gemv_batch(isa, x, first, y);
}

fn check_rows(matrix: &dyn PackedMatrix, first: usize, count: usize) {
    assert!(first.is_multiple_of(ROW_TILE), "work is split at row tiles");
    assert!(count <= matrix.rows() && first <= matrix.rows() - count, "rows outside the matrix");
}

fn check_width(matrix: &dyn PackedMatrix, x: GemvInput<'_>) {
    let width = matrix.cols().next_multiple_of(PAD);
    assert_eq!(x.values.len(), width, "activations of another width");
}

/// `y[r, t] = Σ_c w[first + r, c] · x[t, c]`: output rows of [`PanelsRef::row_stride`] floats, of
/// which the first `tokens` count. Weights are unpacked into cache a block at a time.
///
/// # Panics
/// If `first` is not a multiple of [`ROW_TILE`], the rows are not inside the matrix, the
/// widths differ, or `y` is not whole rows.
pub fn gemm(isa: Isa, matrix: &dyn PackedMatrix, x: PanelsRef<'_>, first: usize, y: &mut [f32]) {
    assert_eq!(x.cols(), matrix.cols(), "one activation per column");
    let stride = x.row_stride();
    assert!(stride != 0 && y.len().is_multiple_of(stride), "whole rows of output");
    check_rows(matrix, first, y.len() / stride);
    y.fill(0.0);
    UNPACKED.with_borrow_mut(|weights| {
        weights.resize(UNPACK_ROWS * UNPACK_COLS, 0.0);
        for (i, y) in y.chunks_mut(UNPACK_ROWS * stride).enumerate() {
            let (first_row, rows) = (first + i * UNPACK_ROWS, y.len() / stride);
            for first_col in (0..x.cols()).step_by(UNPACK_COLS) {
                let used = UNPACK_COLS.min(x.cols() - first_col);
                // Unpacked rows have a width of whole steps of 128 columns.
                let cols = used.next_multiple_of(PAD);
                matrix.unpack(isa, UnpackBlock { first_row, rows, first_col, cols }, weights);
                let block = WeightBlock { weights, stride: cols, rows, first_col, cols: used };
                x.add_product(isa, &block, y);
            }
        }
    });
}

thread_local! {
    /// Unpacked weights, [row][column].
    static UNPACKED: RefCell<Vec<f32>> = RefCell::default();
}

/// `y[t][r] = Σ_c w[first + r, c] · x[t, c]` with quantized activations, for the tokens t of the group `group`;
/// `y` has a piece for each of [`ActivationsQ8::group`] tokens, and pieces past the last token are unspecified.
///
/// # Panics
/// If `first` is not a multiple of [`ROW_TILE`], the rows are not inside the matrix, the
/// widths differ, pieces are missing or empty or differ in length, there is no such group, or
/// activations were prepared for another instruction set.
pub fn gemm_q8(
    isa: Isa,
    matrix: &dyn PackedGemmQ8,
    x: &ActivationsQ8,
    group: usize,
    first: usize,
    y: &mut [&mut [f32]],
) {
    assert_eq!(x.cols, matrix.cols(), "one activation per column");
    assert!(group < x.groups(), "a group of tokens");
    let y = &mut y[..(x.tokens - group * x.group).min(x.group)];
    let rows = y[0].len();
    assert!(rows != 0 && y.iter().all(|y| y.len() == rows), "the same rows of every token");
    check_rows(matrix, first, rows);
    matrix.multiply(isa, x, group, first, y);
}

const _: () = assert!(UNPACK_COLS.is_multiple_of(PAD) && UNPACK_ROWS.is_multiple_of(ROW_TILE));
