//! The encodings that the CUDA kernels support.
//!
//! An encoding is one file here, one line of the registry below, and its kernels in `kernels/cuda`.
//! The file implements `CudaEncoding` for the parameters of the encoding and `PackedView` for the
//! format's view of such a matrix. Mixed rows have no kernels of their own: such a matrix is two of other encodings.

mod dense;
mod int_group;
mod interface;
mod mixed_rows;
mod nm;
mod rows;
mod stbllm;
mod trellis;

use stb_format::encoding::{Encoding, MatrixView};

use super::error::{Error, Result};
use super::launch::to_u32;
use super::module::Module;
pub use interface::MatrixParams;
pub(super) use interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemmTile, GemvCall, GemvKernel, Preparation,
};
use interface::{MatrixLayout, PackedView as _, PayloadStart};
pub(super) use mixed_rows::{ListedRows, MatrixPart, MatrixParts, of_all_rows};

/// Each name is a variant of [`Encoding`] and of [`MatrixView`].
macro_rules! registry {
    ($($encoding:ident)*) => {
        /// The CUDA side of an encoding.
        ///
        /// # Errors
        /// [`Error::Unsupported`] for encodings without kernels.
        pub(super) fn of(encoding: &Encoding) -> Result<&dyn CudaEncoding> {
            match encoding {
                $(Encoding::$encoding(parameters) => Ok(parameters),)*
                other => Err(unsupported(other)),
            }
        }

        /// The offsets of the segments of a matrix' payload.
        fn layout(view: &MatrixView<'_>, payload: PayloadStart) -> Result<MatrixLayout> {
            match view {
                $(MatrixView::$encoding(view) => view.layout(payload),)*
                // The two matrices of which it consists have layouts: see mixed_rows.rs.
                MatrixView::MixedRows(view) => Err(unsupported(&Encoding::MixedRows(view.spec))),
            }
        }

        /// The modules of all encodings.
        pub(super) fn modules() -> Vec<Module> {
            [$(stb_format::encoding::$encoding::modules()),*].concat()
        }
    };
}

registry! {
    Dense
    IntGroup
    Stbllm
    Nm
    Trellis
}

impl MatrixParams {
    /// The parameters of the matrix `view`, a view of `payload`, whose copy on the device is at
    /// `address`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the matrix is too large for the kernels.
    pub fn new(view: &MatrixView<'_>, payload: &[u8], address: u64) -> Result<Self> {
        let mut layout = layout(view, PayloadStart::new(payload))?;
        layout.rows = to_u32("a matrix with rows", view.rows())?;
        layout.cols = to_u32("a matrix with columns", view.cols())?;
        Ok(Self { payload: address, layout })
    }

    /// A matrix of this size without weights, for plans that are not run.
    #[cfg(test)]
    pub(super) fn empty(rows: u32, cols: u32) -> Self {
        let layout = MatrixLayout { rows, cols, ..MatrixLayout::default() };
        Self { payload: 0, layout }
    }

    /// Output features.
    pub(super) fn rows(&self) -> usize {
        self.layout.rows as usize
    }

    /// Input features.
    pub(super) fn cols(&self) -> usize {
        self.layout.cols as usize
    }
}

/// The error for an encoding, or parameters of one, without a kernel.
pub(super) fn unsupported(encoding: &Encoding) -> Error {
    Error::Unsupported {
        why: format!("there is no CUDA kernel for the encoding {encoding}; use --device cpu"),
    }
}

/// The GEMV kernel for a call.
///
/// # Errors
/// [`Error::Unsupported`] if there is none.
pub(super) fn gemv(encoding: &Encoding, call: GemvCall<'_>) -> Result<GemvKernel> {
    of(encoding)?.gemv(call).ok_or_else(|| unsupported(encoding))
}

/// The kernel that converts rows to f32.
///
/// # Errors
/// [`Error::Unsupported`] if there is none.
pub(super) fn dequantize(encoding: &Encoding) -> Result<DequantizeKernel> {
    of(encoding)?.dequantize().ok_or_else(|| unsupported(encoding))
}
