//! Id 16: 4- or 8-bit integers with one binary16 scale per group of columns (spec §6.3).

use std::fmt;

use half::f16;

use super::{as_f16, check_canonical, check_finite_f16, f16_at, f16_bytes, f16_vec, join, split};
use crate::error::Result;

/// Parameters of the integer group encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntGroup {
    bits: u8,
    group: u16,
}

impl IntGroup {
    /// The registered id.
    pub const ID: u32 = 16;

    /// `bits` 4 or 8; `group` 32, 64 or 128 columns per scale.
    #[must_use]
    pub fn new(bits: u8, group: u16) -> Option<Self> {
        let valid = matches!(bits, 4 | 8) && matches!(group, 32 | 64 | 128);
        valid.then_some(Self { bits, group })
    }

    /// Bits per code: 4 or 8.
    #[must_use]
    #[inline]
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Columns per scale.
    #[must_use]
    #[inline]
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    pub(crate) fn parse(params: [u8; 16]) -> Option<Self> {
        let [bits, 0, g0, g1, rest @ ..] = params else { return None };
        if rest != [0; 12] {
            return None;
        }
        Self::new(bits, u16::from_le_bytes([g0, g1]))
    }

    pub(crate) fn params(self) -> [u8; 16] {
        let [g0, g1] = self.group.to_le_bytes();
        [self.bits, 0, g0, g1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    /// Bytes of the codes of one row.
    fn row_bytes(self, cols: u64) -> Option<u64> {
        let padded = cols.checked_next_multiple_of(u64::from(self.group))?;
        padded.checked_mul(u64::from(self.bits))?.checked_div(8)
    }

    pub(crate) fn segments(self, rows: u64, cols: u64) -> Option<[u64; 2]> {
        let codes = rows.checked_mul(self.row_bytes(cols)?)?;
        let groups = cols.div_ceil(u64::from(self.group));
        Some([codes, rows.checked_mul(groups)?.checked_mul(2)?])
    }
}

impl fmt::Display for IntGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "int{}/g{}", self.bits, self.group)
    }
}

/// The logical content of an integer group tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct IntGroupParts {
    /// Parameters.
    pub spec: IntGroup,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Signed codes, rows × cols: −8 to 7 for 4 bits, −128 to 127 for 8.
    pub codes: Vec<i8>,
    /// Scales, rows × ceil(cols / group).
    pub scales: Vec<f16>,
}

impl IntGroupParts {
    /// The payload.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for row in self.codes.chunks(self.cols.max(1)) {
            for group in row.chunks(self.spec.group()) {
                self.pack_group(group, &mut bytes);
            }
        }
        join([&bytes, &f16_bytes(&self.scales)])
    }

    fn pack_group(&self, group: &[i8], bytes: &mut Vec<u8>) {
        let mut padded = group.iter().copied();
        if self.spec.bits == 8 {
            let end = bytes.len().saturating_add(self.spec.group());
            bytes.extend(padded.map(i8::cast_unsigned));
            bytes.resize(end, 0);
            return;
        }
        for _ in 0..self.spec.group().div_ceil(32) {
            // Unused nibbles are zero, not the code of weight 0.
            let nibbles: [u8; 32] = [(); 32].map(|()| {
                padded.next().map_or(0, |code| code.wrapping_add(8).cast_unsigned() & 15)
            });
            let (low, high) = nibbles.split_at(16);
            bytes.extend(low.iter().zip(high).map(|(l, h)| l | h << 4));
        }
    }
}

/// An integer group matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct IntGroupView<'a> {
    /// Parameters.
    pub spec: IntGroup,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Codes: rows × (cols padded to whole groups) × bits.
    pub codes: &'a [u8],
    /// Scales: rows × groups, binary16.
    pub scales: &'a [[u8; 2]],
    row_bytes: usize,
}

impl<'a> IntGroupView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: IntGroup, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let [codes, scales] = split(payload, spec.segments(rows, cols)?)?;
        let row_bytes = usize::try_from(spec.row_bytes(cols)?).ok()?;
        let (rows, cols) = (usize::try_from(rows).ok()?, usize::try_from(cols).ok()?);
        Some(Self { spec, rows, cols, codes, scales: as_f16(scales), row_bytes })
    }

    /// Scales per row.
    #[must_use]
    #[inline]
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.spec.group())
    }

    /// The code bytes of row `row`.
    #[must_use]
    #[inline]
    pub fn row_codes(&self, row: usize) -> &'a [u8] {
        let start = row.saturating_mul(self.row_bytes);
        self.codes.get(start..start.saturating_add(self.row_bytes)).unwrap_or_default()
    }

    /// The scales of row `row`.
    #[must_use]
    #[inline]
    pub fn row_scales(&self, row: usize) -> &'a [[u8; 2]] {
        let start = row.saturating_mul(self.groups());
        self.scales.get(start..start.saturating_add(self.groups())).unwrap_or_default()
    }

    /// The signed code of column `col` within `codes`, the code bytes of one row.
    fn code(&self, codes: &[u8], col: usize) -> i8 {
        if self.spec.bits == 8 {
            return codes.get(col).copied().unwrap_or(0).cast_signed();
        }
        let byte = (col & !31).wrapping_shr(1).saturating_add(col & 15);
        let pair = codes.get(byte).copied().unwrap_or(0);
        let nibble = if col & 16 == 0 { pair & 15 } else { pair >> 4 };
        nibble.cast_signed().wrapping_sub(8)
    }

    /// See [`super::MatrixView::decode_row`]: `w = scale × code`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        if row >= self.rows {
            return;
        }
        let (codes, scales) = (self.row_codes(row), self.row_scales(row));
        let groups = out.chunks_mut(self.spec.group());
        for (index, (group, scale)) in groups.zip(scales).enumerate() {
            let scale = f16::from_le_bytes(*scale).to_f32();
            let start = index.saturating_mul(self.spec.group());
            for (k, o) in group.iter_mut().enumerate() {
                *o = scale * f32::from(self.code(codes, start.saturating_add(k)));
            }
        }
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> IntGroupParts {
        let codes = (0..self.rows)
            .flat_map(|row| {
                let bytes = self.row_codes(row);
                (0..self.cols).map(move |col| self.code(bytes, col))
            })
            .collect();
        let (spec, rows, cols) = (self.spec, self.rows, self.cols);
        IntGroupParts { spec, rows, cols, codes, scales: f16_vec(self.scales) }
    }

    pub(crate) fn check(&self, payload: &[u8]) -> Result<()> {
        check_canonical(payload, &self.unpack().pack())?;
        check_finite_f16(payload, self.scales, "scale")
    }

    /// The scale of group `group` in row `row`.
    #[must_use]
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        f16_at(self.row_scales(row), group)
    }
}
