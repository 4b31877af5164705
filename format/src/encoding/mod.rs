//! The registered weight encodings: parameters, layout, exact decoding and packing (spec §6).
//!
//! Each submodule has the same parts: a parameter struct (the 16 bytes of a tensor entry), a view
//! of the payload in place, a `Parts` struct with the logical content, `pack` and `unpack` between
//! parts and bytes, and `decode_row`, the definition of the weights.

pub mod dense;
pub mod int_group;
pub mod nm;
pub mod stbllm;

use std::fmt;

use crate::error::{Error, Result, Rule};
use crate::limits::TENSOR_ALIGN;
use crate::num::{align_up, first_nonzero, len_u64, slice};

pub use dense::{Dense, DenseView};
pub use int_group::{IntGroup, IntGroupParts, IntGroupView};
pub use nm::{Nm, NmParts, NmView};
pub use stbllm::{Stbllm, StbllmParts, StbllmView};

/// How the weights of one tensor are stored, with the parameters of its tensor entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Ids 1 to 3: plain floating-point numbers.
    Dense(Dense),
    /// Ids 16 and 17: integers of 8 bits or fewer with one scale per group of columns.
    IntGroup(IntGroup),
    /// Id 32: the N:8 structure of STBLLM with three regions and salient columns.
    Stbllm(Stbllm),
    /// Id 48: joint position and sign codes of N:M groups.
    Nm(Nm),
    /// Not known to this reader. The tensor cannot be decoded; the rest of the file can.
    Unknown {
        /// The id in the file.
        id: u32,
        /// The parameters, uninterpreted.
        params: [u8; 16],
    },
}

impl Encoding {
    /// The encoding of a tensor entry.
    ///
    /// # Errors
    /// STB-R-036 if the id is known and its parameters are invalid.
    pub fn parse(id: u32, params: [u8; 16]) -> Result<Self> {
        let known = match id {
            1..=3 => Dense::parse(id, params).map(Self::Dense),
            IntGroup::ID | IntGroup::ODD_ID => IntGroup::parse(id, params).map(Self::IntGroup),
            Stbllm::ID => Stbllm::parse(params).map(Self::Stbllm),
            Nm::ID => Nm::parse(params).map(Self::Nm),
            _ => return Ok(Self::Unknown { id, params }),
        };
        known.ok_or_else(|| {
            Error::new(Rule::EncodingParams, format!("encoding {id} with parameters {params:?}"))
        })
    }

    /// The registered id.
    #[must_use]
    pub fn id(&self) -> u32 {
        match self {
            Self::Dense(e) => e.id(),
            Self::IntGroup(e) => e.id(),
            Self::Stbllm(_) => Stbllm::ID,
            Self::Nm(_) => Nm::ID,
            Self::Unknown { id, .. } => *id,
        }
    }

    /// The 16 parameter bytes of a tensor entry.
    #[must_use]
    pub fn params(&self) -> [u8; 16] {
        match self {
            Self::Dense(_) => [0; 16],
            Self::IntGroup(e) => e.params(),
            Self::Stbllm(e) => e.params(),
            Self::Nm(e) => e.params(),
            Self::Unknown { params, .. } => *params,
        }
    }

    /// Bytes that a tensor of `shape` takes; `None` for an unknown encoding.
    ///
    /// # Errors
    /// STB-R-037 if the encoding does not allow the shape, STB-R-031 if the size overflows.
    pub fn payload_len(&self, shape: &[u64]) -> Result<Option<u64>> {
        if let (Self::Dense(e), Some(elements)) =
            (self, shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)))
        {
            return Ok(elements.checked_mul(e.bytes()));
        }
        let &[rows, cols] = shape else {
            return match self {
                Self::Unknown { .. } => Ok(None),
                _ => {
                    let detail = format!("{self} is for matrices, the shape is {shape:?}");
                    Err(Error::new(Rule::EncodingShape, detail))
                }
            };
        };
        let total = match self {
            Self::Dense(_) | Self::Unknown { .. } => return Ok(None),
            Self::IntGroup(e) => e.segments(rows, cols).and_then(total),
            Self::Stbllm(e) => e.segments(rows, cols).and_then(total),
            Self::Nm(e) => e.segments(rows, cols).and_then(total),
        };
        let too_large = || Error::new(Rule::TensorShape, format!("{shape:?} is too large"));
        total.map(Some).ok_or_else(too_large)
    }

    /// The payload of a `rows` × `cols` tensor as a matrix in place.
    ///
    /// # Errors
    /// STB-R-050 for an unknown encoding, STB-R-038 if the payload has the wrong length.
    pub fn view<'a>(&self, rows: u64, cols: u64, payload: &'a [u8]) -> Result<MatrixView<'a>> {
        let view = match self {
            Self::Dense(e) => DenseView::new(*e, rows, cols, payload).map(MatrixView::Dense),
            Self::IntGroup(e) => {
                IntGroupView::new(*e, rows, cols, payload).map(MatrixView::IntGroup)
            }
            Self::Stbllm(e) => StbllmView::new(*e, rows, cols, payload).map(MatrixView::Stbllm),
            Self::Nm(e) => NmView::new(*e, rows, cols, payload).map(MatrixView::Nm),
            Self::Unknown { id, .. } => {
                let detail = format!(
                    "encoding {id} is not known to this reader; a newer version may read it"
                );
                return Err(Error::new(Rule::EncodingUnknown, detail));
            }
        };
        view.ok_or_else(|| {
            let detail = format!("{} bytes for {self} of {rows} x {cols}", payload.len());
            Error::new(Rule::TensorLength, detail)
        })
    }

    /// Checks the content of a payload (STB-R-041 to STB-R-044); offsets are within the payload.
    /// An unknown encoding passes.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check_payload(&self, rows: u64, cols: u64, payload: &[u8]) -> Result<()> {
        if let Self::Unknown { .. } = self {
            return Ok(());
        }
        match self.view(rows, cols, payload)? {
            MatrixView::Dense(v) => v.check(),
            MatrixView::IntGroup(v) => v.check(payload),
            MatrixView::Stbllm(v) => v.check(payload),
            MatrixView::Nm(v) => v.check(payload),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense(e) => e.fmt(f),
            Self::IntGroup(e) => e.fmt(f),
            Self::Stbllm(e) => e.fmt(f),
            Self::Nm(e) => e.fmt(f),
            Self::Unknown { id, .. } => write!(f, "unknown({id})"),
        }
    }
}

/// A stored matrix in place.
#[derive(Clone, Copy, Debug)]
pub enum MatrixView<'a> {
    /// See [`Dense`].
    Dense(DenseView<'a>),
    /// See [`IntGroup`].
    IntGroup(IntGroupView<'a>),
    /// See [`Stbllm`].
    Stbllm(StbllmView<'a>),
    /// See [`Nm`].
    Nm(NmView<'a>),
}

impl MatrixView<'_> {
    /// The number of rows (output features).
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(v) => v.rows,
            Self::IntGroup(v) => v.rows,
            Self::Stbllm(v) => v.rows,
            Self::Nm(v) => v.rows,
        }
    }

    /// The number of columns (input features).
    #[must_use]
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(v) => v.cols,
            Self::IntGroup(v) => v.cols,
            Self::Stbllm(v) => v.cols,
            Self::Nm(v) => v.cols,
        }
    }

    /// Decodes row `row` into `out` (one element per column): the exact weights of the spec.
    /// Rows outside the matrix and surplus elements of `out` are left as they are.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Dense(v) => v.decode_row(row, out),
            Self::IntGroup(v) => v.decode_row(row, out),
            Self::Stbllm(v) => v.decode_row(row, out),
            Self::Nm(v) => v.decode_row(row, out),
        }
    }

    /// Decodes the matrix, rows × cols, row-major.
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows().saturating_mul(self.cols())];
        for (row, line) in out.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.decode_row(row, line);
        }
        out
    }
}

/// The length of a payload whose segments have these lengths (spec §6.1).
pub(crate) fn total<const N: usize>(lengths: [u64; N]) -> Option<u64> {
    let add = |end, len| align_up(end, TENSOR_ALIGN)?.checked_add(len);
    lengths.into_iter().try_fold(0, add)
}

/// Splits a payload into its segments; `None` if it does not have exactly their total length.
pub(crate) fn split<const N: usize>(payload: &[u8], lengths: [u64; N]) -> Option<[&[u8]; N]> {
    if total(lengths)? != len_u64(payload.len()) {
        return None;
    }
    let mut parts = [payload; N];
    let mut end = 0u64;
    for (part, len) in parts.iter_mut().zip(lengths) {
        let start = align_up(end, TENSOR_ALIGN)?;
        *part = slice(payload, start, len)?;
        end = start.checked_add(len)?;
    }
    Some(parts)
}

/// Joins segments with zero padding: the inverse of [`split`].
pub(crate) fn join<const N: usize>(parts: [&[u8]; N]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    for part in parts {
        out.resize(out.len().next_multiple_of(64), 0);
        out.extend_from_slice(part);
    }
    out
}

/// STB-R-041: a payload equals what its own content packs to, so every unused bit is zero.
pub(crate) fn check_canonical(payload: &[u8], packed: &[u8]) -> Result<()> {
    let differs = payload.iter().zip(packed).map(|(a, b)| a ^ b).collect::<Vec<u8>>();
    match first_nonzero(&differs) {
        None if payload.len() == packed.len() => Ok(()),
        at => {
            let detail = "an unused bit is not zero";
            Err(Error::new(Rule::PayloadPadding, detail).at(len_u64(at.unwrap_or(0))))
        }
    }
}

/// STB-R-042: every binary16 number of a segment is finite.
pub(crate) fn check_finite_f16(payload: &[u8], segment: &[[u8; 2]], what: &str) -> Result<()> {
    match segment.iter().position(|b| !half::f16::from_le_bytes(*b).is_finite()) {
        None => Ok(()),
        Some(index) => {
            let start = segment.as_ptr().addr().saturating_sub(payload.as_ptr().addr());
            let at = start.saturating_add(index.saturating_mul(2));
            let detail = format!("{what} {index} is not finite");
            Err(Error::new(Rule::PayloadFinite, detail).at(len_u64(at)))
        }
    }
}

/// A segment as little-endian binary16 numbers, in place.
#[inline]
pub(crate) fn as_f16(bytes: &[u8]) -> &[[u8; 2]] {
    bytemuck::cast_slice(bytes.as_chunks::<2>().0)
}

/// A binary16 number of a segment as binary32; zero outside, which validated views never reach.
#[inline]
pub(crate) fn f16_at(segment: &[[u8; 2]], index: usize) -> f32 {
    segment.get(index).map_or(0.0, |b| half::f16::from_le_bytes(*b).to_f32())
}

/// The bytes of binary16 numbers.
pub(crate) fn f16_bytes(values: &[half::f16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Binary16 numbers of a segment.
pub(crate) fn f16_vec(segment: &[[u8; 2]]) -> Vec<half::f16> {
    segment.iter().map(|b| half::f16::from_le_bytes(*b)).collect()
}

/// IEEE 754 negation if `negative`: keeps the sign of zero exact across implementations.
pub(crate) fn signed(value: f32, negative: bool) -> f32 {
    if negative { -value } else { value }
}
