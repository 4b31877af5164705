//! Ids 16 and 17: integers of 4 or 8 bits, odd integers of 1 to 3 bits, with one binary16 scale per
//! group of columns (spec, encodings §3).

use std::fmt;

use half::f16;

use super::segments::{
    as_f16, check_canonical, check_finite_f16, f16_at, f16_bytes, f16_vec, join, split, total,
};
use super::traits::{WeightEncoding, WeightView};
use crate::error::Result;
use crate::num::first_nonzero;

/// Columns per unit of codes. A unit takes 4 bytes for each bit of a code.
pub const UNIT: usize = 32;

/// Parameters of the integer group encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntGroup {
    bits: u8,
    group: u16,
}

impl IntGroup {
    /// The registered id for 4 and 8 bits.
    pub const ID: u32 = 16;
    /// The registered id for 1, 2 and 3 bits.
    pub const ODD_ID: u32 = 17;

    /// `bits` per code: 1, 2, 3, 4 or 8. `group` columns per scale: 32, 64 or 128. `None` for other
    /// values.
    #[must_use]
    pub fn new(bits: u8, group: u16) -> Option<Self> {
        let valid = matches!(bits, 1..=4 | 8) && matches!(group, 32 | 64 | 128);
        valid.then_some(Self { bits, group })
    }

    /// Bits per code: 1, 2, 3, 4 or 8.
    #[must_use]
    #[inline]
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Whether the codes are odd integers, as with 1 to 3 bits: ±1; ±1, ±3; or ±1, ±3, ±5, ±7.
    #[must_use]
    #[inline]
    pub fn is_odd(self) -> bool {
        self.bits < 4
    }

    /// The smallest and the largest code.
    #[must_use]
    pub fn limits(self) -> (i8, i8) {
        match self.bits {
            1 => (-1, 1),
            2 => (-3, 3),
            3 => (-7, 7),
            4 => (-8, 7),
            _ => (-128, 127),
        }
    }

    /// Bits of each plane of a row. Codes of 3 bits are stored in planes of 2 bits and 1 bit.
    #[inline]
    fn planes(self) -> &'static [u8] {
        match self.bits {
            1 => &[1],
            2 => &[2],
            3 => &[2, 1],
            4 => &[4],
            _ => &[8],
        }
    }

    /// The code that is stored as the bits `field`.
    #[inline]
    fn code_of(self, field: u8) -> i8 {
        match self.bits {
            8 => field.cast_signed(),
            4 => field.cast_signed().wrapping_sub(8),
            _ => field.cast_signed().wrapping_mul(2).wrapping_add(self.limits().0),
        }
    }

    /// The inverse of [`IntGroup::code_of`].
    fn field_of(self, code: i8) -> u8 {
        let low = self.limits().0;
        match self.bits {
            8 => code.cast_unsigned(),
            4 => code.wrapping_sub(low).cast_unsigned() & 15,
            _ => code.wrapping_sub(low).cast_unsigned().wrapping_shr(1),
        }
    }

    /// Columns per scale.
    #[must_use]
    #[inline]
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    /// Bytes of the codes of one row.
    fn row_bytes(self, cols: u64) -> Option<u64> {
        let padded = cols.checked_next_multiple_of(u64::from(self.group))?;
        padded.checked_mul(u64::from(self.bits))?.checked_div(8)
    }

    fn segments(self, rows: u64, cols: u64) -> Option<[u64; 2]> {
        let codes = rows.checked_mul(self.row_bytes(cols)?)?;
        let groups = cols.div_ceil(u64::from(self.group));
        Some([codes, rows.checked_mul(groups)?.checked_mul(2)?])
    }
}

impl WeightEncoding for IntGroup {
    type View<'a> = IntGroupView<'a>;
    const IDS: &'static [u32] = &[Self::ID, Self::ODD_ID];

    fn parse(id: u32, params: [u8; 16]) -> Option<Self> {
        let [bits, 0, g0, g1, rest @ ..] = params else { return None };
        if rest != [0; 12] {
            return None;
        }
        Self::new(bits, u16::from_le_bytes([g0, g1])).filter(|spec| spec.id() == id)
    }

    fn id(self) -> u32 {
        if self.is_odd() { Self::ODD_ID } else { Self::ID }
    }

    fn params(self) -> [u8; 16] {
        let [g0, g1] = self.group.to_le_bytes();
        [self.bits, 0, g0, g1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        total(self.segments(rows, cols)?)
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<IntGroupView<'_>> {
        IntGroupView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for IntGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bits {
            1 => write!(f, "sign/g{}", self.group),
            bits => write!(f, "int{bits}/g{}", self.group),
        }
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
    /// Signed codes within [`IntGroup::limits`], [rows, cols]; odd for 1 to 3 bits.
    pub codes: Vec<i8>,
    /// Scales, [rows, ceil(cols / group)].
    pub scales: Vec<f16>,
}

impl IntGroupParts {
    /// The payload.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for row in self.codes.chunks(self.cols.max(1)) {
            let mut shift = 0;
            for &width in self.spec.planes() {
                let mask = u8::MAX.wrapping_shr(8u32.saturating_sub(width.into()));
                for unit in row.chunks(UNIT) {
                    let field = |code: &i8| self.spec.field_of(*code).wrapping_shr(shift) & mask;
                    bytes.extend(pack_unit(unit.iter().map(field), width));
                }
                let units = row.len().next_multiple_of(self.spec.group()).div_ceil(UNIT);
                let missing = units.saturating_sub(row.len().div_ceil(UNIT));
                let zeros = missing.saturating_mul(unit_bytes(width));
                bytes.resize(bytes.len().saturating_add(zeros), 0);
                shift = shift.saturating_add(u32::from(width));
            }
        }
        join([&bytes, &f16_bytes(&self.scales)])
    }
}

/// Bytes of a unit in a plane of `width` bits.
#[inline]
fn unit_bytes(width: u8) -> usize {
    usize::from(width).saturating_mul(4)
}

/// Packs the fields of one unit into n bytes: byte k has the fields of columns k, k + n, k + 2n, …
/// Bits of columns past the last one are zero.
fn pack_unit(mut fields: impl Iterator<Item = u8>, width: u8) -> Vec<u8> {
    let mut bytes = vec![0u8; unit_bytes(width)];
    let mut shift = 0;
    while shift < 8 {
        for byte in &mut bytes {
            *byte |= fields.next().unwrap_or(0).wrapping_shl(shift);
        }
        shift = shift.saturating_add(u32::from(width));
    }
    bytes
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
    /// Codes: rows × planes × (cols padded to whole groups) × bits of the plane.
    pub codes: &'a [u8],
    /// Scales: rows × groups, binary16.
    pub scales: &'a [[u8; 2]],
    row_bytes: usize,
    groups: usize,
}

impl<'a> IntGroupView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: IntGroup, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let [codes, scales] = split(payload, spec.segments(rows, cols)?)?;
        let row_bytes = usize::try_from(spec.row_bytes(cols)?).ok()?;
        let (rows, cols) = (usize::try_from(rows).ok()?, usize::try_from(cols).ok()?);
        let groups = cols.div_ceil(spec.group());
        Some(Self { spec, rows, cols, codes, scales: as_f16(scales), row_bytes, groups })
    }

    /// Scales per row.
    #[must_use]
    #[inline]
    pub fn groups(&self) -> usize {
        self.groups
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

    /// The planes of row `row`. Codes of 3 bits have a plane of the low two bits and one of the third.
    /// Other codes have one plane, and the second is empty.
    #[must_use]
    #[inline]
    pub fn row_planes(&self, row: usize) -> [&'a [u8]; 2] {
        let codes = self.row_codes(row);
        let first = if self.spec.bits == 3 { self.low_plane_bytes() } else { codes.len() };
        codes.split_at_checked(first).map_or([codes, &[]], |(low, high)| [low, high])
    }

    /// Bytes of the low plane of a row of 3-bit codes.
    #[inline]
    fn low_plane_bytes(&self) -> usize {
        self.row_bytes.wrapping_div(3).saturating_mul(2)
    }

    /// The signed code of column `col` of a row with these planes.
    fn code(&self, planes: [&[u8]; 2], col: usize) -> i8 {
        self.spec.code_of(self.field(planes, col))
    }

    /// The stored bits of column `col` of a row with these planes.
    fn field(&self, planes: [&[u8]; 2], col: usize) -> u8 {
        let (mut field, mut shift) = (0u8, 0u32);
        for (&width, plane) in self.spec.planes().iter().zip(planes) {
            let n = unit_bytes(width);
            let (unit, place) = (col.wrapping_div(UNIT), col.wrapping_rem(UNIT));
            let at = unit.saturating_mul(n).saturating_add(place.checked_rem(n).unwrap_or(0));
            let offset = place.checked_div(n).unwrap_or(0).saturating_mul(usize::from(width));
            let byte = plane.get(at).copied().unwrap_or(0);
            let mask = u8::MAX.wrapping_shr(8u32.saturating_sub(width.into()));
            let bits = byte.wrapping_shr(u32::try_from(offset).unwrap_or(0)) & mask;
            field |= bits.wrapping_shl(shift);
            shift = shift.saturating_add(u32::from(width));
        }
        field
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> IntGroupParts {
        let codes = (0..self.rows)
            .flat_map(|row| {
                let planes = self.row_planes(row);
                (0..self.cols).map(move |col| self.code(planes, col))
            })
            .collect();
        let (spec, rows, cols) = (self.spec, self.rows, self.cols);
        IntGroupParts { spec, rows, cols, codes, scales: f16_vec(self.scales) }
    }

    /// Whether the padding columns of the last group of each row and the padding before the scales are
    /// zero. Faster than [`check_canonical`], with the same result.
    fn unused_is_zero(&self, payload: &[u8]) -> bool {
        let scales = self.scales.as_flattened().len();
        let padding = payload.len().saturating_sub(scales);
        let padding = payload.get(self.codes.len()..padding).unwrap_or_default();
        let end = self.cols.checked_next_multiple_of(self.spec.group());
        let unused = self.cols..end.unwrap_or(self.cols);
        let row_is_zero = |row: usize| {
            let planes = self.row_planes(row);
            unused.clone().all(|col| self.field(planes, col) == 0)
        };
        first_nonzero(padding).is_none() && (unused.is_empty() || (0..self.rows).all(row_is_zero))
    }

    /// The scale of group `group` in row `row`.
    #[must_use]
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        f16_at(self.row_scales(row), group)
    }
}

impl WeightView for IntGroupView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// `w = scale × code`.
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        if row >= self.rows {
            return;
        }
        let (planes, scales) = (self.row_planes(row), self.row_scales(row));
        let groups = out.chunks_mut(self.spec.group());
        for (index, (group, scale)) in groups.zip(scales).enumerate() {
            let scale = f16::from_le_bytes(*scale).to_f32();
            let start = index.saturating_mul(self.spec.group());
            for (k, o) in group.iter_mut().enumerate() {
                *o = scale * f32::from(self.code(planes, start.saturating_add(k)));
            }
        }
    }

    fn check(&self, payload: &[u8]) -> Result<()> {
        if !self.unused_is_zero(payload) {
            check_canonical(payload, &self.unpack().pack())?;
        }
        check_finite_f16(payload, self.scales, "scale")
    }
}
