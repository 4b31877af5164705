//! Matrix-vector products of the STBLLM structure with q8 activations, 16 rows at a time.
//!
//! A weight is one of five magnitudes with a sign, so a product is five sums of signed activations, each times
//! its magnitude: one sum over the columns of each region, and two over salient columns, by the sign of the
//! weight and by the sign of the residual. Sums over four columns are looked up: four bits of a plane are the
//! index, and the table is the same for all rows.
//!
//! 128 columns of 16 rows take a deposit of signs for each row and word; nine transpositions of words to bytes
//! of rows; and for each of the three regions, positive and negative, 8 look-ups of 64 bytes in each of two
//! tables and the additions of their results as bytes. The two sums of salient columns take the same, but only
//! in blocks with salient columns, which are the same for all rows.
//!
//! No sum overflows: a sum over four activations is within ±508 and is stored as 32·h + l, with h from −16 to
//! 15 and l from 0 to 31. In a block a byte adds eight of them: −128 to 120, and 0 to 248.

use stb_format::encoding::StbllmView;
use stb_format::encoding::stbllm::{SCALES, UNIT};

use super::super::row_major::bytes;
use crate::cpu::arch::bytes::{Aligned, Bytes, Line, Task};
use crate::cpu::ops::q8::{BLOCK, TokenQ8};
use crate::cpu::products::ROW_TILE;

/// Units of a block of activations.
const UNITS: usize = BLOCK / UNIT;
/// Vectors of a plane in a block: bytes 0 to 3 of the rows' words, a lane for each, then bytes 4 to 7.
const VECTORS: usize = 2 * UNITS;
/// Tables of a block: for each vector, for its low and its high nibbles, h and l.
const TABLES: usize = 4 * VECTORS;

/// Quantizes `values` and arranges them.
pub(super) struct StbllmPrepareQ8<'a> {
    pub values: &'a [f32],
    pub q8: &'a mut TokenQ8,
}

impl Task for StbllmPrepareQ8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { values, q8 } = self;
        q8.quantize(s, values);
        arrange(&q8.codes, &mut q8.tables);
    }
}

/// The tables of each block: a lane has the 16 sums over four columns.
fn arrange(x: &[i8], tables: &mut Vec<Line>) {
    tables.clear();
    for bytes in x.chunks_exact(UNIT / 2) {
        for half in [0, 4] {
            let (mut high, mut low) = ([0; 64], [0; 64]);
            for (lane, eight) in bytes.chunks_exact(8).enumerate() {
                let mut sums = [0i16; 16];
                for subset in 1..16usize {
                    let column = half + subset.trailing_zeros() as usize;
                    sums[subset] = sums[subset & (subset - 1)] + i16::from(eight[column]);
                    high[16 * lane + subset] = (sums[subset] >> 5) as u8;
                    low[16 * lane + subset] = (sums[subset] & 31) as u8;
                }
            }
            tables.extend([Aligned(high), Aligned(low)]);
        }
    }
}

/// See [`PackedMatrix::gemv`](crate::PackedMatrix::gemv).
pub(super) struct StbllmGemvQ8<'a> {
    pub matrix: &'a StbllmView<'a>,
    pub x: &'a TokenQ8,
    pub first: usize,
    pub y: &'a mut [f32],
}

impl Task for StbllmGemvQ8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        gemv(s, self.matrix, self.x, self.first, self.y);
    }
}

#[inline(always)]
fn gemv<S: Bytes>(s: S, m: &StbllmView<'_>, x: &TokenQ8, first: usize, y: &mut [f32]) {
    let mut read = TilePlanes::<S> {
        words: [[0; ROW_TILE]; 3],
        planes: [[[s.splat_b(0); 2]; VECTORS]; SCALES],
        scales: [[0; 2 * ROW_TILE]; SCALES],
    };
    for (i, y) in y.chunks_mut(ROW_TILE).enumerate() {
        let tile = RowTile { m, row: first + i * ROW_TILE, rows: y.len() };
        let mut totals = s.splat(0.0);
        for (block, tables) in x.tables.as_chunks().0.iter().enumerate() {
            totals = tile.add_block(s, block, tables, x.scales[block], &mut read, totals);
        }
        let mut sums = [0.0; ROW_TILE];
        s.store(totals, &mut sums);
        y.copy_from_slice(&sums[..y.len()]);
    }
}

/// Some rows of a matrix.
struct RowTile<'a> {
    m: &'a StbllmView<'a>,
    row: usize,
    /// The number of rows, at most 16.
    rows: usize,
}

/// A block of 16 rows, decoded. Rows and units past the end of the matrix keep earlier content: results of such
/// rows are not used, and the tables of such columns are zero.
struct TilePlanes<S: Bytes> {
    /// Low and high bits of states and negative signs, of one unit.
    words: [[u64; ROW_TILE]; 3],
    /// For each kind (dense, intermediate, sparse; salient by the sign of the weight, and by that of the
    /// residual), which weights are positive and which negative: a lane has eight columns, a byte of it a row.
    planes: [[[S::B; 2]; VECTORS]; SCALES],
    /// Scales of each kind, binary16.
    scales: [[u8; 2 * ROW_TILE]; SCALES],
}

impl RowTile<'_> {
    /// Reads the planes of a block; returns the number of kinds, which is three if no column is salient.
    #[inline(always)]
    fn read_planes<S: Bytes>(&self, s: S, block: usize, to: &mut TilePlanes<S>) -> usize {
        let m = self.m;
        let (units, n) = (m.units(), m.spec.n());
        let signs_of_unit = u64::MAX >> (64 - 8 * n);
        let TilePlanes { words, planes, .. } = to;
        let mut count = 3;
        for unit in 0..UNITS.min(units - block * UNITS) {
            let mut at = self.row * units + block * UNITS + unit;
            let salient = m.salient_word(block * UNITS + unit);
            for r in 0..self.rows {
                let [low, high] = m.states[at].map(u64::from_le_bytes);
                // A single load, except at the end of the signs.
                let signs = u64::from_le_bytes(*bytes(m.signs, at * n, &mut [0; 8]));
                (words[0][r], words[1][r]) = (low, high);
                words[2][r] = s.deposit(signs & signs_of_unit, low | high);
                at += units;
            }
            if salient != 0 {
                count = SCALES;
            }
            let (low, high) = (s.transpose(&words[0]), s.transpose(&words[1]));
            let negative = s.transpose(&words[2]);
            let salient = s.transpose(&[salient; ROW_TILE]);
            for q in 0..2 {
                let (low, high, negative) = (low[q], high[q], negative[q]);
                let either = s.xor_b(low, high);
                let single = s.and_b(either, salient[q]);
                let one = s.xor_b(either, single);
                let both = s.and_b(low, high);
                let dense = s.and_b(one, low);
                let kinds = [
                    (dense, negative),
                    (s.xor_b(one, dense), negative),
                    (s.xor_b(both, s.and_b(both, salient[q])), negative),
                    (single, negative),
                    // The states of salient columns, 1 and 2, are the signs of the residual.
                    (single, high),
                ];
                for (planes, (kept, negative)) in planes.iter_mut().zip(kinds) {
                    let negative = s.and_b(kept, negative);
                    planes[2 * unit + q] = [s.xor_b(kept, negative), negative];
                }
            }
        }
        count
    }

    /// `totals` plus the products with a block of activations.
    #[inline(always)]
    fn add_block<S: Bytes>(
        &self,
        s: S,
        block: usize,
        tables: &[Line; TABLES],
        activation: f32,
        read: &mut TilePlanes<S>,
        totals: S::F,
    ) -> S::F {
        self.prefetch(s, block);
        let count = self.read_planes(s, block, read);
        self.read_scales(s, block * BLOCK / self.m.spec.block(), read);
        let mut totals = totals;
        for (planes, scales) in read.planes[..count].iter().zip(&read.scales) {
            let scales = s.mul(s.f16_to_f32(scales), s.splat(activation));
            totals = s.mul_add(s.to_f32(sums(s, planes, tables)), scales, totals);
        }
        totals
    }

    /// Reads the scales of a block of weights.
    #[inline(always)]
    fn read_scales<S: Bytes>(&self, s: S, block: usize, to: &mut TilePlanes<S>) {
        let stored = self.m.scales.as_flattened();
        let TilePlanes { words: [fours, ..], scales, .. } = to;
        for r in 0..self.rows {
            let at = ((self.row + r) * self.m.blocks() + block) * SCALES * 2;
            let mut spare = [0; 16];
            let (four, last) = bytes(stored, at, &mut spare).split_at(8);
            fours[r] = u64::from_le_bytes(*four.first_chunk().expect("half of 16"));
            scales[4][2 * r..2 * r + 2].copy_from_slice(&last[..2]);
        }
        let mut by_bytes = [[0; 64]; 2];
        for (to, v) in by_bytes.iter_mut().zip(s.transpose(fours)) {
            s.store_b(v, to);
        }
        let lines = by_bytes.as_flattened().as_chunks::<ROW_TILE>().0.as_chunks::<2>().0;
        for (scales, [low, high]) in scales.iter_mut().zip(lines) {
            for r in 0..ROW_TILE {
                (scales[2 * r], scales[2 * r + 1]) = (low[r], high[r]);
            }
        }
    }

    /// Prefetches what the next tile reads for this block. Tiles go across rows, so the CPU's own prefetching
    /// does not recognize the order.
    #[inline(always)]
    fn prefetch<S: Bytes>(&self, s: S, block: usize) {
        let m = self.m;
        for row in self.row + ROW_TILE..self.row + ROW_TILE + self.rows {
            let unit = row * m.units() + block * UNITS;
            // The states of a block take half a cache line; its signs and scales take less.
            if block.is_multiple_of(2) {
                s.prefetch(m.states.as_ptr().wrapping_add(unit).cast());
            }
            if block.is_multiple_of(4) {
                s.prefetch(m.signs.as_ptr().wrapping_add(unit * m.spec.n()));
                let scale = (row * m.blocks() + block * BLOCK / m.spec.block()) * SCALES;
                s.prefetch(m.scales.as_ptr().wrapping_add(scale).cast());
            }
        }
    }
}

/// The sum of the signed activations of a kind, for each row.
#[inline(always)]
fn sums<S: Bytes>(s: S, planes: &[[S::B; 2]; VECTORS], tables: &[Line; TABLES]) -> S::I {
    // [positive, negative] × [h, l].
    let mut sums = [[s.splat_b(0); 2]; 2];
    for (planes, tables) in planes.iter().zip(tables.as_chunks::<4>().0) {
        for (half, tables) in tables.as_chunks::<2>().0.iter().enumerate() {
            let tables = [s.load_b(&tables[0]), s.load_b(&tables[1])];
            for (sums, plane) in sums.iter_mut().zip(planes) {
                let bits = if half == 0 { *plane } else { s.shr_b::<4>(*plane) };
                let index = s.and_b(bits, s.splat_b(15));
                for (sum, table) in sums.iter_mut().zip(tables) {
                    *sum = s.add_b(*sum, s.lookup_b(table, index));
                }
            }
        }
    }
    let [[high, low], [high_negative, low_negative]] = sums;
    // −1 − v = !v. Bytes from 0 to 255 minus 128 are signed bytes.
    let high_negative = s.xor_b(high_negative, s.splat_b(255));
    let (low, low_negative) = (s.xor_b(low, s.splat_b(128)), s.xor_b(low_negative, s.splat_b(127)));
    let high = s.finish(s.dot2(s.zero_acc(), s.arrange(high), s.arrange(high_negative)));
    let low = s.finish(s.dot2(s.zero_acc(), s.arrange(low), s.arrange(low_negative)));
    // Both sums are too low by 1 in each of the four lanes.
    s.add_i(s.add_i(s.shl(high, 5), low), s.splat_i(4 * 32 + 4))
}
