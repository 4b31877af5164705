//! [`Weight`]: a weight matrix in mapped or owned memory.

use std::ops::Range;
use std::sync::Arc;

use stb_format::encoding::{Dense, Encoding, MatrixView};

use crate::error::{Error, Result};
use crate::map::Bytes;

/// A weight matrix: encoding, shape and a shared reference to its bytes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Weight {
    bytes: Arc<Bytes>,
    range: Range<usize>,
    encoding: Encoding,
    rows: u64,
    cols: u64,
}

impl Weight {
    /// `rows` × `cols` weights in `bytes[range]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the range does not hold such a matrix, [`Error::Unsupported`] if the
    /// encoding is unknown.
    pub fn new(
        bytes: Arc<Bytes>,
        range: Range<usize>,
        encoding: Encoding,
        rows: u64,
        cols: u64,
    ) -> Result<Self> {
        let payload = bytes.get(range.clone()).unwrap_or_default();
        if let Err(e) = encoding.view(rows, cols, payload) {
            return Err(match e.rule() {
                stb_format::Rule::EncodingUnknown => Error::unsupported(e.to_string()),
                _ => Error::invalid(e.to_string()),
            });
        }
        Ok(Self { bytes, range, encoding, rows, cols })
    }

    /// A dense f32 matrix in memory; `values` is [rows, cols].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the number of values is wrong.
    pub fn from_floats(values: Vec<f32>, rows: u64, cols: u64) -> Result<Self> {
        let range = 0..values.len() * 4;
        let bytes = Arc::new(Bytes::Floats(values));
        Self::new(bytes, range, Encoding::Dense(Dense::F32), rows, cols)
    }

    /// A matrix with a copy of the packed `payload`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the payload has the wrong length, [`Error::Unsupported`] if the encoding
    /// is unknown.
    pub fn from_payload(payload: &[u8], encoding: Encoding, rows: u64, cols: u64) -> Result<Self> {
        let bytes = Arc::new(Bytes::copied(payload));
        Self::new(bytes, 0..payload.len(), encoding, rows, cols)
    }

    /// The rows `rows` of a dense matrix, in place.
    ///
    /// # Errors
    /// [`Error::Internal`] if the matrix is not dense or has fewer rows.
    pub(crate) fn rows_in_place(&self, rows: Range<usize>) -> Result<Self> {
        let size = self.dense_row_bytes(&rows, self.rows())?;
        let start = self.range.start + rows.start * size;
        let range = start..start + rows.len() * size;
        Self::new(self.bytes.clone(), range, self.encoding.clone(), rows.len() as u64, self.cols)
    }

    /// A copy of the rows `rows` of the transpose of a dense matrix.
    ///
    /// # Errors
    /// [`Error::Internal`] if the matrix is not dense or has fewer columns.
    pub(crate) fn transposed_rows(&self, rows: Range<usize>) -> Result<Self> {
        let row_bytes = self.dense_row_bytes(&rows, self.cols())?;
        let size = row_bytes / self.cols();
        let mut payload = Vec::with_capacity(rows.len() * self.rows() * size);
        for col in rows.clone() {
            for row in self.bytes().chunks_exact(row_bytes) {
                payload.extend_from_slice(&row[col * size..(col + 1) * size]);
            }
        }
        Self::from_payload(&payload, self.encoding.clone(), rows.len() as u64, self.rows)
    }

    /// Bytes of a row of a dense matrix that has `most` rows (or columns), of which `rows` are asked for.
    fn dense_row_bytes(&self, rows: &Range<usize>, most: usize) -> Result<usize> {
        match &self.encoding {
            Encoding::Dense(kind) if rows.end <= most => Ok(self.cols() * kind.bytes() as usize),
            _ => Err(Error::Internal { what: format!("rows {rows:?} of a matrix with {most}") }),
        }
    }

    /// The elements of a dense matrix as one row.
    ///
    /// # Errors
    /// [`Error::Internal`] if the matrix is not dense.
    pub(crate) fn as_vector(&self) -> Result<Self> {
        self.dense_row_bytes(&(0..0), 0)?;
        Ok(Self { rows: 1, cols: self.rows * self.cols, ..self.clone() })
    }

    /// The matrix in place.
    ///
    /// # Panics
    /// Never: the constructor has validated the payload.
    #[must_use]
    pub fn view(&self) -> MatrixView<'_> {
        let payload = &self.bytes[self.range.clone()];
        self.encoding.view(self.rows, self.cols, payload).expect("validated when made")
    }

    /// The number of rows (output features).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows as usize
    }

    /// The number of columns (input features).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols as usize
    }

    /// The encoding of the weights.
    #[must_use]
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// The number of stored bytes.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// The stored bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    /// Decodes all weights, [rows, cols].
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        self.view().decode()
    }
}
