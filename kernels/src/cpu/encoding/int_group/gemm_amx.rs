//! Products of integers with many q8 tokens by AMX. Codes are expanded to bytes, row by row, for all tokens of a task;
//! the unit for tiles then multiplies 32 rows with 16 or 32 tokens, whose activations have been arranged for it. Vectors
//! of results are those of one row with 16 tokens. A result takes one addition per group of columns, in the order that
//! [`super::gemm_lanes`] describes.
//!
//! A tile multiplies 64 columns. Of groups of 32 columns, it multiplies one and as many zeros: that takes less time than
//! tiles of another shape, which would have to be configured.

use std::ops::Range;

use stb_format::encoding::IntGroupView;

use super::super::gemm_task::{GemmQ8Task, TileLanes, store_tile};
use super::super::row_major::bytes;
use super::gemm_lanes::{DEPTH, TILES, UNITS, room};
use super::gemv_q8::planes_to_end;
use crate::cpu::arch::bytes::{Aligned, Bytes, TileLines, TileSums, TileTask, TileUnit};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};
use crate::cpu::products::ROW_TILE;

/// Pieces of columns that are expanded at a time: halves of blocks, or units of 32 columns.
const PIECES: usize = DEPTH * UNITS;
/// Vectors of the results of a tile: one for each row and half of the tokens.
const VECTORS: usize = TOKENS / 16 * ROW_TILE;

/// Scratch of a task.
pub(super) struct AmxScratch {
    /// [tile][piece]: bytes of each row.
    rows: Aligned<[[TileLines; PIECES]; TILES]>,
    /// [tile][row][group of columns].
    scales: [[TileLanes; ROW_TILE]; TILES],
    /// Of two groups: the sums before they are scaled.
    products: [Aligned<TileSums>; 2],
}

impl AmxScratch {
    pub(super) const EMPTY: Self = Self {
        rows: Aligned([[[[0; 64]; 16]; PIECES]; TILES]),
        scales: [[TileLanes([0.0; 16]); ROW_TILE]; TILES],
        products: [Aligned([[[[0; 16]; 16]; 2]; 2]); 2],
    };
}

/// See [`PackedGemmQ8::multiply`](crate::PackedGemmQ8::multiply).
pub(super) struct IntAmxGemm<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, IntGroupView<'a>>,
    pub scratch: &'a mut AmxScratch,
}

impl TileTask for IntAmxGemm<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) {
        match self.task.matrix.spec.group() {
            32 => self.all_tiles::<S, 4>(s, unit),
            64 => self.all_tiles::<S, 2>(s, unit),
            _ => self.all_tiles::<S, 1>(s, unit),
        }
    }
}

impl IntAmxGemm<'_, '_> {
    /// A block of columns has `P` groups. Sums are [32 tokens][tile][place][half of the tokens][row].
    #[inline(always)]
    fn all_tiles<S: Bytes, const P: usize>(self, s: S, unit: &impl TileUnit) {
        let Self { task, scratch } = self;
        let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
        let part_sums = TILES * DEPTH * P * VECTORS;
        for from_tile in (0..tiles).step_by(TILES) {
            let first = first + from_tile * ROW_TILE;
            let lanes = room(lanes, y.len().div_ceil(TOKENS) * part_sums, x.blocks() >= DEPTH);
            for from in (0..x.blocks()).step_by(DEPTH) {
                let blocks = from..x.blocks().min(from + DEPTH);
                scratch.expand::<S, P>(s, m, first, blocks.clone());
                for (i, sums) in lanes.chunks_exact_mut(part_sums).enumerate() {
                    let part = TokenPart::<P> { x, token: group * x.group + i * TOKENS };
                    if y.len() - i * TOKENS > 16 {
                        part.add::<S, 2>(s, unit, blocks.clone(), scratch, sums);
                    } else {
                        part.add::<S, 1>(s, unit, blocks.clone(), scratch, sums);
                    }
                }
            }
            let parts = y.chunks_mut(TOKENS).zip(lanes.chunks_exact(part_sums));
            for (y, sums) in parts {
                for (t, sums) in sums.chunks_exact(part_sums / TILES).enumerate() {
                    if from_tile + t < tiles {
                        write_sums::<S, P>(s, sums, from_tile + t, y);
                    }
                }
            }
        }
    }
}

impl AmxScratch {
    /// Expands some blocks of the rows of two tiles, from row `first`. Rows past the last are left as they are.
    #[inline(always)]
    fn expand<S: Bytes, const P: usize>(
        &mut self,
        s: S,
        m: &IntGroupView<'_>,
        first: usize,
        blocks: Range<usize>,
    ) {
        match m.spec.bits() {
            1 => self.expand_codes::<S, P, 1, 1>(s, m, first, blocks),
            2 => self.expand_codes::<S, P, 2, 2>(s, m, first, blocks),
            3 => self.expand_codes::<S, P, 3, 2>(s, m, first, blocks),
            4 => self.expand_codes::<S, P, 4, 4>(s, m, first, blocks),
            _ => self.expand_codes::<S, P, 8, 8>(s, m, first, blocks),
        }
    }

    /// For codes of `BITS` bits, whose first plane has `WIDTH` bits.
    #[inline(always)]
    fn expand_codes<S: Bytes, const P: usize, const BITS: usize, const WIDTH: usize>(
        &mut self,
        s: S,
        m: &IntGroupView<'_>,
        first: usize,
        blocks: Range<usize>,
    ) {
        let groups = m.groups();
        let line = blocks.start / DEPTH;
        // Behind the scales of a row are those of the next.
        let left = s.splat_i((groups - blocks.start * P) as u32);
        let stored = s.gt_i(left, s.load_i(&std::array::from_fn(|lane| lane as i32)));
        // The same row of the next two tiles.
        let ahead = TILES * ROW_TILE * m.row_codes(0).len();
        for (i, row) in (first..m.rows.min(first + TILES * ROW_TILE)).enumerate() {
            let (tile, r) = (i / ROW_TILE, i % ROW_TILE);
            let [low, high] = planes_to_end(m, row);
            let mut spare = [0; 32];
            let at = 2 * (row * groups + blocks.start * P);
            let scales = s.f16_to_f32(bytes(m.scales.as_flattened(), at, &mut spare));
            let scales = s.and(s.cast_i(scales), stored);
            s.store(s.cast_f(scales), &mut self.scales[tile][r].0);
            let to = &mut self.rows.0[tile];
            let mut third = s.splat(0.0);
            if BITS == 3 {
                let mut spare = [0; 64];
                third = s.load_bytes(bytes(high, LINE_COLS / 8 * line, &mut spare));
            }
            let halves = 2 * blocks.len();
            let line_halves = 8 / WIDTH;
            let (whole, _) = low.get(WIDTH * 64 * line..).unwrap_or_default().as_chunks::<64>();
            for v in 0..halves.div_ceil(line_halves) {
                let mut spare = [0; 64];
                let words = match whole.get(v) {
                    Some(codes) => codes,
                    None => bytes(low, 64 * (WIDTH * line + v), &mut spare),
                };
                s.prefetch(words.as_ptr().wrapping_add(ahead));
                let words = s.load_bytes(words);
                for half in v * line_halves..halves.min((v + 1) * line_halves) {
                    let mut codes = fields::<S, WIDTH>(s, words, half % line_halves);
                    if BITS == 3 {
                        codes = s.or(codes, s.shl(fields::<S, 1>(s, third, half), 2));
                    }
                    // Odd codes are 2q + low for the stored number q.
                    if BITS < 4 {
                        codes = s.shl(codes, 1);
                    }
                    if P == UNITS {
                        let [even, odd] = [s.load_i(&FIRST_UNIT), s.load_i(&SECOND_UNIT)];
                        s.store_words(s.and(codes, even), &mut to[2 * half][r]);
                        s.store_words(s.and(codes, odd), &mut to[2 * half + 1][r]);
                    } else {
                        s.store_words(codes, &mut to[half][r]);
                    }
                }
            }
        }
    }
}

/// Columns of a plane of 1 bit in 64 bytes; also those that are expanded at a time.
const LINE_COLS: usize = 512;
const FIRST_UNIT: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
const SECOND_UNIT: [i32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1];

/// The bytes of 64 columns, the `half`-th in 64 bytes of a plane of `WIDTH` bits. Byte k of a unit holds the fields of
/// columns k, k + n, k + 2n, …, n being the bytes of a unit.
#[inline(always)]
fn fields<S: Bytes, const WIDTH: usize>(s: S, words: S::F, half: usize) -> S::I {
    if WIDTH == 8 {
        return s.cast_i(words);
    }
    let log = WIDTH.ilog2() as usize;
    let words = s.cast_i(s.lookup(words, s.load_i(&WORDS[log][half])));
    let mask = u32::from_ne_bytes([(1 << WIDTH) - 1; 4]);
    s.and(s.shr_each(words, s.load_i(&SHIFTS[log])), s.splat_i(mask))
}

/// By the logarithm of the width of a plane, by half, for each four of 64 columns: the word that holds them.
const WORDS: [[[i32; 16]; 8]; 3] = {
    let mut words = [[[0; 16]; 8]; 3];
    let mut i = 0;
    while i < 384 {
        let (log, half, four) = (i / 128, i / 16 % 8, i % 16);
        let (width, unit) = (1 << log, 2 * half + four / 8);
        words[log][half][four] = ((unit * width + four % width) % 16) as i32;
        i += 1;
    }
    words
};

/// By the logarithm of the width of a plane, for each four of 64 columns: the first bit of their fields in a byte.
const SHIFTS: [[i32; 16]; 3] = {
    let mut shifts = [[0; 16]; 3];
    let mut i = 0;
    while i < 48 {
        let width = 1 << (i / 16);
        shifts[i / 16][i % 16] = (i % 8 / width * width) as i32;
        i += 1;
    }
    shifts
};

/// Up to [`TOKENS`] tokens. A block of columns has `P` groups.
struct TokenPart<'a, const P: usize> {
    x: &'a ActivationsQ8,
    /// The first token.
    token: usize,
}

impl<const P: usize> TokenPart<'_, P> {
    /// Adds the products with the expanded rows to `sums`, [tile][place][half of the tokens][row]: 16·`T` tokens. Those of
    /// the first columns replace what is there.
    #[inline(always)]
    fn add<S: Bytes, const T: usize>(
        &self,
        s: S,
        unit: &impl TileUnit,
        blocks: Range<usize>,
        scratch: &mut AmxScratch,
        sums: &mut [TileLanes],
    ) {
        let AmxScratch { rows, scales, products } = scratch;
        let at = self.token / TOKENS * self.x.blocks() + blocks.start;
        let is_first = blocks.start == 0;
        // While products of one group are computed, those of the group before are added: results that were
        // just stored from a tile cannot be loaded at once.
        let count = P * blocks.len();
        for g in 0..=count {
            if g < count {
                let (x, to) = (&self.x.by_four[at + g / P].0, &mut products[g % 2].0);
                if P == 1 {
                    let halves = |tile: usize| rows.0[tile][2 * g..].first_chunk();
                    let w = [0, 1].map(|tile| halves(tile).expect("two halves of a block"));
                    unit.row_products::<T, 2>(w, [&x[0], &x[1]], to);
                } else {
                    let w = [0, 1].map(|tile| std::slice::from_ref(&rows.0[tile][g]));
                    let w = w.map(|w| w.first_chunk().expect("one piece"));
                    let half = g % P * 2 / P;
                    let x = [0, 1].map(|i| x[i][half..].first_chunk().expect("half of a block"));
                    unit.row_products::<T, 1>(w, x, to);
                }
            }
            let Some(group) = g.checked_sub(1) else { continue };
            let factors = self.factors::<S, T>(s, at + group / P, group % P);
            for (j, scales) in scales.iter().enumerate() {
                let sums = &mut sums[(j * DEPTH * P + group) * VECTORS..][..VECTORS];
                for (i, (scale, offset)) in factors.into_iter().enumerate() {
                    let products = products[group % 2].0[j][i].iter();
                    let sums = sums[i * ROW_TILE..].iter_mut();
                    for ((TileLanes(sum), products), steps) in sums.zip(products).zip(scales) {
                        let products = s.add_i(s.load_i(products), offset);
                        let scale = s.mul(s.splat(steps.0[group]), scale);
                        let before = if is_first { s.splat(0.0) } else { s.load(sum) };
                        s.store(s.mul_add(scale, s.to_f32(products), before), sum);
                    }
                }
            }
        }
    }

    /// For each 16 tokens, the scales of their activations in a group of a block, and their offsets.
    #[inline(always)]
    fn factors<S: Bytes, const T: usize>(
        &self,
        s: S,
        block: usize,
        group: usize,
    ) -> [(S::F, S::I); T] {
        let mut factors = [(s.splat(0.0), s.splat_i(0)); T];
        let scales = self.x.scales[block].as_chunks().0;
        for (i, (scale, offset)) in factors.iter_mut().enumerate() {
            *scale = s.load(&scales[i]);
            for unit in &self.x.offsets[block][group * UNITS / P..][..UNITS / P] {
                *offset = s.add_i(*offset, s.load_i(&unit.as_chunks().0[i]));
            }
        }
        factors
    }
}

/// Writes the sums over all places of sums [place][half of the tokens][row] to the rows of tile `tile`, by the same
/// additions as in the product for one token.
#[inline(always)]
fn write_sums<S: Bytes, const P: usize>(
    s: S,
    sums: &[TileLanes],
    tile: usize,
    y: &mut [&mut [f32]],
) {
    for (half, y) in y.chunks_mut(16).enumerate() {
        let mut by_row = Aligned([[0; 64]; ROW_TILE]);
        for (r, to) in by_row.iter_mut().enumerate() {
            let mut all = [s.splat(0.0); PIECES];
            let all = &mut all[..DEPTH * P];
            for (sum, place) in all.iter_mut().zip(sums.chunks_exact(VECTORS)) {
                *sum = s.load(&place[half * ROW_TILE + r].0);
            }
            let mut count = DEPTH * P / 2;
            while count > 0 {
                for i in 0..count {
                    all[i] = s.add(all[i], all[i + count]);
                }
                count /= 2;
            }
            s.store_words(s.cast_i(s.add(all[0], s.splat(0.0))), to);
        }
        for (q, y) in y.chunks_mut(4).enumerate() {
            for (sums, y) in columns(s, &by_row, q).into_iter().zip(y) {
                store_tile(s, sums, tile, y);
            }
        }
    }
}

/// Columns 4q to 4q + 3 of rows of 16 numbers.
#[inline(always)]
fn columns<S: Bytes>(s: S, rows: &TileLines, q: usize) -> [S::F; 4] {
    let mut vectors = [s.splat_b(0); 4];
    for (v, vector) in vectors.iter_mut().enumerate() {
        let four = |row: usize| &rows[row].as_chunks().0[q];
        *vector = s.load_lanes([four(v), four(v + 4), four(v + 8), four(v + 12)]);
    }
    let mut columns = [s.splat(0.0); 4];
    for (column, vector) in columns.iter_mut().zip(s.transpose_words(vectors)) {
        let mut line = [0; 64];
        s.store_b(vector, &mut line);
        *column = s.load_bytes(&line);
    }
    columns
}

const _: () = assert!(TILES == 2 && 2 * 64 == BLOCK, "pairs of tiles; halves of blocks");
const _: () = assert!(DEPTH * BLOCK == LINE_COLS);
