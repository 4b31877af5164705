//! Matrices and products as cuBLAS and cuSOLVER describe them.

/// `cublasOperation_t`: a column-major matrix as it is stored, or its transpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MatrixOp {
    None = 0,
    Transpose = 1,
}

/// `cudaDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataType {
    F32 = 0,
    Bf16 = 14,
}

/// A column-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct ColumnMajor {
    /// The address of its first element.
    pub address: u64,
    /// The leading dimension: elements from one column to the next.
    pub stride: i32,
}

/// A factor of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmFactor {
    pub op: MatrixOp,
    pub matrix: ColumnMajor,
}

/// C [m, n] = alpha · op(A) · op(B) + beta · C, column-major; A is [m, k] and B is [k, n] after
/// their operations.
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmCall {
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub alpha: f32,
    pub a: GemmFactor,
    pub b: GemmFactor,
    pub beta: f32,
    pub c: ColumnMajor,
}
