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

    /// The memory that holds the stored bytes.
    pub(crate) fn shared_bytes(&self) -> &Arc<Bytes> {
        &self.bytes
    }

    /// Decodes all weights, [rows, cols].
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        self.view().decode()
    }
}
