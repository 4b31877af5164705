//! Exact products and weights of N:M codes. The 16 rows of a tile are the 16 lanes of a vector, and a code
//! is the index of a look-up in a table of signed activations that all rows share. Products do not expand
//! weights.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE, VECTOR};
use stb_format::half::f16;
use stb_format::nm_rates;

use super::super::tile_scales::{multipliers, row_scales};
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8::PAD;
use crate::cpu::packed::UnpackBlock;

/// Tiles that are computed together, so that each table is built once for all of them.
const TILES: usize = 4;

/// See [`PackedMatrix::gemv`](crate::PackedMatrix::gemv). `x` is padded with zeros to a multiple of
/// [`PAD`].
pub(super) struct NmGemv<'a> {
    pub matrix: &'a NmView<'a>,
    pub x: &'a [f32],
    pub first: usize,
    pub y: &'a mut [f32],
}

impl Task for NmGemv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix: m, x, first, y } = self;
        nm_rates!(m.spec, |N, M, BITS| all_tiles::<S, N, M>(s, m, x, first, y));
    }
}

/// See [`PackedMatrix::unpack`](crate::PackedMatrix::unpack).
pub(super) struct NmUnpack<'a> {
    pub matrix: &'a NmView<'a>,
    pub block: UnpackBlock,
    pub to: &'a mut [f32],
}

impl Task for NmUnpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, block, to } = self;
        for (t, r) in (0..block.rows).step_by(TILE).enumerate() {
            let tile = block.first_row / TILE + t;
            let to = &mut to[r * block.cols..];
            unpack_tile(s, matrix, tile, block.first_col, block.cols, to);
        }
    }
}

#[inline(always)]
fn all_tiles<S: Simd, const N: usize, const M: usize>(
    s: S,
    m: &NmView<'_>,
    x: &[f32],
    first: usize,
    y: &mut [f32],
) {
    for (i, y) in y.chunks_mut(TILE * TILES).enumerate() {
        let tile = first / TILE + i * TILES;
        let totals = if y.len() > TILE {
            tiles::<S, N, M, TILES>(s, m, x, tile)
        } else {
            let [one] = tiles::<S, N, M, 1>(s, m, x, tile);
            [one, s.splat(0.0), s.splat(0.0), s.splat(0.0)]
        };
        for (t, y) in y.chunks_mut(TILE).enumerate() {
            let mut sums = [0.0; TILE];
            s.store(totals[t], &mut sums);
            let row = (tile + t) * TILE;
            for (r, y) in y.iter_mut().enumerate() {
                *y = sums[r] * f16::from_le_bytes(m.row_scales[row + r]).to_f32();
            }
        }
    }
}

/// Sums of `T` tiles from `tile`, without the row scales. Tiles past the last give zero.
#[inline(always)]
fn tiles<S: Simd, const N: usize, const M: usize, const T: usize>(
    s: S,
    m: &NmView<'_>,
    x: &[f32],
    tile: usize,
) -> [S::F; T] {
    let quads = m.groups().div_ceil(QUAD);
    let mut codes: [&[u8]; T] = [&[]; T];
    for (t, codes) in codes.iter_mut().enumerate() {
        *codes = m.tile_codes(tile + t);
    }
    let mut totals = [s.splat(0.0); T];
    // Block boundaries are multiples of 32 columns, and so of quads.
    let block_quads = if m.blocks() == 0 { quads } else { m.spec.block() / (QUAD * M) };
    for (block, from) in (0..quads).step_by(block_quads.max(1)).enumerate() {
        let mut acc = [s.splat(0.0); T];
        for quad in from..quads.min(from + block_quads) {
            add_quad::<S, N, M, T>(s, m, x, quad, quads, codes, &mut acc);
        }
        for t in 0..T {
            totals[t] = if m.blocks() == 0 {
                acc[t]
            } else {
                s.mul_add(multipliers(s, &m.scales(), tile + t, block), acc[t], totals[t])
            };
        }
    }
    totals
}

/// Adds the four groups of a quad for `T` tiles.
#[inline(always)]
fn add_quad<S: Simd, const N: usize, const M: usize, const T: usize>(
    s: S,
    m: &NmView<'_>,
    x: &[f32],
    quad: usize,
    quads: usize,
    codes: [&[u8]; T],
    acc: &mut [S::F; T],
) {
    let place = CodePlace::new(m.spec.code_bits() as usize, quad, quads);
    let mut columns = [0.0; 32];
    columns[..QUAD * M].copy_from_slice(&x[quad * QUAD * M..(quad + 1) * QUAD * M]);
    for lane in 0..QUAD {
        let table = SignedSums::<S>::new::<N, M>(s, &columns[lane * M..(lane + 1) * M]);
        for t in 0..T {
            let code = place.codes(s, codes[t], lane);
            acc[t] = s.add(acc[t], table.sums::<N, M>(s, code));
        }
    }
}

/// The position of the codes of a quad in a tile: byte, shift and width for each plane.
struct CodePlace {
    byte: [usize; 3],
    shift: [u32; 3],
    width: [u32; 3],
}

impl CodePlace {
    #[inline(always)]
    fn new(code_bits: usize, quad: usize, quads: usize) -> Self {
        let chunk = quad / CHUNK_QUADS;
        let in_chunk = (quads - chunk * CHUNK_QUADS).min(CHUNK_QUADS);
        let quad = quad % CHUNK_QUADS;
        let mut place = Self { byte: [0; 3], shift: [0; 3], width: [0; 3] };
        let mut plane = chunk * code_bits * VECTOR;
        let mut used = 0;
        for width in [4, 2, 1] {
            if code_bits & width != 0 {
                let slots = 8 / width;
                place.byte[used] = plane + quad / slots * VECTOR;
                place.shift[used] = (quad % slots * width) as u32;
                place.width[used] = width as u32;
                plane += in_chunk.div_ceil(slots) * VECTOR;
                used += 1;
            }
        }
        place
    }

    /// The codes of 16 rows for the group in `lane`; zero outside the matrix.
    #[inline(always)]
    fn codes<S: Simd>(&self, s: S, tile: &[u8], lane: usize) -> S::I {
        let mut code = s.splat_i(0);
        let mut at = 0;
        for p in 0..3 {
            if self.width[p] == 0 {
                continue;
            }
            let from = self.byte[p] + lane * TILE;
            let bytes = tile.get(from..).and_then(|b| b.first_chunk()).unwrap_or(&[0; 16]);
            let bits = s.shr(s.widen_u8(bytes), self.shift[p]);
            let bits = s.and(bits, s.splat_i((1 << self.width[p]) - 1));
            code = if at == 0 { bits } else { s.or(code, s.shl(bits, at)) };
            at += self.width[p];
        }
        code
    }
}

/// A table indexed by (part of) a code.
struct SignedSums<S: Simd>(S::F);

impl<S: Simd> SignedSums<S> {
    /// 1:M and 2:8: activations of the group, then their negatives. 2:4: the sum that each pair of
    /// positions keeps, for a positive sign.
    #[inline(always)]
    fn new<const N: usize, const M: usize>(s: S, group: &[f32]) -> Self {
        let mut signed = [0.0; 16];
        for (k, x) in group.iter().enumerate() {
            signed[k] = *x;
            signed[k + M] = -*x;
        }
        if (N, M) != (2, 4) {
            return Self(s.load(&signed));
        }
        // Index i + 4j keeps x_i, plus x_j if i < j, minus x_j if i > j. Entry 8 of `signed` is 0.
        #[rustfmt::skip]
        const SECOND: [u8; 16] = [
            8, 4, 4, 4,
            1, 8, 5, 5,
            2, 2, 8, 6,
            3, 3, 3, 8,
        ];
        const FIRST: [u8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];
        let signed = s.load(&signed);
        let first = s.lookup(signed, s.widen_u8(&FIRST));
        Self(s.add(first, s.lookup(signed, s.widen_u8(&SECOND))))
    }

    /// The signed partial sums of 16 codes.
    #[inline(always)]
    fn sums<const N: usize, const M: usize>(&self, s: S, code: S::I) -> S::F {
        match (N, M) {
            (2, 4) => {
                let sign = s.shl(s.and(code, s.splat_i(16)), 27);
                s.cast_f(s.xor(s.cast_i(s.lookup(self.0, code)), sign))
            }
            (2, 8) => {
                let i = s.and(code, s.splat_i(7));
                let j = s.and(s.shr(code, 3), s.splat_i(7));
                let sign = s.and(s.shr(code, 3), s.splat_i(8));
                let i_above = s.gt_i(i, j);
                let first = s.lookup(self.0, s.or(i, sign));
                let second_sign = s.xor(sign, s.and(i_above, s.splat_i(8)));
                let second = s.cast_i(s.lookup(self.0, s.or(j, second_sign)));
                // Equal positions keep one weight.
                let differ = s.or(i_above, s.gt_i(j, i));
                s.add(first, s.cast_f(s.and(second, differ)))
            }
            _ => s.lookup(self.0, code),
        }
    }
}

/// Writes the exact weights of columns `from..from + width` of tile `tile` to `to`, 16 rows of
/// `width`. `from` and `width` are multiples of 32. Rows past the last are zero.
#[inline(always)]
fn unpack_tile<S: Simd>(
    s: S,
    m: &NmView<'_>,
    tile: usize,
    from: usize,
    width: usize,
    to: &mut [f32],
) {
    let group_cols = m.spec.m();
    let quads = m.groups().div_ceil(QUAD);
    let row_scales = row_scales(s, &m.scales(), tile);
    let mut scales = [0.0; TILE];
    s.store(row_scales, &mut scales);
    to[..TILE * width].fill(0.0);
    let quad_cols = QUAD * group_cols;
    for quad in from / quad_cols..quads.min((from + width) / quad_cols) {
        let place = CodePlace::new(m.spec.code_bits() as usize, quad, quads);
        if m.blocks() != 0 {
            let block = quad * quad_cols / m.spec.block();
            s.store(s.mul(row_scales, multipliers(s, &m.scales(), tile, block)), &mut scales);
        }
        for lane in 0..QUAD {
            let mut codes = [0.0; TILE];
            s.store(s.to_f32(place.codes(s, m.tile_codes(tile), lane)), &mut codes);
            let first = quad * quad_cols + lane * group_cols;
            for r in 0..TILE {
                for (position, negative) in m.spec.pattern(codes[r] as u16).into_iter().flatten() {
                    let col = first + position;
                    let factor = match m.col_factors.get(col) {
                        Some(b) => scales[r] * f16::from_le_bytes(*b).to_f32(),
                        None => scales[r],
                    };
                    to[r * width + col - from] = if negative { -factor } else { factor };
                }
            }
        }
    }
}

// The tables load whole vectors of activations.
const _: () = assert!(PAD.is_multiple_of(QUAD * 8));
