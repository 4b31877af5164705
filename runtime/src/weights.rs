//! A weight matrix somewhere in mapped or owned memory.

use std::ops::Range;
use std::sync::Arc;

use stb_format::encoding::{Dense, Encoding, MatrixView};

use crate::error::{Error, Result};
use crate::map::Bytes;

/// A matrix of a model: encoding, shape and where its bytes are. Cheap to clone.
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

    /// Dense weights made in memory, `rows` × `cols`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the number of values is wrong.
    pub fn from_floats(values: Vec<f32>, rows: u64, cols: u64) -> Result<Self> {
        let range = 0..values.len() * 4;
        let bytes = Arc::new(Bytes::Floats(values));
        Self::new(bytes, range, Encoding::Dense(Dense::F32), rows, cols)
    }

    /// A packed payload in memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] if its length is wrong.
    pub fn from_payload(payload: &[u8], encoding: Encoding, rows: u64, cols: u64) -> Result<Self> {
        let bytes = Arc::new(Bytes::copied(payload));
        Self::new(bytes, 0..payload.len(), encoding, rows, cols)
    }

    /// The matrix in place.
    ///
    /// # Panics
    /// Never: the constructor has made this view.
    #[must_use]
    pub fn view(&self) -> MatrixView<'_> {
        let payload = &self.bytes[self.range.clone()];
        self.encoding.view(self.rows, self.cols, payload).expect("validated when made")
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols as usize
    }

    /// How the weights are stored.
    #[must_use]
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// Stored bytes.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// The stored bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    /// All weights, decoded.
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        self.view().decode()
    }
}
