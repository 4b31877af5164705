//! The traits of weight encodings.

use std::fmt;

use crate::error::Result;

/// The parameters of an encoding, as stored in a tensor entry.
pub trait WeightEncoding: Copy + fmt::Display {
    /// The view of a matrix in place.
    type View<'a>: WeightView;

    /// The registered ids.
    const IDS: &'static [u32];

    /// Whether the encoding can store tensors of any number of dimensions, not only matrices.
    const ANY_SHAPE: bool = false;

    /// The encoding with this id (one of [`WeightEncoding::IDS`]) and these parameter bytes; `None` if
    /// the parameters are invalid.
    fn parse(id: u32, params: [u8; 16]) -> Option<Self>;

    /// The registered id.
    fn id(self) -> u32;

    /// The 16 parameter bytes of a tensor entry.
    fn params(self) -> [u8; 16];

    /// Whether the encoding can store a `rows` × `cols` matrix.
    fn allows(self, rows: u64, cols: u64) -> bool {
        let _ = (rows, cols);
        true
    }

    /// The payload length of a `rows` × `cols` matrix in bytes; `None` on overflow.
    fn payload_len(self, rows: u64, cols: u64) -> Option<u64>;

    /// The payload of a `rows` × `cols` matrix in place; `None` if it has the wrong length.
    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<Self::View<'_>>;
}

/// A packed matrix in place.
pub trait WeightView: Copy + fmt::Debug {
    /// The number of rows (output features).
    fn rows(&self) -> usize;

    /// The number of columns (input features).
    fn cols(&self) -> usize;

    /// Decodes row `row` into `out`, `[cols]`, exactly as the spec defines the weights. If the matrix
    /// has no such row, `out` is unchanged.
    fn decode_row(&self, row: usize, out: &mut [f32]);

    /// Checks the content of `payload`, the payload of this view (STB-R-041 to STB-R-045).
    ///
    /// # Errors
    /// The first broken rule, with its offset in the payload.
    fn check(&self, payload: &[u8]) -> Result<()>;
}
