//! Ids 1 to 3: f32, f16 and bf16, row-major (spec, encodings §2).

use std::fmt;

use super::segments::{split, total};
use super::traits::{WeightEncoding, WeightView};
use crate::error::{Error, Result, Rule};
use crate::num::len_u64;

/// A floating-point element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    /// Id 1: IEEE 754 binary32.
    F32,
    /// Id 2: IEEE 754 binary16.
    F16,
    /// Id 3: bfloat16.
    Bf16,
}

impl Dense {
    /// Bytes per element.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The bytes of `values` rounded to this type, ties to even.
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => {
                values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
            }
            Self::Bf16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
        }
    }
}

impl WeightEncoding for Dense {
    type View<'a> = DenseView<'a>;
    const IDS: &'static [u32] = &[1, 2, 3];
    const ANY_SHAPE: bool = true;

    fn parse(id: u32, params: [u8; 16]) -> Option<Self> {
        let kind = match id {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            _ => return None,
        };
        (params == [0; 16]).then_some(kind)
    }

    fn id(self) -> u32 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
        }
    }

    fn params(self) -> [u8; 16] {
        [0; 16]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        rows.checked_mul(cols)?.checked_mul(self.bytes())
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<DenseView<'_>> {
        DenseView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for Dense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A dense matrix in place. The bytes may be unaligned.
#[derive(Clone, Copy, Debug)]
pub struct DenseView<'a> {
    /// The element type.
    pub kind: Dense,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Elements, row-major, little-endian.
    pub data: &'a [u8],
}

impl<'a> DenseView<'a> {
    /// A view of `data`; `None` unless it holds exactly `rows` × `cols` elements.
    #[must_use]
    pub fn new(kind: Dense, rows: u64, cols: u64, data: &'a [u8]) -> Option<Self> {
        let length = kind.payload_len(rows, cols)?;
        total([length])?;
        let [data] = split(data, [length])?;
        Some(Self {
            kind,
            rows: usize::try_from(rows).ok()?,
            cols: usize::try_from(cols).ok()?,
            data,
        })
    }

    /// The bytes of row `row`.
    #[must_use]
    #[inline]
    pub fn row_bytes(&self, row: usize) -> &'a [u8] {
        let width = self.cols.saturating_mul(usize::try_from(self.kind.bytes()).unwrap_or(0));
        let start = row.saturating_mul(width);
        self.data.get(start..start.saturating_add(width)).unwrap_or_default()
    }
}

impl WeightView for DenseView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_bytes(row);
        match self.kind {
            Dense::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Dense::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = half::f16::from_le_bytes(*b).to_f32();
                }
            }
            Dense::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = half::bf16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }

    fn check(&self, _payload: &[u8]) -> Result<()> {
        let mut line = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.decode_row(row, &mut line);
            if let Some(col) = line.iter().position(|v| !v.is_finite()) {
                let element = row.saturating_mul(self.cols).saturating_add(col);
                let at = len_u64(element).saturating_mul(self.kind.bytes());
                let detail = format!("element [{row}, {col}] is {:?}", line.get(col));
                return Err(Error::new(Rule::PayloadFinite, detail).at(at));
            }
        }
        Ok(())
    }
}
