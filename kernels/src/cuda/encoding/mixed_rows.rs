//! Mixed rows: two matrices of encodings with kernels. `crate::cuda::mixed_rows` puts their results together.

use stb_format::encoding::{Encoding, MatrixView};

use super::interface::MatrixParams;
use crate::cuda::error::Result;

/// Rows of a matrix in one encoding that has kernels.
#[derive(Debug)]
pub(in crate::cuda) struct MatrixPart {
    /// Their encoding.
    pub encoding: Encoding,
    /// The kernels' view of them.
    pub params: MatrixParams,
}

/// The rows of a matrix that are stored a second time, from where their weights are taken.
#[derive(Debug)]
pub(in crate::cuda) struct ListedRows {
    /// The address of their numbers in the matrix, u32, ascending in a valid file.
    pub numbers: u64,
    /// These rows, as a matrix of their own.
    pub part: MatrixPart,
}

/// A matrix of any encoding.
#[derive(Debug)]
pub(in crate::cuda) struct MatrixParts {
    /// All rows. The weights of listed rows are not used.
    pub all: MatrixPart,
    /// The listed rows.
    pub listed: Option<ListedRows>,
}

impl MatrixParts {
    /// The parts of `view`, a view of `payload`, whose copy on the device is at `address`.
    ///
    /// # Errors
    /// [`crate::cuda::Error::Unsupported`] if the matrix is too large for the kernels.
    pub(in crate::cuda) fn new(
        encoding: &Encoding,
        view: &MatrixView<'_>,
        payload: &[u8],
        address: u64,
    ) -> Result<Self> {
        let part = |encoding, view: &MatrixView<'_>| {
            let params = MatrixParams::new(view, payload, address)?;
            Ok(MatrixPart { encoding, params })
        };
        let all = of_all_rows(encoding);
        let MatrixView::MixedRows(view) = view else {
            return Ok(Self { all: part(all, view)?, listed: None });
        };
        let fine = Encoding::IntGroup(view.spec.fine());
        let listed = part(fine, &MatrixView::IntGroup(view.fine))?;
        // The payload starts with the numbers.
        let listed = ListedRows { numbers: address, part: listed };
        Ok(Self { all: part(all, &view.coarse.matrix())?, listed: Some(listed) })
    }
}

/// The encoding of all rows of a matrix, some of which may be stored a second time.
pub(in crate::cuda) fn of_all_rows(encoding: &Encoding) -> Encoding {
    match encoding {
        Encoding::MixedRows(spec) => spec.coarse().encoding(),
        other => other.clone(),
    }
}
