//! Scales of encodings whose rows are stored in tiles of 16: one binary16 number per row, and optionally a small code
//! per row and block of columns (spec, encodings §5.3).

use super::segments::f16_at;
use crate::num::len_u64;

/// Rows per tile: the 16 bytes of a SIMD lane.
pub const TILE: usize = 16;

/// The parameters of block scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockScaleParams {
    /// Bits of a code: 0 (none), 4 or 8.
    pub bits: u8,
    /// Columns that share a code; 0 if there are none.
    pub block: u16,
}

impl BlockScaleParams {
    /// `block` is a multiple of 32, or 0 if and only if `bits` is 0. `None` for other values.
    pub(crate) fn new(bits: u8, block: u16) -> Option<Self> {
        let valid =
            matches!(bits, 0 | 4 | 8) && (bits == 0) == (block == 0) && block.is_multiple_of(32);
        valid.then_some(Self { bits, block })
    }

    /// Codes of a row.
    pub(crate) fn blocks(self, cols: u64) -> u64 {
        if self.block == 0 { 0 } else { cols.div_ceil(u64::from(self.block)) }
    }

    /// Bytes of all codes of a matrix; `None` on overflow.
    pub(crate) fn len(self, rows: u64, cols: u64) -> Option<u64> {
        let tile = self.blocks(cols).checked_mul(u64::from(self.bits))?.checked_mul(2)?;
        rows.div_ceil(len_u64(TILE)).checked_mul(tile)
    }

    /// Packs codes, [rows, blocks], by tile and block, the 16 rows of a tile together. A byte of 4-bit codes has those
    /// of rows k and k + 8.
    pub(crate) fn pack(self, codes: &[u8], cols: usize) -> Vec<u8> {
        let blocks = usize::try_from(self.blocks(len_u64(cols))).unwrap_or(0);
        if blocks == 0 {
            return Vec::new();
        }
        let rows: Vec<&[u8]> = codes.chunks(blocks).collect();
        let mut bytes = Vec::new();
        for tile in rows.chunks(TILE) {
            for block in 0..blocks {
                let code = |r: usize| tile.get(r).and_then(|row| row.get(block)).copied();
                let code = |r: usize| code(r).unwrap_or(0);
                if self.bits == 8 {
                    bytes.extend((0..16).map(code));
                } else {
                    bytes.extend((0..8).map(|k| code(k) & 15 | code(k.saturating_add(8)) << 4));
                }
            }
        }
        bytes
    }
}

/// The scales of a matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct TileScales<'a> {
    /// Bits of a block scale code: 4 or 8, or 0 without block scales.
    pub bits: u8,
    /// Columns that share a block scale code; 0 without block scales.
    pub block: usize,
    /// Block scale codes of a row.
    pub blocks: usize,
    /// Row scales, binary16.
    pub row_scales: &'a [[u8; 2]],
    /// Block scale codes: tiles × blocks × 16 codes.
    pub block_codes: &'a [u8],
}

impl TileScales<'_> {
    /// The block scale code of a row and block.
    #[must_use]
    pub fn block_code(&self, row: usize, block: usize) -> u8 {
        let (tile, r) = (row.wrapping_div(TILE), row.wrapping_rem(TILE));
        let index = tile.saturating_mul(self.blocks).saturating_add(block);
        let at = |start: usize, i: usize| {
            self.block_codes.get(start.saturating_add(i)).copied().unwrap_or(0)
        };
        match self.bits {
            8 => at(index.saturating_mul(16), r),
            _ => {
                let pair = at(index.saturating_mul(8), r & 7);
                if r < 8 { pair & 15 } else { pair >> 4 }
            }
        }
    }

    /// The multiplier of a block scale code: (code + 1) / 2^bits, exact in binary32.
    #[must_use]
    pub fn multiplier(&self, code: u8) -> f32 {
        let step = if self.bits == 8 { 1.0 / 256.0 } else { 1.0 / 16.0 };
        (f32::from(code) + 1.0) * step
    }

    /// The scale of a row from column `col` on, to the end of its block.
    #[must_use]
    pub fn scale(&self, row: usize, col: usize) -> f32 {
        let row_scale = f16_at(self.row_scales, row);
        match col.checked_div(self.block) {
            Some(block) => row_scale * self.multiplier(self.block_code(row, block)),
            None => row_scale,
        }
    }

    /// All block scale codes, [rows, blocks].
    pub(crate) fn codes(&self, rows: usize) -> Vec<u8> {
        (0..rows)
            .flat_map(|row| (0..self.blocks).map(move |block| self.block_code(row, block)))
            .collect()
    }
}
