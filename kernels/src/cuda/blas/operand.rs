//! Row-major matrices in buffers, as operands of products.

use super::column_major::{ColumnMajor, GemmFactor, MatrixOp};
use crate::cuda::device::Buffer;

/// The size of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixSize {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// The size of a product C = A · B: A is [m, k], B is [k, n] and C is [m, n].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmSize {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A and rows of B.
    pub k: usize,
}

/// A row-major matrix that an operation reads, or its transpose.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    pub(in crate::cuda) buffer: &'a Buffer<f32>,
    /// The index of the first element.
    pub(in crate::cuda) first: usize,
    /// Elements from one row to the next.
    pub(in crate::cuda) stride: usize,
    pub(in crate::cuda) is_transposed: bool,
}

/// A row-major matrix that an operation writes.
#[derive(Debug)]
pub struct OperandMut<'a> {
    pub(in crate::cuda) buffer: &'a mut Buffer<f32>,
    /// The index of the first element.
    pub(in crate::cuda) first: usize,
    /// Elements from one row to the next.
    pub(in crate::cuda) stride: usize,
}

impl<'a> Operand<'a> {
    /// The matrix whose first element is element `first` of `buffer`, with `stride` elements from one
    /// row to the next.
    #[must_use]
    pub fn new(buffer: &'a Buffer<f32>, first: usize, stride: usize) -> Self {
        Self { buffer, first, stride, is_transposed: false }
    }

    /// The transpose.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { is_transposed: !self.is_transposed, ..self }
    }

    /// The operand as a factor of the library, if it is of this size after transposition. To the
    /// library a row-major matrix is its transpose, so the operation stays the same.
    pub(super) fn factor(&self, rows: usize, cols: usize) -> GemmFactor {
        let (op, [rows, cols]) = match self.is_transposed {
            false => (MatrixOp::None, [rows, cols]),
            true => (MatrixOp::Transpose, [cols, rows]),
        };
        let size = MatrixSize { rows, cols };
        GemmFactor { op, matrix: column_major(self.buffer, self.first, self.stride, size) }
    }
}

impl<'a> OperandMut<'a> {
    /// The matrix whose first element is element `first` of `buffer`, with `stride` elements from one
    /// row to the next.
    #[must_use]
    pub fn new(buffer: &'a mut Buffer<f32>, first: usize, stride: usize) -> Self {
        Self { buffer, first, stride }
    }

    /// The matrix as the library sees it, if it is of this size.
    pub(super) fn column_major(&self, size: MatrixSize) -> ColumnMajor {
        column_major(self.buffer, self.first, self.stride, size)
    }
}

/// # Panics
/// If the buffer does not hold a matrix of this size from element `first` on, or if a size exceeds
/// `i32`.
pub(super) fn column_major<T>(
    buffer: &Buffer<T>,
    first: usize,
    stride: usize,
    size: MatrixSize,
) -> ColumnMajor {
    let MatrixSize { rows, cols } = size;
    assert!(cols <= stride && rows > 0, "rows do not overlap");
    assert!(first + (rows - 1) * stride + cols <= buffer.len(), "a matrix of this size");
    let address = buffer.address() + (first * size_of::<T>()) as u64;
    ColumnMajor { address, stride: to_i32(stride) }
}

/// # Panics
/// If `n` exceeds `i32`.
pub(super) fn to_i32(n: usize) -> i32 {
    i32::try_from(n).expect("a size of a matrix")
}
