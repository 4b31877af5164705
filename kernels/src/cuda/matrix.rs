//! Packed matrices on a device: the payload exactly as it is in the file.

use stb_format::encoding::Encoding;

use super::device::{Buffer, Device};
use super::encoding::{self, GemvCall, ListedRows, MatrixPart, MatrixParts};
use super::error::{Error, Result};
use super::precision::ActivationPrecision;

/// A packed matrix in the memory of a device.
#[derive(Debug)]
pub struct Matrix {
    payload: Buffer<u8>,
    encoding: Encoding,
    parts: MatrixParts,
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
        encoding::dequantize(&encoding::of_all_rows(encoding))?;
        let view = encoding
            .view(rows as u64, cols as u64, payload)
            .map_err(|e| Error::Unsupported { why: e.to_string() })?;
        let buffer = device.upload("a weight matrix", payload)?;
        let parts = MatrixParts::new(encoding, &view, payload, buffer.address())?;
        Ok(Self { payload: buffer, encoding: encoding.clone(), parts })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.parts.all.params.rows()
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.parts.all.params.cols()
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

    /// All rows. The weights of listed rows are not used.
    pub(super) fn all(&self) -> &MatrixPart {
        &self.parts.all
    }

    /// The listed rows.
    pub(super) fn listed(&self) -> Option<&ListedRows> {
        self.parts.listed.as_ref()
    }

    /// Whether two matrices can be multiplied with the same input in one launch. Those with listed rows take several
    /// launches.
    #[must_use]
    pub fn shares_launch(&self, other: &Self) -> bool {
        let module = |m: &Self| {
            let (matrices, precision) = (&[][..], ActivationPrecision::F32);
            let call = GemvCall { matrices, precision, tokens: 1 };
            encoding::gemv(&m.parts.all.encoding, call).map(|kernel| kernel.module).ok()
        };
        let is_whole = self.listed().is_none() && other.listed().is_none();
        is_whole && self.cols() == other.cols() && module(self) == module(other)
    }
}
