//! Tensors as weight files store them, and what makes them tensors of the model.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use stb_format::arch::TensorSpec;
use stb_format::encoding::{Dense, Encoding};
use stb_format::gguf::GgufType;

use crate::error::{Error, Result};
use crate::map::Bytes;
use crate::weights::Weight;

/// A tensor of a weight file.
#[derive(Clone, Debug)]
pub(super) struct StoredTensor {
    pub bytes: Arc<Bytes>,
    /// Where its data is in `bytes`.
    pub range: Range<usize>,
    /// The element type; an unknown one, as a text for the error, matters only if the model needs the tensor.
    pub kind: std::result::Result<StoredType, String>,
    /// The dimensions in PyTorch order.
    pub shape: Vec<u64>,
}

/// The type of the elements of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoredType {
    /// Floating-point numbers.
    Dense(Dense),
    /// A quantized type of GGUF, which is dequantized to f32.
    Gguf(GgufType),
}

/// What turns the rows of a stored tensor into those of the tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transform {
    /// Nothing.
    None,
    /// Row 2i + a of each of `heads` heads becomes row i + a · half, where half is half the rows of a head: from
    /// RoPE on neighboring elements to RoPE on halves.
    SplitHeads {
        /// The number of heads.
        heads: u64,
    },
}

/// A tensor of the model in its weight file.
#[derive(Clone, Debug)]
pub(super) struct Source {
    tensor: StoredTensor,
    kind: StoredType,
    transform: Transform,
    rows: u64,
    cols: u64,
}

impl Transform {
    /// The stored row that becomes row `row` of `rows`.
    fn stored_row(self, row: usize, rows: usize) -> usize {
        match self {
            Self::None => row,
            Self::SplitHeads { heads } => {
                let width = rows / (heads as usize).max(1);
                let (head, row) = (row / width.max(1), row % width.max(1));
                let half = (width / 2).max(1);
                head * width + 2 * (row % half) + row / half
            }
        }
    }
}

impl Source {
    /// Finds `tensor` in the stored tensor `name`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wrong shape; [`Error::Unsupported`] for an element type that is not supported.
    pub(super) fn new(
        name: &str,
        stored: StoredTensor,
        transform: Transform,
        tensor: &TensorSpec,
    ) -> Result<Self> {
        let (found, shape) = (&stored.shape, &tensor.shape);
        if found != shape {
            return Err(Error::invalid(format!(
                "tensor {name} has shape {found:?}, the configuration gives {shape:?}"
            )));
        }
        let kind = match &stored.kind {
            Ok(kind) => *kind,
            Err(kind) => {
                return Err(Error::unsupported(format!("tensor {name} is stored as {kind}")));
            }
        };
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<u64>() / cols.max(1);
        if let Transform::SplitHeads { heads } = transform
            && rows % (2 * heads.max(1)) != 0
        {
            return Err(Error::invalid(format!(
                "tensor {name} has {rows} rows, which are not {heads} heads of even width"
            )));
        }
        Ok(Self { tensor: stored, kind, transform, rows, cols })
    }

    /// The element type of [`Source::load`].
    pub(super) fn kind(&self) -> Dense {
        match self.kind {
            StoredType::Dense(kind) => kind,
            StoredType::Gguf(_) => Dense::F32,
        }
    }

    /// Rows and columns of [`Source::load`].
    pub(super) fn matrix_shape(&self) -> (u64, u64) {
        (self.rows, self.cols)
    }

    /// Whether [`Source::load`] uses the bytes of the file in place.
    pub(super) fn is_in_place(&self) -> bool {
        matches!(self.kind, StoredType::Dense(_)) && self.transform == Transform::None
    }

    /// Bytes of memory that [`Source::load`] takes.
    pub(super) fn owned_bytes(&self) -> u64 {
        if self.is_in_place() { 0 } else { self.rows * self.cols * self.kind().bytes() }
    }

    /// The tensor as a dense matrix: in place if possible, else in memory of its own.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the file does not hold the tensor.
    pub(super) fn load(&self) -> Result<Weight> {
        let Self { tensor: StoredTensor { bytes, range, .. }, rows, cols, .. } = self;
        if self.is_in_place() {
            let encoding = Encoding::Dense(self.kind());
            return Weight::new(bytes.clone(), range.clone(), encoding, *rows, *cols);
        }
        let payload = bytes.get(range.clone()).unwrap_or_default();
        let (row_count, width) = (*rows as usize, *cols as usize);
        // The stored bytes of a row of `size` bytes.
        let stored = |row: usize, size: usize| {
            let start = self.transform.stored_row(row, row_count) * size;
            payload.get(start..start + size).unwrap_or_default()
        };
        match self.kind {
            StoredType::Dense(kind) => {
                let size = width * kind.bytes() as usize;
                let mut copy = Vec::with_capacity(row_count * size);
                (0..row_count).for_each(|row| copy.extend_from_slice(stored(row, size)));
                Weight::from_payload(&copy, Encoding::Dense(kind), *rows, *cols)
            }
            StoredType::Gguf(kind) => {
                let size = kind.byte_len(*cols).unwrap_or(0) as usize;
                let mut values = vec![0.0; row_count * width];
                let decode = |(row, out): (usize, &mut [f32])| kind.decode(stored(row, size), out);
                values.par_chunks_exact_mut(width).enumerate().for_each(decode);
                Weight::from_floats(values, *rows, *cols)
            }
        }
    }
}

/// Adds a tensor to those of a checkpoint.
///
/// # Errors
/// [`Error::Invalid`] for a second tensor of this name.
pub(super) fn add(
    tensors: &mut BTreeMap<String, StoredTensor>,
    name: &str,
    tensor: StoredTensor,
) -> Result<()> {
    match tensors.insert(name.to_owned(), tensor) {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format!("tensor {name} is in two files"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_split_into_halves() {
        let transform = Transform::SplitHeads { heads: 2 };
        let rows: Vec<usize> = (0..12).map(|row| transform.stored_row(row, 12)).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
