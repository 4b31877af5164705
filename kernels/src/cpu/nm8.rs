//! Joint N:M codes with rounded activations: a code is the index of a look-up in 16 bytes, and one
//! instruction looks up 16 rows for each of 4 groups. No weight is ever expanded.
//!
//! Operations for 1:8 per 64 bytes of codes (1024 weights): 2 ANDs, a shift, 2 look-ups, and the
//! two vectors' addition into 16 sums; the other rates need more to put the index together.

use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE};
use stb_format::encoding::{Nm, NmView};
use stb_format::half::f16;

use super::bytes::{Bytes, MAX_DOTS};
use super::int8::{BLOCK, Rounded};

/// Tiles that share the loads of tables.
const TILES: usize = 2;
/// Quads whose codes are taken apart together: as many as a byte has 2-bit fields.
pub(super) const PART: usize = 4;

/// Look-up tables for each quad, a lane for each of its groups: one, or two for 2:4.
#[inline(always)]
pub(super) fn tables<S: Bytes>(s: S, spec: Nm, x: &[i8], tables: &mut Vec<[u8; 64]>) {
    match (spec.n(), spec.m()) {
        (_, 8) => signed::<8>(x, tables),
        (1, _) => signed::<4>(x, tables),
        _ => pairs(s, x, tables),
    }
}

/// Activations of the group, then their negatives, again if there is room.
#[inline(always)]
fn signed<const M: usize>(x: &[i8], tables: &mut Vec<[u8; 64]>) {
    tables.resize(x.len() / (QUAD * M), [0; 64]);
    for (table, quad) in tables.iter_mut().zip(x.chunks_exact(QUAD * M)) {
        for (lane, group) in table.as_chunks_mut::<16>().0.iter_mut().zip(quad.as_chunks::<M>().0) {
            let mut bytes = [0; 8];
            bytes[..M].copy_from_slice(&group.map(i8::cast_unsigned));
            let plus = u64::from_le_bytes(bytes);
            let halves =
                if M == 8 { [plus, negatives(plus)] } else { [plus | negatives(plus) << 32; 2] };
            let (low, high) = lane.split_at_mut(8);
            low.copy_from_slice(&halves[0].to_le_bytes());
            high.copy_from_slice(&halves[1].to_le_bytes());
        }
    }
}

/// Each byte with the other sign: its complement plus one, the carry kept inside the byte.
#[inline(always)]
fn negatives(bytes: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let complement = !bytes;
    ((complement & LOW) + 0x0101_0101_0101_0101) ^ (complement & !LOW)
}

/// 2:4: by the index i + 4j the first and the second term for a plus sign: x_i; and x_j if i < j,
/// −x_j if i > j, nothing if they are equal.
#[inline(always)]
fn pairs<S: Bytes>(s: S, x: &[i8], tables: &mut Vec<[u8; 64]>) {
    /// Which entry of `x0..x3, −x0..−x3` is the term; 128 for none.
    const TERMS: [[u8; 64]; 2] = {
        let mut terms = [[0; 64]; 2];
        let mut at = 0;
        while at < 64 {
            let (i, j) = (at % 4, at / 4 % 4);
            terms[0][at] = i as u8;
            terms[1][at] = if i < j {
                j as u8
            } else if i > j {
                4 + j as u8
            } else {
                128
            };
            at += 1;
        }
        terms
    };
    let quads = x.len() / (QUAD * 4);
    signed::<4>(x, tables);
    tables.resize(2 * quads, [0; 64]);
    // From the end, so that nothing is overwritten before it is read.
    for quad in (0..quads).rev() {
        let signed = s.load_b(&tables[quad]);
        for (k, terms) in TERMS.iter().enumerate() {
            s.store_b(s.lookup_b(signed, s.load_b(terms)), &mut tables[2 * quad + k]);
        }
    }
}

/// See [`super::matvec`].
#[inline(always)]
pub(super) fn matvec<S: Bytes>(s: S, m: &NmView<'_>, x: &Rounded, first: usize, y: &mut [f32]) {
    match (m.spec.n(), m.spec.m()) {
        (1, 4) => all_tiles::<S, 1, 4>(s, m, x, first, y),
        (1, 8) => all_tiles::<S, 1, 8>(s, m, x, first, y),
        (2, 4) => all_tiles::<S, 2, 4>(s, m, x, first, y),
        (2, 8) => all_tiles::<S, 2, 8>(s, m, x, first, y),
        (n, m) => unreachable!("the format has no {n}:{m} codes"),
    }
}

#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize>(
    s: S,
    m: &NmView<'_>,
    x: &Rounded,
    first: usize,
    y: &mut [f32],
) {
    let row_scales = m.row_scales.as_flattened();
    for (i, y) in y.chunks_mut(TILE * TILES).enumerate() {
        let tile = first / TILE + i * TILES;
        let totals = if y.len() > TILE {
            tiles::<S, N, M, TILES>(s, m, x, tile)
        } else {
            let [one] = tiles::<S, N, M, 1>(s, m, x, tile);
            [one, s.splat(0.0)]
        };
        for (t, y) in y.chunks_mut(TILE).enumerate() {
            let mut sums = [0.0; TILE];
            let from = (tile + t) * TILE;
            match row_scales.get(from * 2..).and_then(|b| b.first_chunk()) {
                Some(scales) => s.store(s.mul(totals[t], s.f16_to_f32(scales)), &mut sums),
                None => {
                    s.store(totals[t], &mut sums);
                    for (sum, scale) in sums.iter_mut().zip(&m.row_scales[from..]) {
                        *sum *= f16::from_le_bytes(*scale).to_f32();
                    }
                }
            }
            y.copy_from_slice(&sums[..y.len()]);
        }
    }
}

/// Sums of `T` tiles from `tile`, without the row scales.
#[inline(always)]
fn tiles<S: Bytes, const N: usize, const M: usize, const T: usize>(
    s: S,
    m: &NmView<'_>,
    x: &Rounded,
    tile: usize,
) -> [S::F; T] {
    let mut codes: [&[[u8; 64]]; T] = [&[]; T];
    for (t, codes) in codes.iter_mut().enumerate() {
        *codes = m.tile_codes(tile + t).as_chunks().0;
    }
    let quads = m.groups().div_ceil(QUAD);
    let parts_per_block = BLOCK / (PART * QUAD * M);
    let mut totals = [s.splat(0.0); T];
    let parts = quads.div_ceil(PART);
    for (block, from) in (0..parts).step_by(parts_per_block).enumerate() {
        let mut acc = [s.zero_acc(); T];
        for part in from..parts.min(from + parts_per_block) {
            for t in 0..T {
                acc[t] = add_part::<S, N, M, T>(s, codes[t], quads, part, &x.tables, acc[t]);
            }
        }
        for t in 0..T {
            let scale = scales(s, m, tile + t, block * BLOCK, x.scales[block]);
            totals[t] = s.mul_add(scale, s.to_f32(s.finish(acc[t])), totals[t]);
        }
    }
    totals
}

/// Activation scale × block scales of the rows of a tile for the block of column `col`.
#[inline(always)]
fn scales<S: Bytes>(s: S, m: &NmView<'_>, tile: usize, col: usize, activation: f32) -> S::F {
    if m.blocks() == 0 {
        return s.splat(activation);
    }
    super::nm::multipliers(s, m, tile, col / m.spec.block(), activation)
}

/// The vectors of a plane: those that do not exist are zero, as are the tables of their quads.
pub(super) struct Planes<'a> {
    codes: &'a [[u8; 64]],
    /// How far ahead to fetch, in vectors: the tiles that come next lie behind the present ones.
    ahead: usize,
    /// First vector of the planes of width 4, 2 and 1 of the chunk.
    four: usize,
    two: usize,
    one: usize,
    /// Which half of the chunk.
    half: usize,
}

impl<'a> Planes<'a> {
    #[inline(always)]
    pub(super) fn new(
        codes: &'a [[u8; 64]],
        ahead: usize,
        bits: usize,
        quads: usize,
        part: usize,
    ) -> Self {
        let (chunk, half) = (part / 2, part % 2);
        let n = (quads - chunk * CHUNK_QUADS).min(CHUNK_QUADS);
        let four = chunk * bits;
        let two = four + if bits & 4 != 0 { n.div_ceil(2) } else { 0 };
        let one = two + if bits & 2 != 0 { n.div_ceil(4) } else { 0 };
        Self { codes, ahead, four, two, one, half }
    }

    #[inline(always)]
    fn load<S: Bytes>(&self, s: S, at: usize) -> S::B {
        s.prefetch(self.codes.as_ptr().wrapping_add(at + self.ahead).cast());
        s.load_b(self.codes.get(at).unwrap_or(&[0; 64]))
    }

    /// Low nibbles of quads 0 and 2 of the part, high ones of quads 1 and 3, as indices.
    #[inline(always)]
    fn nibbles<S: Bytes>(&self, s: S) -> [S::B; PART] {
        let a = self.load(s, self.four + 2 * self.half);
        let b = self.load(s, self.four + 2 * self.half + 1);
        let mask = s.splat_b(15);
        [
            s.and_b(a, mask),
            s.and_b(s.shr_b::<4>(a), mask),
            s.and_b(b, mask),
            s.and_b(s.shr_b::<4>(b), mask),
        ]
    }

    /// Four fields of two bits each.
    #[inline(always)]
    fn twos<S: Bytes>(&self, s: S) -> S::B {
        self.load(s, self.two + self.half)
    }

    /// The bits of quads 0 to 3 of the part at bits 0 to 3.
    #[inline(always)]
    fn ones<S: Bytes>(&self, s: S) -> S::B {
        let all = self.load(s, self.one);
        if self.half == 0 { all } else { s.shr_b::<4>(all) }
    }
}

/// Adds the four quads of a part of one of `T` tiles.
#[inline(always)]
fn add_part<S: Bytes, const N: usize, const M: usize, const T: usize>(
    s: S,
    codes: &[[u8; 64]],
    quads: usize,
    part: usize,
    tables: &[[u8; 64]],
    acc: S::Acc,
) -> S::Acc {
    let bits = N * M.trailing_zeros() as usize + 1;
    let planes = Planes::new(codes, T * codes.len(), bits, quads, part);
    let per_quad = if (N, M) == (2, 4) { 2 } else { 1 };
    let tables = &tables[part * PART * per_quad..(part + 1) * PART * per_quad];
    match (N, M) {
        (1, 8) => one_of_8(s, &planes, tables, acc),
        (1, 4) => one_of_4(s, &planes, tables, acc),
        (2, 8) => two_of_8(s, &planes, tables, acc),
        _ => two_of_4(s, &planes, tables, acc),
    }
}

/// For each quad of a part, what its codes expand by: position and, above it, sign; 2:4: both
/// positions, and above them the sign. Not for 2:8, see [`pairs_of_8`].
#[inline(always)]
pub(super) fn first_indices<S: Bytes, const N: usize, const M: usize>(
    s: S,
    planes: &Planes<'_>,
) -> [S::B; PART] {
    let sixteen = s.splat_b(16);
    match (N, M) {
        (1, 4) => positions_of_4(s, planes),
        (2, 4) => {
            let (mut index, sign) = (planes.nibbles(s), planes.ones(s));
            let signs =
                [s.shl_b::<4>(sign), s.shl_b::<3>(sign), s.shl_b::<2>(sign), s.shl_b::<1>(sign)];
            for q in 0..PART {
                index[q] = s.or_b(index[q], s.and_b(signs[q], sixteen));
            }
            index
        }
        _ => planes.nibbles(s),
    }
}

#[inline(always)]
fn one_of_8<S: Bytes>(s: S, planes: &Planes<'_>, tables: &[[u8; 64]], acc: S::Acc) -> S::Acc {
    let index = planes.nibbles(s);
    let mut term = [s.splat_b(0); PART];
    for q in 0..PART {
        term[q] = s.lookup_b(s.load_b(&tables[q]), index[q]);
    }
    s.dot2(s.dot2(acc, term[0], term[1]), term[2], term[3])
}

#[inline(always)]
fn positions_of_4<S: Bytes>(s: S, planes: &Planes<'_>) -> [S::B; PART] {
    let (position, sign) = (planes.twos(s), planes.ones(s));
    // The sign goes to bit 2.
    let positions =
        [position, s.shr_b::<2>(position), s.shr_b::<4>(position), s.shr_b::<6>(position)];
    let signs = [s.shl_b::<2>(sign), s.shl_b::<1>(sign), sign, s.shr_b::<1>(sign)];
    let (three, four) = (s.splat_b(3), s.splat_b(4));
    let mut index = [s.splat_b(0); PART];
    for q in 0..PART {
        index[q] = s.or_b(s.and_b(positions[q], three), s.and_b(signs[q], four));
    }
    index
}

#[inline(always)]
fn one_of_4<S: Bytes>(s: S, planes: &Planes<'_>, tables: &[[u8; 64]], acc: S::Acc) -> S::Acc {
    let index = positions_of_4(s, planes);
    let mut term = [s.splat_b(0); PART];
    for q in 0..PART {
        term[q] = s.lookup_b(s.load_b(&tables[q]), index[q]);
    }
    s.dot2(s.dot2(acc, term[0], term[1]), term[2], term[3])
}

/// What the first and the second weight look up; the top bit is set for a second one that is none.
#[inline(always)]
pub(super) fn pairs_of_8<S: Bytes>(s: S, planes: &Planes<'_>) -> [[S::B; PART]; 2] {
    let low = planes.nibbles(s); // i, and bit 0 of j
    let (high, sign) = (planes.twos(s), planes.ones(s)); // bits 1 and 2 of j; s
    let highs = [s.shl_b::<1>(high), s.shr_b::<1>(high), s.shr_b::<3>(high), s.shr_b::<5>(high)];
    let signs = [s.shl_b::<3>(sign), s.shl_b::<2>(sign), s.shl_b::<1>(sign), sign];
    let (one, six, seven, eight) = (s.splat_b(1), s.splat_b(6), s.splat_b(7), s.splat_b(8));
    // What i − j from 0 to 7 changes of the second index.
    let mut changes = [8; 64];
    for lane in changes.as_chunks_mut::<16>().0 {
        lane[0] = 128;
    }
    let changes = s.load_b(&changes);
    let mut index = [[s.splat_b(0); PART]; 2];
    for q in 0..PART {
        let i = s.and_b(low[q], seven);
        let j = s.or_b(s.and_b(s.shr_b::<3>(low[q]), one), s.and_b(highs[q], six));
        let sign = s.and_b(signs[q], eight);
        index[0][q] = s.or_b(i, sign);
        // The sign of j is the other one if i is above; nothing is at j if they are equal. Negative
        // differences have their top bit set, and so look up zero.
        let change = s.lookup_b(changes, s.sub_b(i, j));
        index[1][q] = s.xor_b(s.or_b(j, sign), change);
    }
    index
}

/// 2:8: the codes themselves, i + 8j + 64s.
#[inline(always)]
pub(super) fn codes_of_8<S: Bytes>(s: S, planes: &Planes<'_>) -> [S::B; PART] {
    let mut codes = planes.nibbles(s);
    let (high, sign) = (planes.twos(s), planes.ones(s));
    let highs = [s.shl_b::<4>(high), s.shl_b::<2>(high), high, s.shr_b::<2>(high)];
    let signs = [s.shl_b::<6>(sign), s.shl_b::<5>(sign), s.shl_b::<4>(sign), s.shl_b::<3>(sign)];
    let (bits_of_j, bit_of_sign) = (s.splat_b(0x30), s.splat_b(0x40));
    for q in 0..PART {
        let upper = s.or_b(s.and_b(highs[q], bits_of_j), s.and_b(signs[q], bit_of_sign));
        codes[q] = s.or_b(codes[q], upper);
    }
    codes
}

#[inline(always)]
fn two_of_8<S: Bytes>(s: S, planes: &Planes<'_>, tables: &[[u8; 64]], acc: S::Acc) -> S::Acc {
    let [first, second] = pairs_of_8(s, planes);
    let mut acc = acc;
    for q in 0..PART {
        let table = s.load_b(&tables[q]);
        acc = s.dot2(acc, s.lookup_b(table, first[q]), s.lookup_b(table, second[q]));
    }
    acc
}

#[inline(always)]
fn two_of_4<S: Bytes>(s: S, planes: &Planes<'_>, tables: &[[u8; 64]], acc: S::Acc) -> S::Acc {
    let index = planes.nibbles(s);
    let sign = planes.ones(s);
    let mut acc = acc;
    for q in 0..PART {
        let bit = s.splat_b(1 << q);
        let negative = s.eq_b(s.and_b(sign, bit), bit);
        let first = s.lookup_b(s.load_b(&tables[2 * q]), index[q]);
        let second = s.lookup_b(s.load_b(&tables[2 * q + 1]), index[q]);
        acc = s.dot2(acc, negate(s, first, negative), negate(s, second, negative));
    }
    acc
}

/// −v where `mask` is all ones, v where it is zero.
#[inline(always)]
fn negate<S: Bytes>(s: S, v: S::B, mask: S::B) -> S::B {
    s.sub_b(s.xor_b(v, mask), mask)
}

// A block of activations is at most 8 quads of M = 4, each one step of `dot2`.
const _: () = assert!(BLOCK / (QUAD * 4) <= MAX_DOTS);
