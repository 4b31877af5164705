//! The CPU kernels of each encoding.

mod batch;
mod col_factors;
mod dense;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
mod expanded_amx;
mod gemm_task;
mod int_group;
mod mixed_rows;
mod nm;
mod row_major;
mod stbllm;
mod tile_scales;
mod trellis;

use stb_format::encoding::MatrixView;

use crate::cpu::packed::PackedMatrix;

pub use dense::dense;

/// The kernels of a matrix. This registry is the only place that distinguishes encodings.
#[must_use]
pub fn packed<'m>(view: &'m MatrixView<'_>) -> &'m dyn PackedMatrix {
    match view {
        MatrixView::Dense(matrix) => matrix,
        MatrixView::IntGroup(matrix) => matrix,
        MatrixView::Stbllm(matrix) => matrix,
        MatrixView::Nm(matrix) => matrix,
        MatrixView::MixedRows(matrix) => matrix,
        MatrixView::Trellis(matrix) => matrix,
    }
}
