//! Packed matrices on a device: the payload exactly as it is in the file.

use stb_format::encoding::Encoding;

use super::device::{Buffer, Device};
use super::encoding::{self, GemvCall, MatrixParams};
use super::error::{Error, Result};
use super::precision::ActivationPrecision;

/// A packed matrix in the memory of a device.
#[derive(Debug)]
pub struct Matrix {
    payload: Buffer<u8>,
    encoding: Encoding,
    params: MatrixParams,
}

impl Matrix {
    /// Copies the payload of a matrix, [rows, cols], to the device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the payload is not that of such a matrix or there is no kernel for
    /// it, [`Error::Memory`] if there is too little memory, [`Error::Driver`].
    pub fn upload(
        device: &Device,
        encoding: &Encoding,
        rows: usize,
        cols: usize,
        payload: &[u8],
    ) -> Result<Self> {
        encoding::dequantize(encoding)?;
        let view = encoding
            .view(rows as u64, cols as u64, payload)
            .map_err(|e| Error::Unsupported { why: e.to_string() })?;
        let buffer = device.upload("a weight matrix", payload)?;
        let params = MatrixParams::new(&view, payload, buffer.address())?;
        Ok(Self { payload: buffer, encoding: encoding.clone(), params })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.params.rows()
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.params.cols()
    }

    /// The encoding of the weights.
    #[must_use]
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.payload.device()
    }

    /// The kernels' view of the matrix.
    pub(super) fn params(&self) -> MatrixParams {
        self.params
    }

    /// Whether two matrices can be multiplied with the same input in one launch.
    #[must_use]
    pub fn shares_launch(&self, other: &Self) -> bool {
        let module = |m: &Self| {
            let (matrices, precision) = (&[][..], ActivationPrecision::F32);
            let kernel = encoding::gemv(&m.encoding, GemvCall { matrices, precision, tokens: 1 });
            kernel.map(|kernel| kernel.module).ok()
        };
        self.cols() == other.cols() && module(self) == module(other)
    }
}
