//! Scales of encodings with tiles of 16 rows: of rows, and of blocks of columns of a row.

use stb_format::encoding::{TILE, TileScales};
use stb_format::half::f16;

use super::gemm_task::{TileLanes, store_tile};
use crate::cpu::arch::bytes::Bytes;
use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8::BLOCK;

/// The scale multipliers of the rows of a tile: (code + 1) / 2^bits.
#[inline(always)]
pub(super) fn multipliers<S: Simd>(s: S, m: &TileScales<'_>, tile: usize, block: usize) -> S::F {
    let scales = BlockScales::of(m, tile);
    s.mul(scales.at(s, block), s.splat(scales.size))
}

/// The block scale codes of a tile. A multiplier is code + 1 steps of the size 1 / 2^bits.
#[derive(Clone, Copy)]
pub(super) struct BlockScales<'a> {
    /// For each block, the 4-bit codes of the 16 rows, two in a byte. Empty if codes have 8 bits.
    four: &'a [[u8; 8]],
    /// For each block, the 8-bit codes of the 16 rows. Empty if codes have 4 bits.
    eight: &'a [[u8; 16]],
    /// 1 / 2^bits.
    pub size: f32,
}

impl<'a> BlockScales<'a> {
    #[inline(always)]
    pub(super) fn of(m: &TileScales<'a>, tile: usize) -> Self {
        let (blocks, wide) = (m.blocks, m.bits == 8);
        let bytes = blocks * if wide { 16 } else { 8 };
        let codes = m.block_codes.get(tile * bytes..(tile + 1) * bytes).unwrap_or_default();
        if wide {
            Self { four: &[], eight: codes.as_chunks().0, size: 1.0 / 256.0 }
        } else {
            Self { four: codes.as_chunks().0, eight: &[], size: 1.0 / 16.0 }
        }
    }

    /// Prefetches the codes of the tile `tiles` after this one.
    #[inline(always)]
    pub(super) fn prefetch_ahead<S: Bytes>(&self, s: S, tiles: usize) {
        let codes = self.four.as_flattened();
        for line in (0..codes.len()).step_by(64) {
            s.prefetch(codes.as_ptr().wrapping_add(tiles * codes.len() + line));
        }
    }

    /// Code + 1 of each row.
    #[inline(always)]
    pub(super) fn at<S: Simd>(&self, s: S, block: usize) -> S::F {
        let codes = match self.four.get(block) {
            Some(stored) => {
                let pairs = u64::from_le_bytes(*stored);
                const LOW: u64 = 0x0f0f_0f0f_0f0f_0f0f;
                let both = u128::from(pairs & LOW) | u128::from(pairs >> 4 & LOW) << 64;
                both.to_le_bytes()
            }
            None => self.eight.get(block).copied().unwrap_or_default(),
        };
        s.add(s.to_f32(s.widen_u8(&codes)), s.splat(1.0))
    }
}

/// The scales of the rows of a tile; zero past the last row.
#[inline(always)]
pub(super) fn row_scales<S: Simd>(s: S, m: &TileScales<'_>, tile: usize) -> S::F {
    let stored = m.row_scales.get(tile * TILE..).unwrap_or_default();
    if let Some(stored) = stored.as_flattened().first_chunk() {
        return s.f16_to_f32(stored);
    }
    let mut scales = [0.0; TILE];
    for (scale, stored) in scales.iter_mut().zip(stored) {
        *scale = f16::from_le_bytes(*stored).to_f32();
    }
    s.load(&scales)
}

/// The block scales of 16 rows in a block of q8 activations: code + 1 of each row, and the size of a step.
/// `None` if the matrix has no block scales.
#[inline(always)]
pub(super) fn block_steps<S: Bytes>(
    s: S,
    m: &TileScales<'_>,
    tile: usize,
    block: usize,
) -> Option<(S::F, f32)> {
    (m.blocks != 0).then(
        #[inline(always)]
        || {
            let scales = BlockScales::of(m, tile);
            (scales.at(s, block * BLOCK / m.block), scales.size)
        },
    )
}

/// Multiplies the sums of a tile, [token][row], by the scales of its rows.
#[inline(always)]
pub(super) fn scale_rows<S: Bytes>(s: S, m: &TileScales<'_>, tile: usize, y: &mut [TileLanes]) {
    let scales = row_scales(s, m, tile);
    for TileLanes(y) in y {
        s.store(s.mul(s.load(y), scales), y);
    }
}

/// Writes the sums of a tile for each token, times the scales of its rows, from row `at` of the `rows` of each token in
/// `y`. `at` is a multiple of [`TILE`].
#[inline(always)]
pub(super) fn put_tile<S: Bytes, const K: usize>(
    s: S,
    scales: S::F,
    totals: [S::F; K],
    at: usize,
    rows: usize,
    y: &mut [f32],
) {
    for (total, y) in totals.into_iter().zip(y.chunks_exact_mut(rows)) {
        store_tile(s, s.mul(total, scales), at / TILE, y);
    }
}

/// Block scales times the scale of activations, by the same operations as in the product for one token.
#[inline(always)]
pub(super) fn times<S: Bytes>(s: S, steps: Option<(S::F, f32)>, activation: f32) -> S::F {
    match steps {
        None => s.splat(activation),
        Some((steps, step)) => s.mul(steps, s.splat(activation * step)),
    }
}
