//! Exact products and weights of trellis codes. The 16 rows of a tile are the 16 lanes of a vector.

use stb_format::encoding::TILE;
use stb_format::encoding::TrellisView;
use stb_format::encoding::trellis::ZERO;
use stb_format::half::f16;
use stb_format::trellis_rates;

use super::super::col_factors::multiply_factors;
use super::super::tile_scales::{multipliers, row_scales};
use super::levels::{Levels, units};
use crate::cpu::arch::bytes::{Aligned, Bytes, Task};
use crate::cpu::packed::UnpackBlock;

/// See [`PackedMatrix::gemv`](crate::PackedMatrix::gemv). `x` is padded with zeros.
pub(super) struct TrellisGemv<'a> {
    pub matrix: &'a TrellisView<'a>,
    pub x: &'a [f32],
    pub first: usize,
    pub y: &'a mut [f32],
}

impl Task for TrellisGemv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix: m, x, first, y } = self;
        // Few calls take this path, so each scales the activations anew.
        let scaled;
        let x = if m.col_factors.is_empty() {
            x
        } else {
            let mut copy = x.to_vec();
            multiply_factors(s, m.col_factors, &mut copy);
            scaled = copy;
            &scaled
        };
        trellis_rates!(m.spec, |BITS, WEIGHTS| {
            let levels = Levels::<S, WEIGHTS>::new(s, m.tables, false);
            for (t, y) in y.chunks_mut(TILE).enumerate() {
                let sums = tile_sums::<S, BITS, WEIGHTS>(s, m, &levels, x, first / TILE + t);
                let mut lanes = [0.0; TILE];
                s.store(sums, &mut lanes);
                y.copy_from_slice(&lanes[..y.len()]);
            }
        });
    }
}

/// The products of the rows of a tile.
#[inline(always)]
fn tile_sums<S: Bytes, const BITS: usize, const WEIGHTS: usize>(
    s: S,
    m: &TrellisView<'_>,
    levels: &Levels<S, WEIGHTS>,
    x: &[f32],
    tile: usize,
) -> S::F {
    let scales = m.scales();
    let streams = units::<BITS>(m, tile);
    let block = if scales.blocks == 0 { x.len() } else { scales.block };
    let mut total = s.splat(0.0);
    let parts = streams.chunks(block.div_ceil(4 * WEIGHTS).max(1)).zip(x.chunks(block.max(1)));
    for (k, (streams, x)) in parts.enumerate() {
        let mut sum = s.splat(0.0);
        let words = x.as_chunks::<4>().0;
        for (stream, words) in streams.iter().zip(words.chunks(WEIGHTS)) {
            for (levels, x) in levels.of(s, stream).into_iter().zip(words) {
                let columns = columns(s, levels);
                for (column, x) in columns.into_iter().zip(x) {
                    sum = s.mul_add(column, s.splat(*x), sum);
                }
            }
        }
        total = if scales.blocks == 0 {
            sum
        } else {
            s.mul_add(multipliers(s, &scales, tile, k), sum, total)
        };
    }
    s.mul(total, row_scales(s, &scales, tile))
}

/// The weights of four columns in units of the scale, by column.
#[inline(always)]
fn columns<S: Bytes>(s: S, levels: S::B) -> [S::F; 4] {
    let mut bytes = Aligned([0; 64]);
    s.store_b(levels, &mut bytes);
    let mut words = Aligned([0i32; 16]);
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = i32::from_le_bytes(*bytes);
    }
    let words = s.load_i(&words);
    let zero = s.splat(f32::from(ZERO));
    std::array::from_fn(
        #[inline(always)]
        |c| {
            let level = s.and(s.shr(words, 8 * c as u32), s.splat_i(255));
            s.sub(s.to_f32(level), zero)
        },
    )
}

/// See [`PackedMatrix::unpack`](crate::PackedMatrix::unpack).
pub(super) struct TrellisUnpack<'a> {
    pub matrix: &'a TrellisView<'a>,
    pub block: UnpackBlock,
    pub to: &'a mut [f32],
}

impl Task for TrellisUnpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix: m, block, to } = self;
        trellis_rates!(m.spec, |BITS, WEIGHTS| {
            let levels = Levels::<S, WEIGHTS>::new(s, m.tables, false);
            for (t, to) in to.chunks_exact_mut(TILE * block.cols).enumerate() {
                if t * TILE < block.rows {
                    let tile = block.first_row / TILE + t;
                    unpack_tile::<S, BITS, WEIGHTS>(s, m, &levels, tile, &block, to);
                }
            }
        });
    }
}

/// Writes the columns of `block` in a tile to `to`, 16 rows.
#[inline(always)]
fn unpack_tile<S: Bytes, const BITS: usize, const WEIGHTS: usize>(
    s: S,
    m: &TrellisView<'_>,
    levels: &Levels<S, WEIGHTS>,
    tile: usize,
    block: &UnpackBlock,
    to: &mut [f32],
) {
    let scales = m.scales();
    let row_scales = row_scales(s, &scales, tile);
    let unit_cols = 4 * WEIGHTS;
    let first = block.first_col / unit_cols;
    let streams = units::<BITS>(m, tile).iter().skip(first).take(block.cols / unit_cols);
    for (u, stream) in streams.enumerate() {
        let col = block.first_col + u * unit_cols;
        let scale = match col.checked_div(scales.block) {
            Some(k) => s.mul(row_scales, multipliers(s, &scales, tile, k)),
            None => row_scales,
        };
        for (v, levels) in levels.of(s, stream).into_iter().enumerate() {
            for (c, column) in columns(s, levels).into_iter().enumerate() {
                let at = u * unit_cols + 4 * v + c;
                let column = match m.col_factors.get(block.first_col + at) {
                    Some(factor) => s.mul(column, s.splat(f16::from_le_bytes(*factor).to_f32())),
                    None => column,
                };
                let mut lanes = [0.0; TILE];
                s.store(s.mul(column, scale), &mut lanes);
                for (row, w) in to.chunks_exact_mut(block.cols).zip(lanes) {
                    row[at] = w;
                }
            }
        }
    }
}
