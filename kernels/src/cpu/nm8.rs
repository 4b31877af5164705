//! Joint N:M codes with rounded activations: a code is the index of a look-up in 16 bytes, and one
//! instruction looks up 16 rows for each of 4 groups. No weight is ever expanded.
//!
//! Operations for 1:8 per 64 bytes of codes (1024 weights): 2 ANDs, a shift, 2 look-ups, and the
//! two vectors' addition into 16 sums; the other rates need more to put the index together.

use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE};
use stb_format::encoding::{Nm, NmView};

use super::bytes::{Aligned, Bytes, Line, MAX_DOTS, NONE};
use super::int8::{BLOCK, Rounded};
use super::nm::{Steps, row_scales};

/// Quads whose codes are taken apart together: as many as a byte has 2-bit fields.
pub(super) const PART: usize = 4;

/// Look-up tables for each quad, a lane for each of its groups.
#[inline(always)]
pub(super) fn tables(spec: Nm, x: &[i8], tables: &mut Vec<Line>) {
    match spec.m() {
        8 => all_signed::<8>(x, tables),
        _ => all_signed::<4>(x, tables),
    }
}

/// Activations of the group, then their negatives, again if there is room.
#[inline(always)]
fn all_signed<const M: usize>(x: &[i8], tables: &mut Vec<Line>) {
    tables.resize(x.len() / (QUAD * M), Aligned([0; 64]));
    for (table, quad) in tables.iter_mut().zip(x.chunks_exact(QUAD * M)) {
        signed::<M>(quad, table);
    }
}

/// [`tables`] of one quad.
#[inline(always)]
pub(super) fn signed<const M: usize>(quad: &[i8], table: &mut [u8; 64]) {
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

/// Each byte with the other sign: its complement plus one, the carry kept inside the byte.
#[inline(always)]
fn negatives(bytes: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let complement = !bytes;
    ((complement & LOW) + 0x0101_0101_0101_0101) ^ (complement & !LOW)
}

/// See [`super::gemv`]; for `K` tokens, of which `y` may have room for less: `rows` for each.
#[inline(always)]
pub(super) fn gemv<S: Bytes, const K: usize>(
    s: S,
    m: &NmView<'_>,
    x: [&Rounded; K],
    rows: usize,
    first: usize,
    y: &mut [f32],
) {
    match (m.spec.n(), m.spec.m()) {
        (1, 4) => all_tiles::<S, 1, 4, 3, K>(s, m, x, rows, first, y),
        (1, 8) => all_tiles::<S, 1, 8, 4, K>(s, m, x, rows, first, y),
        (2, 4) => all_tiles::<S, 2, 4, 5, K>(s, m, x, rows, first, y),
        (2, 8) => all_tiles::<S, 2, 8, 7, K>(s, m, x, rows, first, y),
        (n, m) => unreachable!("the format has no {n}:{m} codes"),
    }
}

/// As many tiles together as share the loads of tables and still have their sums in registers.
#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize, const K: usize>(
    s: S,
    m: &NmView<'_>,
    x: [&Rounded; K],
    rows: usize,
    first: usize,
    y: &mut [f32],
) {
    if S::WIDE || K == 1 {
        by_tiles::<S, N, M, BITS, K, 2>(s, m, x, rows, first, y);
    } else {
        by_tiles::<S, N, M, BITS, K, 1>(s, m, x, rows, first, y);
    }
}

#[inline(always)]
fn by_tiles<
    S: Bytes,
    const N: usize,
    const M: usize,
    const BITS: usize,
    const K: usize,
    const T: usize,
>(
    s: S,
    m: &NmView<'_>,
    x: [&Rounded; K],
    rows: usize,
    first: usize,
    y: &mut [f32],
) {
    let mut done = 0;
    while done < rows {
        let tile = (first + done) / TILE;
        if rows - done > (T - 1) * TILE {
            let totals = tiles::<S, N, M, BITS, K, T>(s, m, x, tile);
            for t in 0..T {
                let totals: [S::F; K] = std::array::from_fn(
                    #[inline(always)]
                    |k| totals[k][t],
                );
                put(s, m, tile + t, totals, done + t * TILE, rows, y);
            }
            done += T * TILE;
        } else {
            let totals = tiles::<S, N, M, BITS, K, 1>(s, m, x, tile);
            let totals: [S::F; K] = std::array::from_fn(
                #[inline(always)]
                |k| totals[k][0],
            );
            put(s, m, tile, totals, done, rows, y);
            done += TILE;
        }
    }
}

/// Writes the rows of a tile from `at` of the `rows` in `y`, multiplied by their scales.
#[inline(always)]
fn put<S: Bytes, const K: usize>(
    s: S,
    m: &NmView<'_>,
    tile: usize,
    totals: [S::F; K],
    at: usize,
    rows: usize,
    y: &mut [f32],
) {
    let scales = row_scales(s, m, tile);
    for (total, y) in totals.into_iter().zip(y.chunks_exact_mut(rows)) {
        let y = &mut y[at..];
        let sums = s.mul(total, scales);
        match y.first_chunk_mut() {
            Some(y) => s.store(sums, y),
            None => {
                let mut line = [0.0; TILE];
                s.store(sums, &mut line);
                y.copy_from_slice(&line[..y.len()]);
            }
        }
    }
}

/// Sums of `T` tiles from `tile` for each token, without the row scales.
#[inline(always)]
fn tiles<
    S: Bytes,
    const N: usize,
    const M: usize,
    const BITS: usize,
    const K: usize,
    const T: usize,
>(
    s: S,
    m: &NmView<'_>,
    x: [&Rounded; K],
    tile: usize,
) -> [[S::F; T]; K] {
    let mut codes: [&[[u8; 64]]; T] = [&[]; T];
    let mut steps = [Steps::of(m, tile); T];
    for t in 0..T {
        codes[t] = m.tile_codes(tile + t).as_chunks().0;
        steps[t] = Steps::of(m, tile + t);
        steps[t].prefetch_behind(s, T);
    }
    // The tiles that come next lie behind the present ones.
    let ahead = T * codes[0].len() * 64;
    let quads = m.groups().div_ceil(QUAD);
    let together = m.spec.block() / BLOCK;
    let mut scales = Scales { steps, together, index: 0, left: together, block: 0 };
    let mut whole: [&[[[u8; 64]; BITS]]; T] = [&[]; T];
    let mut last = [[[0; 64]; BITS]; T];
    for t in 0..T {
        (whole[t], last[t]) = chunks(codes[t], quads);
    }
    let mut totals = [[s.splat(0.0); T]; K];
    for chunk in 0..quads.div_ceil(CHUNK_QUADS) {
        let mut chunks = [&[[0; 64]; BITS]; T];
        for t in 0..T {
            chunks[t] = whole[t].get(chunk).unwrap_or(&last[t]);
            for v in 0..BITS {
                s.prefetch(chunks[t].as_ptr().wrapping_add(v).cast::<u8>().wrapping_add(ahead));
            }
        }
        let mut acc = [[s.zero_acc(); T]; K];
        add_part::<S, N, M, BITS, K, T>(s, chunks, 2 * chunk, 0, x, &mut acc);
        if M == 8 {
            // A block of activations is half of a chunk.
            scales.add(s, x, acc, &mut totals);
            if scales.block == x[0].scales.len() {
                break;
            }
            acc = [[s.zero_acc(); T]; K];
        }
        add_part::<S, N, M, BITS, K, T>(s, chunks, 2 * chunk, 1, x, &mut acc);
        scales.add(s, x, acc, &mut totals);
    }
    totals
}

/// The scales of blocks of columns, one after the other.
struct Scales<'a, const T: usize> {
    steps: [Steps<'a>; T],
    /// Blocks of activations that share scales of rows; 0 if all scales of rows are 1.
    together: usize,
    /// Which scales of rows, and for how many more blocks.
    index: usize,
    left: usize,
    block: usize,
}

impl<const T: usize> Scales<'_, T> {
    /// Adds the sums of the next block to `totals`.
    #[inline(always)]
    fn add<S: Bytes, const K: usize>(
        &mut self,
        s: S,
        x: [&Rounded; K],
        acc: [[S::Acc; T]; K],
        totals: &mut [[S::F; T]; K],
    ) {
        for t in 0..T {
            if self.together == 0 {
                for k in 0..K {
                    let scale = s.splat(x[k].scales[self.block]);
                    totals[k][t] = s.mul_add(scale, s.to_f32(s.finish(acc[k][t])), totals[k][t]);
                }
                continue;
            }
            let steps = self.steps[t].at(s, self.index);
            for k in 0..K {
                let scale = s.mul(steps, s.splat(x[k].scales[self.block] * self.steps[t].size));
                totals[k][t] = s.mul_add(scale, s.to_f32(s.finish(acc[k][t])), totals[k][t]);
            }
        }
        self.block += 1;
        self.left = self.left.wrapping_sub(1);
        if self.left == 0 {
            (self.index, self.left) = (self.index + 1, self.together);
        }
    }
}

/// The chunks of a tile that have all their quads, and the one that has not, with zeros for those that
/// do not exist.
#[inline(always)]
pub(super) fn chunks<const BITS: usize>(
    codes: &[[u8; 64]],
    quads: usize,
) -> (&[[[u8; 64]; BITS]], [[u8; 64]; BITS]) {
    let whole = codes.as_chunks().0;
    let whole = &whole[..whole.len().min(quads / CHUNK_QUADS)];
    let mut last = [[0; 64]; BITS];
    if !quads.is_multiple_of(CHUNK_QUADS) {
        copy_planes(&codes[whole.len() * BITS..], quads % CHUNK_QUADS, &mut last);
    }
    (whole, last)
}

/// The planes of `count` quads, less than a chunk, to where they are in a whole one.
#[cold]
#[inline(never)]
fn copy_planes(from: &[[u8; 64]], count: usize, to: &mut [[u8; 64]]) {
    let bits = to.len();
    let (mut from, mut to) = (from, to);
    for width in [4, 2, 1] {
        if bits & width != 0 {
            let (plane, rest) = to.split_at_mut(width);
            let (stored, later) = from.split_at((count * width).div_ceil(8).min(from.len()));
            plane[..stored.len()].copy_from_slice(stored);
            (from, to) = (later, rest);
        }
    }
}

/// Half of a chunk: [`PART`] quads.
#[derive(Clone, Copy)]
pub(super) struct Planes<'a, const BITS: usize> {
    pub chunk: &'a [[u8; 64]; BITS],
    /// Which one: 0 or 1.
    pub half: usize,
    /// Whether bytes are moved to where sums take them ([`Bytes::arrange`]), or as stored.
    pub arranged: bool,
}

impl<const BITS: usize> Planes<'_, BITS> {
    /// First vector of the planes of width 2 and 1; that of width 4 is the first of all.
    const TWO: usize = BITS & 4;
    const ONE: usize = BITS & 6;

    #[inline(always)]
    fn load<S: Bytes>(&self, s: S, at: usize) -> S::B {
        let stored = s.load_b(&self.chunk[at]);
        if self.arranged { s.arrange(stored) } else { stored }
    }

    /// Low nibbles of quads 0 and 2 of the part, high ones of quads 1 and 3, as indices.
    #[inline(always)]
    fn nibbles<S: Bytes>(&self, s: S) -> [S::B; PART] {
        let a = self.load(s, 2 * self.half);
        let b = self.load(s, 2 * self.half + 1);
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
        self.load(s, Self::TWO + self.half)
    }

    /// The bits of quads 0 to 3 of the part at bits 0 to 3.
    #[inline(always)]
    fn ones<S: Bytes>(&self, s: S) -> S::B {
        let all = self.load(s, Self::ONE);
        if self.half == 0 { all } else { s.shr_b::<4>(all) }
    }
}

/// Adds the four quads of a part of `T` tiles for each token.
#[inline(always)]
fn add_part<
    S: Bytes,
    const N: usize,
    const M: usize,
    const BITS: usize,
    const K: usize,
    const T: usize,
>(
    s: S,
    chunks: [&[[u8; 64]; BITS]; T],
    part: usize,
    half: usize,
    x: [&Rounded; K],
    acc: &mut [[S::Acc; T]; K],
) {
    let mut tables: [&[Line; PART]; K] = [&[Aligned([0; 64]); PART]; K];
    for (tables, x) in tables.iter_mut().zip(x) {
        *tables = &x.tables.as_chunks().0[part + half];
    }
    for t in 0..T {
        let planes = Planes { chunk: chunks[t], half, arranged: true };
        if N == 1 {
            let index = indices::<S, N, M, BITS>(s, planes);
            for q in [0, 2] {
                for k in 0..K {
                    let a = s.lookup_arranged(s.load_b(&tables[k][q]), index[q]);
                    let b = s.lookup_arranged(s.load_b(&tables[k][q + 1]), index[q + 1]);
                    acc[k][t] = s.dot2(acc[k][t], a, b);
                }
            }
        } else {
            let [first, second] = pairs::<S, M, BITS>(s, planes);
            for q in 0..PART {
                for k in 0..K {
                    let table = s.load_b(&tables[k][q]);
                    let a = s.lookup_arranged(table, first[q]);
                    let b = s.lookup_arranged_or_zero(table, second[q]);
                    acc[k][t] = s.dot2(acc[k][t], a, b);
                }
            }
        }
    }
}

/// For each quad of a part, its codes: position and, above it, sign; 2:4: both positions, and above
/// them the sign. Not for 2:8, see [`codes_of_8`].
#[inline(always)]
pub(super) fn indices<S: Bytes, const N: usize, const M: usize, const BITS: usize>(
    s: S,
    planes: Planes<'_, BITS>,
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
fn positions_of_4<S: Bytes, const BITS: usize>(s: S, planes: Planes<'_, BITS>) -> [S::B; PART] {
    let position = planes.twos(s);
    let positions =
        [position, s.shr_b::<2>(position), s.shr_b::<4>(position), s.shr_b::<6>(position)];
    let signs = signs_at_2(s, planes);
    let three = s.splat_b(3);
    let mut index = [s.splat_b(0); PART];
    for q in 0..PART {
        index[q] = s.or_b(s.and_b(positions[q], three), signs[q]);
    }
    index
}

/// The bits of `ones` at bit 2.
#[inline(always)]
fn signs_at_2<S: Bytes, const BITS: usize>(s: S, planes: Planes<'_, BITS>) -> [S::B; PART] {
    let (sign, four) = (planes.ones(s), s.splat_b(4));
    [
        s.and_b(s.shl_b::<2>(sign), four),
        s.and_b(s.shl_b::<1>(sign), four),
        s.and_b(sign, four),
        s.and_b(s.shr_b::<1>(sign), four),
    ]
}

/// 2:`M`: what the first and the second weight look up; the bits of [`NONE`] are set where there is no
/// second one.
#[inline(always)]
pub(super) fn pairs<S: Bytes, const M: usize, const BITS: usize>(
    s: S,
    planes: Planes<'_, BITS>,
) -> [[S::B; PART]; 2] {
    if M == 8 { pairs_of_8(s, planes) } else { pairs_of_4(s, planes) }
}

#[inline(always)]
fn pairs_of_4<S: Bytes, const BITS: usize>(s: S, planes: Planes<'_, BITS>) -> [[S::B; PART]; 2] {
    /// For a plus sign, by i + 4j: j if i < j, with the other sign if i > j, nothing if they are equal.
    const SECOND: [u8; 16] = [NONE, 4, 4, 4, 1, NONE, 5, 5, 2, 2, NONE, 6, 3, 3, 3, NONE];
    let (both, signs) = (planes.nibbles(s), signs_at_2(s, planes));
    let three = s.splat_b(3);
    let mut lanes = [0; 64];
    for lane in lanes.as_chunks_mut().0 {
        *lane = SECOND;
    }
    let second = s.load_b(&lanes);
    let mut index = [[s.splat_b(0); PART]; 2];
    for q in 0..PART {
        index[0][q] = s.or_b(s.and_b(both[q], three), signs[q]);
        index[1][q] = s.xor_b(s.lookup_b(second, both[q]), signs[q]);
    }
    index
}

#[inline(always)]
fn pairs_of_8<S: Bytes, const BITS: usize>(s: S, planes: Planes<'_, BITS>) -> [[S::B; PART]; 2] {
    let low = planes.nibbles(s); // i, and bit 0 of j
    let (high, sign) = (planes.twos(s), planes.ones(s)); // bits 1 and 2 of j; s
    let highs = [s.shl_b::<1>(high), s.shr_b::<1>(high), s.shr_b::<3>(high), s.shr_b::<5>(high)];
    let signs = [s.shl_b::<3>(sign), s.shl_b::<2>(sign), s.shl_b::<1>(sign), sign];
    let (one, six, seven, eight) = (s.splat_b(1), s.splat_b(6), s.splat_b(7), s.splat_b(8));
    // What i − j from 0 to 7 changes of the second index.
    let mut changes = [8; 64];
    for lane in changes.as_chunks_mut::<16>().0 {
        lane[0] = NONE;
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
pub(super) fn codes_of_8<S: Bytes, const BITS: usize>(
    s: S,
    planes: Planes<'_, BITS>,
) -> [S::B; PART] {
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

// A block of activations is at most 8 quads of M = 4, each one step of `dot2`.
const _: () = assert!(BLOCK / (QUAD * 4) <= MAX_DOTS);
