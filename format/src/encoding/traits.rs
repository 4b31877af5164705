//! What an encoding has to provide.

use std::fmt;

use crate::error::Result;

/// The parameters of an encoding: what the tensor entry of a file says beside the shape.
pub trait WeightEncoding: Copy + fmt::Display {
    /// A matrix of this encoding in place.
    type View<'a>: WeightView;

    /// The registered ids.
    const IDS: &'static [u32];

    /// Whether tensors of any number of dimensions can be stored, not only matrices.
    const ANY_SHAPE: bool = false;

    /// The encoding with this id (one of [`WeightEncoding::IDS`]) and these parameter bytes; `None` if
    /// the parameters are invalid.
    fn parse(id: u32, params: [u8; 16]) -> Option<Self>;

    /// The registered id.
    fn id(self) -> u32;

    /// The 16 parameter bytes of a tensor entry.
    fn params(self) -> [u8; 16];

    /// Bytes of the payload of a `rows` × `cols` matrix; `None` on overflow.
    fn payload_len(self, rows: u64, cols: u64) -> Option<u64>;

    /// The payload of a `rows` × `cols` matrix in place; `None` if it has the wrong length.
    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<Self::View<'_>>;
}

/// A matrix of some encoding in place.
pub trait WeightView: Copy + fmt::Debug {
    /// The number of rows (output features).
    fn rows(&self) -> usize;

    /// The number of columns (input features).
    fn cols(&self) -> usize;

    /// Decodes row `row` into `out` (one element per column): the exact weights of the spec.
    /// Rows outside the matrix and surplus elements of `out` are left as they are.
    fn decode_row(&self, row: usize, out: &mut [f32]);

    /// Checks the content of `payload`, which this is a view of (STB-R-041 to STB-R-044).
    ///
    /// # Errors
    /// The first rule that is broken; offsets are within the payload.
    fn check(&self, payload: &[u8]) -> Result<()>;
}
