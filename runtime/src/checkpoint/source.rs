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
    /// The stored tensor is the transpose.
    Transposed,
    /// Row 2i + a of each of `heads` heads becomes row i + a · half, where half is half the rows of a head: from
    /// RoPE on neighboring elements to RoPE on halves.
    SplitHeads {
        /// The number of heads.
        heads: u64,
    },
}

/// Where a tensor of the model is in a stored tensor.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The dimensions of the stored tensor.
    pub shape: Vec<u64>,
    /// The row of the stored tensor, after the transform, that is the first of the tensor.
    pub first_row: u64,
    pub transform: Transform,
}

/// A tensor of the model in its weight file. A vector counts as a column, so that its elements are rows.
#[derive(Clone, Debug)]
pub(super) struct Source {
    tensor: StoredTensor,
    kind: StoredType,
    transform: Transform,
    first_row: usize,
    /// Rows and columns of the tensor of the model.
    rows: usize,
    cols: usize,
    is_vector: bool,
}

impl Transform {
    /// The stored row that becomes row `row` of `rows`.
    fn stored_row(self, row: usize, rows: usize) -> usize {
        match self {
            Self::None | Self::Transposed => row,
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
        place: &Place,
        tensor: &TensorSpec,
    ) -> Result<Self> {
        let (found, shape) = (&stored.shape, &place.shape);
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
        let is_vector = tensor.shape.len() == 1;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let cols = tensor.shape.get(1).copied().unwrap_or(1);
        if let Transform::SplitHeads { heads } = place.transform
            && rows % (2 * heads.max(1)) != 0
        {
            return Err(Error::invalid(format!(
                "tensor {name} has {rows} rows, which are not {heads} heads of even width"
            )));
        }
        let is_by_element = is_vector || place.transform == Transform::Transposed;
        if is_by_element && matches!(kind, StoredType::Gguf(_)) {
            return Err(Error::unsupported(format!(
                "tensor {name} is quantized, which is supported for rows of matrices only"
            )));
        }
        Ok(Self {
            tensor: stored,
            kind,
            transform: place.transform,
            first_row: place.first_row as usize,
            rows: rows as usize,
            cols: cols as usize,
            is_vector,
        })
    }

    /// The element type of [`Source::load`].
    pub(super) fn kind(&self) -> Dense {
        match self.kind {
            StoredType::Dense(kind) => kind,
            StoredType::Gguf(_) => Dense::F32,
        }
    }

    /// Rows and columns of [`Source::load`]: a vector is one row.
    pub(super) fn matrix_shape(&self) -> (u64, u64) {
        match self.is_vector {
            true => (1, self.rows as u64),
            false => (self.rows as u64, self.cols as u64),
        }
    }

    /// Whether [`Source::load`] uses the bytes of the file in place.
    pub(super) fn is_in_place(&self) -> bool {
        matches!(self.kind, StoredType::Dense(_)) && self.transform == Transform::None
    }

    /// Bytes of memory that [`Source::load`] takes.
    pub(super) fn owned_bytes(&self) -> u64 {
        let elements = self.rows as u64 * self.cols as u64;
        if self.is_in_place() { 0 } else { elements * self.kind().bytes() }
    }

    /// The tensor as a dense matrix: in place if possible, else in memory of its own.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the file does not hold the tensor.
    pub(super) fn load(&self) -> Result<Weight> {
        let (rows, cols) = self.matrix_shape();
        let StoredTensor { bytes, range, .. } = &self.tensor;
        match self.kind {
            StoredType::Dense(kind) if self.is_in_place() => {
                let row_bytes = self.cols * kind.bytes() as usize;
                let start = range.start + self.first_row * row_bytes;
                let range = start..start + self.rows * row_bytes;
                Weight::new(bytes.clone(), range, Encoding::Dense(kind), rows, cols)
            }
            StoredType::Dense(kind) => {
                let payload = self.transformed(kind.bytes() as usize);
                Weight::from_payload(&payload, Encoding::Dense(kind), rows, cols)
            }
            StoredType::Gguf(kind) => {
                let size = kind.byte_len(self.cols as u64).unwrap_or(0) as usize;
                let mut values = vec![0.0; self.rows * self.cols];
                let decode = |(row, out): (usize, &mut [f32])| {
                    kind.decode(self.stored_row(row, size), out);
                };
                values.par_chunks_exact_mut(self.cols.max(1)).enumerate().for_each(decode);
                Weight::from_floats(values, rows, cols)
            }
        }
    }

    /// The bytes of the stored row that becomes row `row`; each row has `size` bytes.
    fn stored_row(&self, row: usize, size: usize) -> &[u8] {
        let payload = self.tensor.bytes.get(self.tensor.range.clone()).unwrap_or_default();
        let start = (self.first_row + self.transform.stored_row(row, self.rows)) * size;
        payload.get(start..start + size).unwrap_or_default()
    }

    /// The elements of a dense tensor, of `size` bytes each, in the order of the tensor of the model.
    fn transformed(&self, size: usize) -> Vec<u8> {
        if self.transform != Transform::Transposed {
            let row_bytes = self.cols * size;
            let mut out = Vec::with_capacity(self.rows * row_bytes);
            (0..self.rows).for_each(|row| out.extend_from_slice(self.stored_row(row, row_bytes)));
            return out;
        }
        // The stored tensor has a row for each column; its rows hold all rows of the transpose.
        let payload = self.tensor.bytes.get(self.tensor.range.clone()).unwrap_or_default();
        let stored_cols = payload.len() / size / self.cols.max(1);
        let mut out = Vec::with_capacity(self.rows * self.cols * size);
        for row in self.first_row..self.first_row + self.rows {
            for col in 0..self.cols {
                let start = (col * stored_cols + row) * size;
                out.extend_from_slice(payload.get(start..start + size).unwrap_or_default());
            }
        }
        out
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
