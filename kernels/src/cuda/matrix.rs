//! Packed matrices on a device: the payload exactly as it is in the file.

use stb_format::encoding::{Encoding, MatrixView};

use super::device::{Buffer, Device};
use super::encoding::{self, GemvCall, MatrixParams};
use super::error::{Error, Result};
use super::precision::ActivationPrecision;

/// A packed matrix in the memory of a device.
#[derive(Debug)]
pub struct Matrix {
    payload: Buffer<u8>,
    encoding: Encoding,
    all: MatrixPart,
    listed: Option<ListedRows>,
}

/// Rows of a matrix in one encoding that has kernels.
#[derive(Debug)]
pub(super) struct MatrixPart {
    /// Their encoding.
    pub encoding: Encoding,
    /// The kernels' view of them.
    pub params: MatrixParams,
}

/// The rows of a matrix that are stored a second time, which counts: encodings §6 of the specification.
#[derive(Debug)]
pub(super) struct ListedRows {
    /// The address of their numbers in the matrix, u32, ascending in a valid file.
    pub numbers: u64,
    /// These rows, as a matrix of their own.
    pub part: MatrixPart,
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
        let all = encoding::of_all_rows(encoding);
        encoding::dequantize(&all)?;
        let view = encoding
            .view(rows as u64, cols as u64, payload)
            .map_err(|e| Error::Unsupported { why: e.to_string() })?;
        let buffer = device.upload("a weight matrix", payload)?;
        // The numbers of listed rows are at the start of the payload.
        let address = buffer.address();
        let part = |encoding, view: &MatrixView<'_>| {
            let params = MatrixParams::new(view, payload, address)?;
            Ok(MatrixPart { encoding, params })
        };
        let (all, listed) = match view {
            MatrixView::MixedRows(view) => {
                let fine = Encoding::IntGroup(view.spec.fine());
                let fine = part(fine, &MatrixView::IntGroup(view.fine))?;
                (part(all, &view.coarse.matrix())?, Some(ListedRows { numbers: address, part: fine }))
            }
            _ => (part(all, &view)?, None),
        };
        Ok(Self { payload: buffer, encoding: encoding.clone(), all, listed })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.all.params.rows()
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.all.params.cols()
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

    /// All rows. Those that are listed do not count there.
    pub(super) fn all(&self) -> &MatrixPart {
        &self.all
    }

    /// The listed rows.
    pub(super) fn listed(&self) -> Option<&ListedRows> {
        self.listed.as_ref()
    }

    /// Whether two matrices can be multiplied with the same input in one launch. Those with listed rows take several
    /// launches.
    #[must_use]
    pub fn shares_launch(&self, other: &Self) -> bool {
        let module = |m: &Self| {
            let (matrices, precision) = (&[][..], ActivationPrecision::F32);
            let call = GemvCall { matrices, precision, tokens: 1 };
            encoding::gemv(&m.all.encoding, call).map(|kernel| kernel.module).ok()
        };
        let is_whole = self.listed.is_none() && other.listed.is_none();
        is_whole && self.cols() == other.cols() && module(self) == module(other)
    }
}
