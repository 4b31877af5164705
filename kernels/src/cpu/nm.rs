//! Joint N:M codes: the 16 rows of a tile are the 16 lanes, and a code is the index of a look-up in
//! a table of signed activations that all rows share. No weight is ever expanded.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE, VECTOR};
use stb_format::half::f16;

use super::{Bytes, Simd};

/// Tiles that share the tables of a pass over the columns.
const TILES: usize = 4;

/// Multiplies activations, padded with zeros to whole vectors, by the column factors.
#[inline(always)]
pub(crate) fn multiply_factors<S: Simd>(s: S, m: &NmView<'_>, x: &mut [f32]) {
    let (factors, tail) = m.col_factors.as_chunks::<16>();
    let (vectors, _) = x.as_chunks_mut::<16>();
    for (x, factors) in vectors.iter_mut().zip(factors) {
        let factors = factors.as_flattened().first_chunk().expect("16 factors");
        s.store(s.mul(s.load(x), s.f16_to_f32(factors)), x);
    }
    for (x, factor) in x[m.col_factors.len() - tail.len()..].iter_mut().zip(tail) {
        *x *= f16::from_le_bytes(*factor).to_f32();
    }
}

/// See [`super::gemv`]. `x` is padded with zeros to a multiple of [`super::PAD`].
#[inline(always)]
pub(crate) fn gemv<S: Simd>(s: S, m: &NmView<'_>, x: &[f32], first: usize, y: &mut [f32]) {
    match (m.spec.n(), m.spec.m()) {
        (1, 4) => all_tiles::<S, 1, 4>(s, m, x, first, y),
        (1, 8) => all_tiles::<S, 1, 8>(s, m, x, first, y),
        (2, 4) => all_tiles::<S, 2, 4>(s, m, x, first, y),
        (2, 8) => all_tiles::<S, 2, 8>(s, m, x, first, y),
        (n, m) => unreachable!("the format has no {n}:{m} codes"),
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
                s.mul_add(multipliers(s, m, tile + t, block), acc[t], totals[t])
            };
        }
    }
    totals
}

/// The scale multipliers of the rows of a tile: (code + 1) / 2^bits.
#[inline(always)]
fn multipliers<S: Simd>(s: S, m: &NmView<'_>, tile: usize, block: usize) -> S::F {
    let steps = Steps::of(m, tile);
    s.mul(steps.at(s, block), s.splat(steps.size))
}

/// The scale codes of a tile, whose multipliers are whole steps.
#[derive(Clone, Copy)]
pub(crate) struct Steps<'a> {
    /// By block, for each row; of both one is empty. Two rows in a byte:
    four: &'a [[u8; 8]],
    eight: &'a [[u8; 16]],
    /// 1 / 2^bits.
    pub size: f32,
}

impl<'a> Steps<'a> {
    #[inline(always)]
    pub(crate) fn of(m: &NmView<'a>, tile: usize) -> Self {
        let (blocks, wide) = (m.blocks(), m.spec.scale_bits() == 8);
        let bytes = blocks * if wide { 16 } else { 8 };
        let codes = m.block_codes.get(tile * bytes..(tile + 1) * bytes).unwrap_or_default();
        if wide {
            Self { four: &[], eight: codes.as_chunks().0, size: 1.0 / 256.0 }
        } else {
            Self { four: codes.as_chunks().0, eight: &[], size: 1.0 / 16.0 }
        }
    }

    /// Asks for the codes of the tile that comes `tiles` later.
    #[inline(always)]
    pub(crate) fn prefetch_behind<S: Bytes>(&self, s: S, tiles: usize) {
        let codes = self.four.as_flattened();
        for line in (0..codes.len()).step_by(64) {
            s.prefetch(codes.as_ptr().wrapping_add(tiles * codes.len() + line));
        }
    }

    /// Code + 1 of each row.
    #[inline(always)]
    pub(crate) fn at<S: Simd>(&self, s: S, block: usize) -> S::F {
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

/// The scales of the rows of a tile, zero past the last one.
#[inline(always)]
pub(super) fn row_scales<S: Simd>(s: S, m: &NmView<'_>, tile: usize) -> S::F {
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
    let place = Place::new(m.spec.code_bits() as usize, quad, quads);
    let mut columns = [0.0; 32];
    columns[..QUAD * M].copy_from_slice(&x[quad * QUAD * M..(quad + 1) * QUAD * M]);
    for lane in 0..QUAD {
        let table = Table::<S>::new::<N, M>(s, &columns[lane * M..(lane + 1) * M]);
        for t in 0..T {
            let code = place.codes(s, codes[t], lane);
            acc[t] = s.add(acc[t], table.sums::<N, M>(s, code));
        }
    }
}

/// Where the codes of a quad lie in a tile: for up to two planes, the byte and the shift.
struct Place {
    byte: [usize; 3],
    shift: [u32; 3],
    width: [u32; 3],
}

impl Place {
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
struct Table<S: Simd>(S::F);

impl<S: Simd> Table<S> {
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
pub(crate) fn unpack<S: Simd>(
    s: S,
    m: &NmView<'_>,
    tile: usize,
    from: usize,
    width: usize,
    to: &mut [f32],
) {
    let group_cols = m.spec.m();
    let quads = m.groups().div_ceil(QUAD);
    let row_scales = row_scales(s, m, tile);
    let mut scales = [0.0; TILE];
    s.store(row_scales, &mut scales);
    to[..TILE * width].fill(0.0);
    let quad_cols = QUAD * group_cols;
    for quad in from / quad_cols..quads.min((from + width) / quad_cols) {
        let place = Place::new(m.spec.code_bits() as usize, quad, quads);
        if m.blocks() != 0 {
            let block = quad * quad_cols / m.spec.block();
            s.store(s.mul(row_scales, multipliers(s, m, tile, block)), &mut scales);
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
const _: () = assert!(super::PAD.is_multiple_of(QUAD * 8));
