//! Products of integers with many q8 tokens, with rows in the lanes of vectors. Codes are expanded to bytes, 16 rows and
//! some columns at a time, for all tokens of a task. They are multiplied with one token after the other: four
//! columns of 16 rows with the same four activations in every lane ([`Bytes::dot4_small`]).
//!
//! An expanded byte is the stored number, or twice that number if codes are odd; codes of 8 bits have two bytes
//! of 4 bits. The lowest code times the sum of activations of 32 columns is an offset that is computed with the
//! activations. No sum overflows: eight bytes of at most 15 are within [`MAX_SMALL`], and a sum over 128 columns
//! is within 128 · 383 · 127.
//!
//! A group of columns is a place in its stride of [`STRIDE`] columns, and the sums of each place are kept apart
//! until the end: the order of additions is that of [`super::gemv_q8`].

use std::ops::Range;

use stb_format::encoding::int_group::UNIT;
use stb_format::encoding::{IntGroup, IntGroupView};

use super::super::gemm_task::{GemmQ8Task, TileLanes, store_tile};
use super::super::row_major::bytes;
use super::gemv_q8::{STRIDE, planes_to_end};
use crate::cpu::arch::bytes::{Aligned, Bytes, MAX_SMALL};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};
use crate::cpu::products::ROW_TILE;

/// Rows of a task: more rows would share no more work.
pub(super) const ROWS: usize = 4 * ROW_TILE;
/// Tokens of a task.
pub(super) const GROUP: usize = 128;
/// Tiles that use the activations of some tokens while these are in the L1 cache.
pub(super) const TILES: usize = 2;
/// Blocks of columns expanded at a time: a stride.
pub(super) const DEPTH: usize = STRIDE / BLOCK;
/// Units of a block of activations.
pub(super) const UNITS: usize = BLOCK / UNIT;
/// Words of four columns of a unit.
const WORDS: usize = UNIT / 4;

/// Some blocks of the tiles that are computed together.
pub(super) type ExpandedTiles = [ExpandedTile; TILES];

/// Computes the products of a task.
#[inline(always)]
pub(super) fn run<S: Bytes>(
    s: S,
    task: GemmQ8Task<'_, '_, IntGroupView<'_>>,
    expanded: &mut ExpandedTiles,
) {
    // The sums of 8 tokens fit in 32 registers of 64 bytes.
    match (S::WIDE, task.matrix.spec.group()) {
        (true, 32) => all_tiles::<S, 8, 1>(s, task, expanded),
        (true, 64) => all_tiles::<S, 8, 2>(s, task, expanded),
        (true, _) => all_tiles::<S, 8, 4>(s, task, expanded),
        (false, 32) => all_tiles::<S, 4, 1>(s, task, expanded),
        (false, 64) => all_tiles::<S, 4, 2>(s, task, expanded),
        (false, _) => all_tiles::<S, 4, 4>(s, task, expanded),
    }
}

/// Computes `K` tokens at a time. `G` units of columns share a scale. Sums are [tile][place][token].
#[inline(always)]
fn all_tiles<S: Bytes, const K: usize, const G: usize>(
    s: S,
    task: GemmQ8Task<'_, '_, IntGroupView<'_>>,
    expanded: &mut ExpandedTiles,
) {
    let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
    let parts = y.len().div_ceil(K);
    let (places, size) = (DEPTH * UNITS / G, parts * K);
    for from_tile in (0..tiles).step_by(TILES) {
        let expanded = &mut expanded[..TILES.min(tiles - from_tile)];
        let rows = pair_of_tiles(m, first + from_tile * ROW_TILE);
        let lanes = room(lanes, expanded.len() * places * size, x.blocks() >= DEPTH);
        for from in (0..x.blocks()).step_by(DEPTH) {
            for (expanded, rows) in expanded.iter_mut().zip(&rows) {
                expanded.read(s, m.spec, rows, from..x.blocks().min(from + DEPTH));
            }
            for part in 0..parts {
                let tokens = TokenBlocks::<K>::new(x, group * x.group + part * K, from);
                for (expanded, sums) in expanded.iter().zip(lanes.chunks_exact_mut(places * size)) {
                    tokens.add::<S, G>(s, expanded, sums, part);
                }
            }
        }
        for (t, sums) in lanes.chunks_exact_mut(places * size).enumerate() {
            write_sums(s, sums, places, from_tile + t, y);
        }
    }
}

/// The stored rows of [`TILES`] tiles from row `first` on.
#[inline(always)]
pub(super) fn pair_of_tiles<'a>(m: &IntGroupView<'a>, first: usize) -> [TileRows<'a>; TILES] {
    [TileRows::new(m, first), TileRows::new(m, (first + ROW_TILE).min(m.rows))]
}

/// Room for `count` sums. All are written before they are read if `written`; otherwise they are zero.
#[inline(always)]
pub(super) fn room(sums: &mut Vec<TileLanes>, count: usize, written: bool) -> &mut [TileLanes] {
    if sums.len() < count {
        sums.resize(count, TileLanes::default());
    }
    let sums = &mut sums[..count];
    if !written {
        sums.fill(TileLanes::default());
    }
    sums
}

/// Writes the sums over all places of sums [place][token] to the rows of tile `tile`, by the same additions as in the
/// product for one token.
#[inline(always)]
pub(super) fn write_sums<S: Bytes>(
    s: S,
    sums: &[TileLanes],
    places: usize,
    tile: usize,
    y: &mut [&mut [f32]],
) {
    match places {
        4 => write_sums_of::<S, 4>(s, sums, tile, y),
        8 => write_sums_of::<S, 8>(s, sums, tile, y),
        _ => write_sums_of::<S, 16>(s, sums, tile, y),
    }
}

#[inline(always)]
fn write_sums_of<S: Bytes, const PLACES: usize>(
    s: S,
    sums: &[TileLanes],
    tile: usize,
    y: &mut [&mut [f32]],
) {
    let size = sums.len() / PLACES;
    for (t, y) in y.iter_mut().enumerate() {
        let mut all = [s.splat(0.0); PLACES];
        for (place, sum) in all.iter_mut().enumerate() {
            *sum = s.load(&sums[place * size + t].0);
        }
        let mut half = PLACES / 2;
        while half > 0 {
            for i in 0..half {
                all[i] = s.add(all[i], all[i + half]);
            }
            half /= 2;
        }
        store_tile(s, s.add(all[0], s.splat(0.0)), tile, y);
    }
}

/// The stored rows of a tile; rows that do not exist are empty. What is read past the end of a row is multiplied by
/// zero.
pub(super) struct TileRows<'a> {
    low: [&'a [u8]; ROW_TILE],
    /// The plane of the third bits of 3-bit codes.
    high: [&'a [u8]; ROW_TILE],
    scales: [&'a [[u8; 2]]; ROW_TILE],
    /// Bytes from a row to that of the tile after the next.
    ahead: usize,
}

impl<'a> TileRows<'a> {
    #[inline(always)]
    fn new(m: &IntGroupView<'a>, first: usize) -> Self {
        let ahead = TILES * ROW_TILE * m.row_codes(0).len();
        let mut rows =
            Self { low: [&[]; ROW_TILE], high: [&[]; ROW_TILE], scales: [&[]; ROW_TILE], ahead };
        for r in 0..ROW_TILE.min(m.rows - first) {
            [rows.low[r], rows.high[r]] = planes_to_end(m, first + r);
            rows.scales[r] = m.row_scales(first + r);
        }
        rows
    }

    /// The scales of the rows in a group of columns.
    #[inline(always)]
    fn scales<S: Bytes>(&self, s: S, group: usize) -> S::F {
        let mut halves = [0; 2 * ROW_TILE];
        for (half, scales) in halves.as_chunks_mut().0.iter_mut().zip(&self.scales) {
            *half = scales.get(group).copied().unwrap_or_default();
        }
        s.f16_to_f32(&halves)
    }

    /// The `at`-th four words of each row of the low or the high plane: word w of all rows in vector w.
    #[inline(always)]
    fn words<S: Bytes>(&self, s: S, high: bool, at: usize) -> [S::B; 4] {
        let planes = if high { &self.high } else { &self.low };
        if at.is_multiple_of(4) {
            for plane in planes {
                s.prefetch(plane.as_ptr().wrapping_add(16 * at + self.ahead));
            }
        }
        // Word w of row 4l + v becomes word v in lane l of vector w.
        let mut vectors = [s.splat_b(0); 4];
        for (v, vector) in vectors.iter_mut().enumerate() {
            let mut spare = [[0; 16]; 4];
            let [a, b, c, d] = &mut spare;
            *vector = s.load_lanes([
                bytes(planes[v], 16 * at, a),
                bytes(planes[v + 4], 16 * at, b),
                bytes(planes[v + 8], 16 * at, c),
                bytes(planes[v + 12], 16 * at, d),
            ]);
        }
        s.transpose_words(vectors)
    }
}

/// By unit, by word of four columns: the four bytes of each row.
type ExpandedUnits = Aligned<[[[u8; 64]; WORDS]; DEPTH * UNITS]>;

/// Some blocks of a tile, expanded to bytes.
pub(super) struct ExpandedTile {
    words: ExpandedUnits,
    /// The upper halves of codes of 8 bits.
    upper: ExpandedUnits,
    /// Whether `upper` is in use.
    has_upper: bool,
    /// By unit, filled for the first unit of each group: the scale of each row.
    scales: [TileLanes; DEPTH * UNITS],
}

impl ExpandedTile {
    pub(super) const NONE: Self = Self {
        words: Aligned([[[0; 64]; WORDS]; DEPTH * UNITS]),
        upper: Aligned([[[0; 64]; WORDS]; DEPTH * UNITS]),
        has_upper: false,
        scales: [TileLanes([0.0; ROW_TILE]); DEPTH * UNITS],
    };

    /// Reads some blocks, at most [`DEPTH`]. In columns that do not exist, activations are zero.
    #[inline(always)]
    pub(super) fn read<S: Bytes>(
        &mut self,
        s: S,
        spec: IntGroup,
        rows: &TileRows<'_>,
        blocks: Range<usize>,
    ) {
        let (unit, count) = (blocks.start * UNITS, blocks.len() * UNITS);
        self.has_upper = false;
        match spec.bits() {
            1 => self.ones(s, rows, unit..unit + count, false),
            2 => self.twos(s, rows, unit..unit + count),
            3 => {
                self.twos(s, rows, unit..unit + count);
                self.ones(s, rows, unit..unit + count, true);
            }
            4 => self.fours(s, rows, unit..unit + count),
            _ => self.eights(s, rows, unit..unit + count),
        }
        let units = spec.group() / UNIT;
        for (g, scales) in self.scales[..count].iter_mut().step_by(units).enumerate() {
            s.store(rows.scales(s, unit / units + g), &mut scales.0);
        }
    }

    /// Expands codes of 8 bits, plus 128, to halves of 4 bits.
    #[inline(always)]
    fn eights<S: Bytes>(&mut self, s: S, rows: &TileRows<'_>, units: Range<usize>) {
        self.has_upper = true;
        let (mask, eight) = (s.splat_b(15), s.splat_b(8));
        let words = self.words[..units.len()].as_flattened_mut().as_chunks_mut::<4>().0.iter_mut();
        let upper = self.upper.as_flattened_mut().as_chunks_mut::<4>().0.iter_mut();
        for (i, (low, high)) in words.zip(upper).enumerate() {
            for (w, word) in rows.words(s, false, 2 * units.start + i).into_iter().enumerate() {
                s.store_b(s.and_b(word, mask), &mut low[w]);
                s.store_b(s.xor_b(s.and_b(s.shr_b::<4>(word), mask), eight), &mut high[w]);
            }
        }
    }

    /// Expands codes of 4 bits. A unit takes four words; columns k and k + 16 are in byte k.
    #[inline(always)]
    fn fours<S: Bytes>(&mut self, s: S, rows: &TileRows<'_>, units: Range<usize>) {
        let mask = s.splat_b(15);
        for (u, to) in self.words[..units.len()].iter_mut().enumerate() {
            for (w, word) in rows.words(s, false, units.start + u).into_iter().enumerate() {
                s.store_b(s.and_b(word, mask), &mut to[w]);
                s.store_b(s.and_b(s.shr_b::<4>(word), mask), &mut to[4 + w]);
            }
        }
    }

    /// Expands codes of 2 bits to twice the number. A unit takes two words; columns k, k + 8, k + 16 and k + 24
    /// are in byte k.
    #[inline(always)]
    fn twos<S: Bytes>(&mut self, s: S, rows: &TileRows<'_>, units: Range<usize>) {
        let mask = s.splat_b(6);
        for (i, to) in self.words[..units.len()].as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for (w, word) in rows.words(s, false, units.start / 2 + i).into_iter().enumerate() {
                let fields = [
                    s.shl_b::<1>(word),
                    s.shr_b::<1>(word),
                    s.shr_b::<3>(word),
                    s.shr_b::<5>(word),
                ];
                for (f, field) in fields.into_iter().enumerate() {
                    s.store_b(s.and_b(field, mask), &mut to[w / 2][2 * f + w % 2]);
                }
            }
        }
    }

    /// Expands codes of 1 bit to twice the number or, if `added`, adds eight times the number to the bytes. A
    /// unit takes a word; columns k, k + 4, … are in byte k.
    #[inline(always)]
    fn ones<S: Bytes>(&mut self, s: S, rows: &TileRows<'_>, units: Range<usize>, added: bool) {
        let mask = s.splat_b(if added { 8 } else { 2 });
        for (i, to) in self.words[..units.len()].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (word, to) in rows.words(s, added, units.start / 4 + i).into_iter().zip(to) {
                // Moves bit f to bit 1, or to bit 3.
                let [up, down] = [s.shl_b::<1>(word), s.shr_b::<1>(word)];
                let [down_2, down_3, down_4] =
                    [s.shr_b::<2>(word), s.shr_b::<3>(word), s.shr_b::<4>(word)];
                let fields = if added {
                    let [up_3, up_2] = [s.shl_b::<3>(word), s.shl_b::<2>(word)];
                    [up_3, up_2, up, word, down, down_2, down_3, down_4]
                } else {
                    let [down_5, down_6] = [s.shr_b::<5>(word), s.shr_b::<6>(word)];
                    [up, word, down, down_2, down_3, down_4, down_5, down_6]
                };
                for (field, to) in fields.into_iter().zip(to) {
                    let mut field = s.and_b(field, mask);
                    if added {
                        field = s.or_b(field, s.load_b(to));
                    }
                    s.store_b(field, to);
                }
            }
        }
    }
}

/// Some blocks of the activations of `K` tokens.
struct TokenBlocks<'a, const K: usize> {
    blocks: [Option<BlockActivations<'a, K>>; DEPTH],
    /// Whether these are the first blocks.
    first: bool,
}

#[derive(Clone, Copy)]
struct BlockActivations<'a, const K: usize> {
    /// [token][column].
    codes: &'a [[i8; BLOCK]; K],
    /// By unit, see [`ActivationsQ8`].
    offsets: [&'a [i32; K]; UNITS],
    scales: &'a [f32; K],
}

impl<'a, const K: usize> TokenBlocks<'a, K> {
    #[inline(always)]
    fn new(x: &'a ActivationsQ8, token: usize, from: usize) -> Self {
        let (at, part) = (token / TOKENS * x.blocks(), token % TOKENS / K);
        let mut blocks = [None; DEPTH];
        for (to, block) in blocks.iter_mut().zip(from..x.blocks()) {
            let offsets = &x.offsets[at + block];
            *to = Some(BlockActivations {
                codes: &x.by_token[at + block].0.as_chunks().0[part],
                offsets: offsets.each_ref().map(
                    #[inline(always)]
                    |offsets| &offsets.as_chunks().0[part],
                ),
                scales: &x.scales[at + block].as_chunks().0[part],
            });
        }
        Self { blocks, first: from == 0 }
    }

    /// Adds the products with some rows to `sums`, [place][part][token], for part `part` of the tokens; those of the
    /// first columns replace what is there.
    #[inline(always)]
    fn add<S: Bytes, const G: usize>(
        &self,
        s: S,
        rows: &ExpandedTile,
        sums: &mut [TileLanes],
        part: usize,
    ) {
        let places = DEPTH * UNITS / G;
        let (sums, _) = sums.as_chunks_mut::<K>();
        let parts = sums.len() / places;
        for (b, x) in self.blocks.iter().enumerate() {
            let Some(x) = x else { break };
            for g in 0..UNITS / G {
                let mut acc = [s.splat_i(0); K];
                for u in g * G..(g + 1) * G {
                    let unit = b * UNITS + u;
                    let products = unit_products(s, &rows.words[unit], x.codes, u);
                    for k in 0..K {
                        let offset = s.splat_i(x.offsets[u][k].cast_unsigned());
                        acc[k] = s.add_i(acc[k], s.add_i(offset, s.finish_small(products[k])));
                    }
                    if rows.has_upper {
                        let products = unit_products(s, &rows.upper[unit], x.codes, u);
                        for k in 0..K {
                            acc[k] = s.add_i(acc[k], s.shl(s.finish_small(products[k]), 4));
                        }
                    }
                }
                let scales = s.load(&rows.scales[b * UNITS + g * G].0);
                let sums = &mut sums[(b * UNITS / G + g) * parts + part];
                for (k, TileLanes(sum)) in sums.iter_mut().enumerate() {
                    let scale = s.mul(scales, s.splat(x.scales[k]));
                    let before = if self.first { s.splat(0.0) } else { s.load(sum) };
                    s.store(s.mul_add(scale, s.to_f32(acc[k]), before), sum);
                }
            }
        }
    }
}

/// The products of 16 rows with one unit of each token.
#[inline(always)]
fn unit_products<S: Bytes, const K: usize>(
    s: S,
    words: &[[u8; 64]; WORDS],
    x: &[[i8; BLOCK]; K],
    unit: usize,
) -> [S::Small; K] {
    let mut sums = [s.zero_small(); K];
    for (w, word) in words.iter().enumerate() {
        let bytes = s.load_b(word);
        for k in 0..K {
            let four: &[i8; 4] = &x[k].as_chunks().0[unit * WORDS + w];
            sums[k] = s.dot4_small(sums[k], bytes, s.splat_word(four.map(i8::cast_unsigned)));
        }
    }
    sums
}

const _: () = assert!(WORDS * 15 <= MAX_SMALL && TOKENS.is_multiple_of(8), "see the module");
