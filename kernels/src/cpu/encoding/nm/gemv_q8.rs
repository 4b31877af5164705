//! Matrix-vector products of N:M codes with q8 activations. A code is the index of a look-up in 16 bytes,
//! and one instruction looks up 16 rows for each of 4 groups. No weight is expanded.
//!
//! For 1:8, 64 bytes of codes (1024 weights) take 2 ANDs, a shift, 2 look-ups, and the addition of the two
//! vectors to 16 sums. The other rates need more operations to form the indices.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE};
use stb_format::nm_rates;

use super::super::col_factors::multiply_factors;
use super::super::tile_scales::{BlockScales, put_tile, row_scales};
use super::codes::{CodePlanes, PART, chunks, indices, pairs, signed_table};
use crate::cpu::arch::bytes::{Aligned, Bytes, Line, MAX_DOTS, Task};
use crate::cpu::ops::q8::{BLOCK, TokenQ8};

/// Applies the column factors to `values`, quantizes them and arranges them for a matrix.
pub(super) struct NmPrepareQ8<'a> {
    pub matrix: &'a NmView<'a>,
    pub values: &'a mut [f32],
    pub q8: &'a mut TokenQ8,
}

impl Task for NmPrepareQ8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, values, q8 } = self;
        multiply_factors(s, matrix.col_factors, values);
        q8.quantize(s, values);
        nm_rates!(matrix.spec, |N, M, BITS| signed_tables::<M>(&q8.codes, &mut q8.tables));
    }
}

/// Look-up tables for each quad, see [`signed_table`].
#[inline(always)]
fn signed_tables<const M: usize>(x: &[i8], tables: &mut Vec<Line>) {
    tables.resize(x.len() / (QUAD * M), Aligned([0; 64]));
    for (table, quad) in tables.iter_mut().zip(x.chunks_exact(QUAD * M)) {
        signed_table::<M>(quad, table);
    }
}

/// See [`PackedMatrix::gemv_batch`](crate::PackedMatrix::gemv_batch): `rows` results for each token; `y` may
/// have room for fewer than `K` tokens.
pub(super) struct NmGemvQ8<'a, const K: usize> {
    pub matrix: &'a NmView<'a>,
    pub x: [&'a TokenQ8; K],
    pub rows: usize,
    pub first: usize,
    pub y: &'a mut [f32],
}

impl<const K: usize> Task for NmGemvQ8<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix: m, x, rows, first, y } = self;
        nm_rates!(m.spec, |N, M, BITS| all_tiles::<S, N, M, BITS, K>(s, m, x, rows, first, y));
    }
}

/// Chooses how many tiles are computed together: they share the loads of tables, and their sums must fit in
/// registers.
#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize, const K: usize>(
    s: S,
    m: &NmView<'_>,
    x: [&TokenQ8; K],
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
    x: [&TokenQ8; K],
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
                put_tile(s, row_scales(s, &m.scales(), tile + t), totals, done + t * TILE, rows, y);
            }
            done += T * TILE;
        } else {
            let totals = tiles::<S, N, M, BITS, K, 1>(s, m, x, tile);
            let totals: [S::F; K] = std::array::from_fn(
                #[inline(always)]
                |k| totals[k][0],
            );
            put_tile(s, row_scales(s, &m.scales(), tile), totals, done, rows, y);
            done += TILE;
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
    x: [&TokenQ8; K],
    tile: usize,
) -> [[S::F; T]; K] {
    let mut codes: [&[[u8; 64]]; T] = [&[]; T];
    let mut steps = [BlockScales::of(&m.scales(), tile); T];
    for t in 0..T {
        codes[t] = m.tile_codes(tile + t).as_chunks().0;
        steps[t] = BlockScales::of(&m.scales(), tile + t);
        steps[t].prefetch_ahead(s, T);
    }
    // The next tiles follow in memory.
    let ahead = T * codes[0].len() * 64;
    let quads = m.groups().div_ceil(QUAD);
    let together = m.spec.block() / BLOCK;
    let mut scales = BlockCursor { steps, together, index: 0, left: together, block: 0 };
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

/// The position in the blocks of columns, which applies their scales.
struct BlockCursor<'a, const T: usize> {
    steps: [BlockScales<'a>; T],
    /// Blocks of activations per block of weights; 0 if there are no block scales.
    together: usize,
    /// The current block of weights, and how many blocks of activations are left in it.
    index: usize,
    left: usize,
    block: usize,
}

impl<const T: usize> BlockCursor<'_, T> {
    /// Adds the sums of the next block to `totals`.
    #[inline(always)]
    fn add<S: Bytes, const K: usize>(
        &mut self,
        s: S,
        x: [&TokenQ8; K],
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
    x: [&TokenQ8; K],
    acc: &mut [[S::Acc; T]; K],
) {
    let mut tables: [&[Line; PART]; K] = [&[Aligned([0; 64]); PART]; K];
    for (tables, x) in tables.iter_mut().zip(x) {
        *tables = &x.tables.as_chunks().0[part + half];
    }
    for t in 0..T {
        let planes = CodePlanes { chunk: chunks[t], half, arranged: true };
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

// A block of activations is at most 8 quads of M = 4, each one step of `dot2`.
const _: () = assert!(BLOCK / (QUAD * 4) <= MAX_DOTS);
