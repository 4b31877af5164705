//! Id 32: the structure of the STBLLM paper (spec, encodings §4): N:8 mask, signs, three magnitude
//! regions, salient columns with a residual sign, and five scales per row and block.

use std::fmt;

use half::f16;

use super::segments::{
    as_f16, check_canonical, check_finite_f16, f16_at, f16_bytes, f16_vec, join, signed, split,
    total,
};
use super::traits::{WeightEncoding, WeightView};
use crate::error::{Error, Result, Rule};
use crate::num::len_u64;

/// Columns per unit: one 64-bit word of each state plane.
pub const UNIT: usize = 64;
/// Scales per row and block: dense, intermediate, sparse, salient, residual.
pub const SCALES: usize = 5;

/// Parameters of the STBLLM encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stbllm {
    n: u8,
    block: u16,
}

impl Stbllm {
    /// The registered id.
    pub const ID: u32 = 32;

    /// Keeps `n` of 8 weights, 1 to 8. `block` columns, a multiple of 32, share scales. `None` for
    /// other values.
    #[must_use]
    pub fn new(n: u8, block: u16) -> Option<Self> {
        let valid = (1..=8).contains(&n) && block != 0 && block.is_multiple_of(32);
        valid.then_some(Self { n, block })
    }

    /// Weights kept of each group of 8.
    #[must_use]
    #[inline]
    pub fn n(self) -> usize {
        usize::from(self.n)
    }

    /// Columns that share scales.
    #[must_use]
    #[inline]
    pub fn block(self) -> usize {
        usize::from(self.block)
    }

    /// Weights kept in a group of `width` columns: N, or ceil(N·width/8) in a ragged last group.
    #[must_use]
    pub fn kept(self, width: usize) -> usize {
        self.n().saturating_mul(width.min(8)).div_ceil(8)
    }

    fn segments(self, rows: u64, cols: u64) -> Option<[u64; 4]> {
        let units = cols.div_ceil(len_u64(UNIT));
        let blocks = cols.div_ceil(u64::from(self.block));
        let row_units = rows.checked_mul(units)?;
        Some([
            units.checked_mul(8)?,
            row_units.checked_mul(16)?,
            row_units.checked_mul(u64::from(self.n))?,
            rows.checked_mul(blocks)?.checked_mul(len_u64(SCALES))?.checked_mul(2)?,
        ])
    }
}

impl WeightEncoding for Stbllm {
    type View<'a> = StbllmView<'a>;
    const IDS: &'static [u32] = &[Self::ID];

    fn parse(_: u32, params: [u8; 16]) -> Option<Self> {
        let [n, 0, b0, b1, rest @ ..] = params else { return None };
        if rest != [0; 12] {
            return None;
        }
        Self::new(n, u16::from_le_bytes([b0, b1]))
    }

    fn id(self) -> u32 {
        Self::ID
    }

    fn params(self) -> [u8; 16] {
        let [b0, b1] = self.block.to_le_bytes();
        [self.n, 0, b0, b1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        total(self.segments(rows, cols)?)
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<StbllmView<'_>> {
        StbllmView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for Stbllm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stbllm {}:8/b{}", self.n, self.block)
    }
}

/// The logical content of an STBLLM tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct StbllmParts {
    /// Parameters.
    pub spec: Stbllm,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Whether each column is salient, `[cols]`.
    pub salient: Vec<bool>,
    /// State of each weight, [rows, cols]. 0 is pruned. In other than salient columns, 1 is the dense, 2
    /// the intermediate and 3 the sparse region. In salient columns, 1 is a positive and 2 a negative
    /// residual.
    pub states: Vec<u8>,
    /// Whether each weight is negative, [rows, cols]; false for pruned weights.
    pub negative: Vec<bool>,
    /// Scales, [rows, blocks, 5]: dense, intermediate, sparse, salient, residual.
    pub scales: Vec<f16>,
}

impl StbllmParts {
    /// The payload. `states` must keep [`Stbllm::kept`] weights in every group; signs of surplus weights
    /// are dropped.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let cols = self.cols.max(1);
        let salient: Vec<u8> = self.salient.chunks(UNIT).flat_map(|w| word(w, |s| *s)).collect();
        let states: Vec<u8> = self
            .states
            .chunks(cols)
            .flat_map(|row| row.chunks(UNIT))
            .flat_map(|unit| {
                let low = word(unit, |s| s & 1 != 0);
                let high = word(unit, |s| s & 2 != 0);
                low.into_iter().chain(high)
            })
            .collect();
        let mut signs = Vec::new();
        for (states, negative) in self.states.chunks(cols).zip(self.negative.chunks(cols)) {
            for (states, negative) in states.chunks(UNIT).zip(negative.chunks(UNIT)) {
                signs.extend(self.pack_signs(states, negative));
            }
        }
        join([&salient, &states, &signs, &f16_bytes(&self.scales)])
    }

    /// The signs of one unit, N bytes. Bit g·N + k is the sign of kept weight k of group g.
    fn pack_signs(&self, states: &[u8], negative: &[bool]) -> Vec<u8> {
        let mut bits = 0u64;
        let mut base = 0u32;
        for (states, negative) in states.chunks(8).zip(negative.chunks(8)) {
            let kept = states.iter().zip(negative).filter(|(s, _)| **s != 0);
            for (k, (_, negative)) in (0..u32::from(self.spec.n)).zip(kept) {
                bits |= u64::from(*negative).wrapping_shl(base.saturating_add(k));
            }
            base = base.saturating_add(u32::from(self.spec.n));
        }
        bits.to_le_bytes().into_iter().take(self.spec.n()).collect()
    }
}

/// A word whose bit i is `is_set` of element i.
fn word<T>(elements: &[T], is_set: impl Fn(&T) -> bool) -> [u8; 8] {
    let bit = |word: u64, (i, e): (u32, &T)| word | u64::from(is_set(e)).wrapping_shl(i);
    (0..64).zip(elements).fold(0, bit).to_le_bytes()
}

/// An STBLLM matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct StbllmView<'a> {
    /// Parameters.
    pub spec: Stbllm,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Salient columns, one bit each, in words of 64.
    pub salient: &'a [[u8; 8]],
    /// State planes: rows × units × (low word, high word).
    pub states: &'a [[[u8; 8]; 2]],
    /// Signs of kept weights: rows × units × N bytes.
    pub signs: &'a [u8],
    /// Scales: rows × blocks × 5, binary16.
    pub scales: &'a [[u8; 2]],
}

impl<'a> StbllmView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: Stbllm, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let [salient, states, signs, scales] = split(payload, spec.segments(rows, cols)?)?;
        Some(Self {
            spec,
            rows: usize::try_from(rows).ok()?,
            cols: usize::try_from(cols).ok()?,
            salient: salient.as_chunks::<8>().0,
            states: bytemuck::cast_slice(states.as_chunks::<16>().0),
            signs,
            scales: as_f16(scales),
        })
    }

    /// Units of 64 columns per row.
    #[must_use]
    #[inline]
    pub fn units(&self) -> usize {
        self.cols.div_ceil(UNIT)
    }

    /// Scale blocks per row.
    #[must_use]
    #[inline]
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(self.spec.block())
    }

    /// The mask of salient columns of unit `unit`. Bit c is column 64·unit + c.
    #[must_use]
    #[inline]
    pub fn salient_word(&self, unit: usize) -> u64 {
        u64::from_le_bytes(self.salient.get(unit).copied().unwrap_or_default())
    }

    /// The low and high bits of the states of a unit.
    #[must_use]
    #[inline]
    pub fn state_words(&self, row: usize, unit: usize) -> (u64, u64) {
        let index = row.saturating_mul(self.units()).saturating_add(unit);
        let [low, high] = self.states.get(index).copied().unwrap_or_default();
        (u64::from_le_bytes(low), u64::from_le_bytes(high))
    }

    /// The signs of a unit. Bit g·N + k is the sign of kept weight k of group g.
    #[must_use]
    #[inline]
    pub fn sign_word(&self, row: usize, unit: usize) -> u64 {
        let n = self.spec.n();
        let start = row.saturating_mul(self.units()).saturating_add(unit).saturating_mul(n);
        let mut bytes = [0; 8];
        let stored = self.signs.get(start..start.saturating_add(n)).unwrap_or_default();
        for (b, s) in bytes.iter_mut().zip(stored) {
            *b = *s;
        }
        u64::from_le_bytes(bytes)
    }

    /// The five scales of a row and block: dense, intermediate, sparse, salient, residual.
    #[must_use]
    #[inline]
    pub fn block_scales(&self, row: usize, block: usize) -> [f32; SCALES] {
        let first = row.saturating_mul(self.blocks()).saturating_add(block).saturating_mul(SCALES);
        let mut scales = [0.0; SCALES];
        for (k, s) in scales.iter_mut().enumerate() {
            *s = f16_at(self.scales, first.saturating_add(k));
        }
        scales
    }

    /// The mask of negative weights over the 64 columns of a unit.
    #[must_use]
    pub fn negative_word(&self, row: usize, unit: usize) -> u64 {
        let (low, high) = self.state_words(row, unit);
        let (kept, mut signs) = (low | high, self.sign_word(row, unit));
        let mut negative = 0u64;
        for group in 0..8u32 {
            let shift = group.wrapping_mul(8);
            let mut mask = kept.wrapping_shr(shift) & 0xff;
            let mut sign = signs;
            while mask != 0 {
                let lowest = mask & mask.wrapping_neg();
                if sign & 1 != 0 {
                    negative |= lowest.wrapping_shl(shift);
                }
                sign >>= 1;
                mask ^= lowest;
            }
            signs = signs.checked_shr(u32::from(self.spec.n)).unwrap_or(0);
        }
        negative
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> StbllmParts {
        let bits = |word: u64, count: usize| (0..64).take(count).map(move |i| word >> i & 1 != 0);
        let width = |unit: usize| self.cols.saturating_sub(unit.saturating_mul(UNIT)).min(UNIT);
        let mut states = Vec::new();
        let mut negative = Vec::new();
        for row in 0..self.rows {
            for unit in 0..self.units() {
                let (low, high) = self.state_words(row, unit);
                let low = bits(low, width(unit)).map(u8::from);
                let high = bits(high, width(unit)).map(u8::from);
                states.extend(low.zip(high).map(|(l, h)| l | h << 1));
                negative.extend(bits(self.negative_word(row, unit), width(unit)));
            }
        }
        let salient =
            (0..self.units()).flat_map(|unit| bits(self.salient_word(unit), width(unit))).collect();
        let (spec, rows, cols) = (self.spec, self.rows, self.cols);
        StbllmParts { spec, rows, cols, salient, states, negative, scales: f16_vec(self.scales) }
    }

    /// STB-R-043 and STB-R-044.
    fn check_masks(&self, payload: &[u8]) -> Result<()> {
        let start = self.states.as_ptr().addr().saturating_sub(payload.as_ptr().addr());
        for row in 0..self.rows {
            for unit in 0..self.units() {
                let index = row.saturating_mul(self.units()).saturating_add(unit);
                let at = len_u64(start.saturating_add(index.saturating_mul(16)));
                let (low, high) = self.state_words(row, unit);
                self.check_counts(row, unit, low | high).map_err(|e| e.at(at))?;
                if low & high & self.salient_word(unit) & self.used_columns(unit) != 0 {
                    let detail = format!("row {row}, columns from {} ", unit.saturating_mul(UNIT));
                    return Err(Error::new(Rule::StbllmState, detail).at(at));
                }
            }
        }
        Ok(())
    }

    /// The mask of columns of the unit that are inside the matrix.
    fn used_columns(&self, unit: usize) -> u64 {
        match self.cols.saturating_sub(unit.saturating_mul(UNIT)) {
            width @ 0..UNIT => (1u64 << width).saturating_sub(1),
            _ => u64::MAX,
        }
    }

    /// STB-R-043 for one unit.
    fn check_counts(&self, row: usize, unit: usize, kept: u64) -> Result<()> {
        for (group, byte) in kept.to_le_bytes().into_iter().enumerate() {
            let first = unit.saturating_mul(UNIT).saturating_add(group.saturating_mul(8));
            // STB-R-041 covers the bits of columns past the last one.
            let width = self.cols.saturating_sub(first).min(8);
            let used = byte & u8::try_from((1u16 << width).saturating_sub(1)).unwrap_or(255);
            let expected = self.spec.kept(width);
            if usize::try_from(used.count_ones()).unwrap_or(0) != expected {
                let detail = format!(
                    "row {row}, columns from {first}: {} kept, {expected} expected",
                    used.count_ones()
                );
                return Err(Error::new(Rule::StbllmCount, detail));
            }
        }
        Ok(())
    }
}

impl WeightView for StbllmView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        if row >= self.rows {
            return;
        }
        for (unit, chunk) in out.chunks_mut(UNIT).enumerate() {
            let (low, high) = self.state_words(row, unit);
            let (salient, negative) = (self.salient_word(unit), self.negative_word(row, unit));
            let first = unit.saturating_mul(UNIT);
            for (c, o) in (0u32..).zip(chunk.iter_mut()) {
                let bit = |word: u64| word.wrapping_shr(c) & 1;
                let col = first.saturating_add(usize::try_from(c).unwrap_or(0));
                let block = col.checked_div(self.spec.block()).unwrap_or(0);
                let [dense, intermediate, sparse, order1, order2] = self.block_scales(row, block);
                let minus = bit(negative) != 0;
                *o = match (bit(salient), bit(high), bit(low)) {
                    (_, 0, 0) => 0.0,
                    (0, 0, _) => signed(dense, minus),
                    (0, _, 0) => signed(intermediate, minus),
                    (0, _, _) => signed(sparse, minus),
                    (_, 0, _) => signed(order1, minus) + order2,
                    (_, _, _) => signed(order1, minus) - order2,
                };
            }
        }
    }

    fn check(&self, payload: &[u8]) -> Result<()> {
        self.check_masks(payload)?;
        check_canonical(payload, &self.unpack().pack())?;
        check_finite_f16(payload, self.scales, "scale")
    }
}
