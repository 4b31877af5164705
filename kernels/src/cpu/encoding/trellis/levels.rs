//! From the stream of a unit to its levels: the sums of table entries, of which 64 means zero.

use stb_format::encoding::trellis::ZERO;
use stb_format::encoding::{TrellisTables, TrellisView};

use super::super::expanded_amx::ExpandedBlock;
use crate::cpu::arch::bytes::{Aligned, Bytes};
use crate::cpu::ops::q8::BLOCK;

/// Words of four columns in a block of activations.
pub(super) const BLOCK_WORDS: usize = BLOCK / 4;

/// The tables of each weight of a step, in registers.
#[derive(Clone, Copy)]
pub(super) struct Levels<S: Bytes, const WEIGHTS: usize>([[S::B; 2]; WEIGHTS]);

impl<S: Bytes, const WEIGHTS: usize> Levels<S, WEIGHTS> {
    /// The levels, or with `signed` the levels minus 64 as signed bytes.
    #[inline(always)]
    pub(super) fn new(s: S, tables: &[TrellisTables], signed: bool) -> Self {
        let offset = if signed { ZERO } else { 0 };
        let mut registers = [[s.splat_b(0); 2]; WEIGHTS];
        for (registers, [low, mixed]) in registers.iter_mut().zip(tables) {
            let (mut lows, mut mixes) = (Aligned([0; 64]), Aligned([0; 64]));
            for i in 0..64 {
                lows[i] = low[i % 16].wrapping_sub(offset);
                mixes[i] = mixed[i % 16];
            }
            *registers = [s.load_b(&lows), s.load_b(&mixes)];
        }
        Self(registers)
    }

    /// The levels of a unit: byte 4r + c of vector v is that of row r and column 4v + c.
    #[inline(always)]
    pub(super) fn of<const BITS: usize>(&self, s: S, stream: &[[u8; 8]; BITS]) -> [S::B; WEIGHTS] {
        let windows = s.windows(stream);
        let nibble = s.splat_b(15);
        let low = s.and_b(windows, nibble);
        let mixed = s.and_b(s.xor_b(windows, s.shr_b::<4>(windows)), nibble);
        self.0.map(
            #[inline(always)]
            |[lows, mixes]| s.add_b(s.lookup_b(lows, low), s.lookup_b(mixes, mixed)),
        )
    }
}

/// The streams of the units of a tile.
#[inline(always)]
pub(super) fn units<'a, const BITS: usize>(
    m: &TrellisView<'a>,
    tile: usize,
) -> &'a [[[u8; 8]; BITS]] {
    m.tile_streams(tile).as_chunks().0.as_chunks().0
}

/// Writes the levels of block `block` of 128 columns of a tile to `to`; any bytes past the last column, where activations are
/// zero.
#[inline(always)]
pub(super) fn expand<S: Bytes, const BITS: usize, const WEIGHTS: usize>(
    s: S,
    m: &TrellisView<'_>,
    levels: &Levels<S, WEIGHTS>,
    tile: usize,
    block: usize,
    to: &mut ExpandedBlock,
) {
    let first = block * (BLOCK_WORDS / WEIGHTS);
    let streams = units::<BITS>(m, tile).get(first..).unwrap_or_default();
    for (stream, to) in streams.iter().zip(to.0.chunks_exact_mut(WEIGHTS)) {
        for (levels, to) in levels.of(s, stream).into_iter().zip(to) {
            s.store_b(levels, to);
        }
    }
}
