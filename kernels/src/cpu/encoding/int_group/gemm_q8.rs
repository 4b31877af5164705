//! Products of integers of up to 4 bits with many q8 tokens. Codes are expanded to bytes, 16 rows and some
//! columns at a time, for all tokens of a task. They are multiplied with one token after the other: four
//! columns of 16 rows with the same four activations in every lane ([`Bytes::dot4_small`]).
//!
//! An expanded byte is the stored number, or twice that number if codes are odd. The lowest code times the
//! sum of activations of 32 columns is an offset that is computed with the activations. No sum overflows:
//! eight bytes of at most 15 are within [`MAX_SMALL`], and a sum over 128 columns is within 128 · 23 · 127.

use stb_format::encoding::int_group::UNIT;
use stb_format::encoding::{IntGroup, IntGroupView};

use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use crate::cpu::arch::bytes::{Aligned, Bytes, Line, MAX_SMALL, Task};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, BlockOffsets, QuantizeChunk, TOKENS};
use crate::cpu::products::ROW_TILE;

/// Rows of a task: more rows would share no more work.
pub(super) const ROWS: usize = 4 * ROW_TILE;
/// Tokens of a task.
pub(super) const GROUP: usize = 128;
/// Tiles that use the activations of some tokens while these are in the L1 cache.
const TILES: usize = 2;
/// Blocks of columns expanded at a time.
const DEPTH: usize = 4;
/// Units of a block of activations.
const UNITS: usize = BLOCK / UNIT;
/// Words of four columns of a unit.
const WORDS: usize = UNIT / 4;

/// Quantizes a chunk of tokens and computes their offsets.
pub(super) struct IntQuantize<'c, 'x> {
    pub spec: IntGroup,
    pub chunk: &'c mut QuantizeChunk<'x>,
}

impl Task for IntQuantize<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let low = self.spec.limits().0;
        self.chunk.quantize(
            s,
            #[inline(always)]
            |_| {},
            #[inline(always)]
            |chunk, block, token, codes| offsets(low, codes, token, &mut chunk.offsets[block]),
        );
    }
}

/// See [`PackedGemmQ8::multiply`](crate::PackedGemmQ8::multiply).
pub(super) struct IntGemmQ8<'a, 'y>(pub GemmQ8Task<'a, 'y, IntGroupView<'a>>);

impl Task for IntGemmQ8<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        // The sums of 8 tokens fit in 32 registers of 64 bytes.
        let Self(task) = self;
        match (S::WIDE, task.matrix.spec.group()) {
            (true, 32) => all_tiles::<S, 8, 1>(s, task),
            (true, 64) => all_tiles::<S, 8, 2>(s, task),
            (true, _) => all_tiles::<S, 8, 4>(s, task),
            (false, 32) => all_tiles::<S, 4, 1>(s, task),
            (false, 64) => all_tiles::<S, 4, 2>(s, task),
            (false, _) => all_tiles::<S, 4, 4>(s, task),
        }
    }
}

/// Computes `K` tokens at a time. `G` units of columns share a scale. Sums are [tile][group of `K`
/// tokens][token].
#[inline(always)]
fn all_tiles<S: Bytes, const K: usize, const G: usize>(
    s: S,
    task: GemmQ8Task<'_, '_, IntGroupView<'_>>,
) {
    let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
    let parts = y.len().div_ceil(K);
    let mut expanded = vec![ExpandedTile::NONE; TILES];
    for from_tile in (0..tiles).step_by(TILES) {
        let expanded = &mut expanded[..TILES.min(tiles - from_tile)];
        let rows: [_; TILES] = std::array::from_fn(
            #[inline(always)]
            |t| TileRows::new(m, (first + (from_tile + t) * ROW_TILE).min(m.rows)),
        );
        for from in (0..x.blocks()).step_by(DEPTH) {
            for (expanded, rows) in expanded.iter_mut().zip(&rows) {
                expanded.read::<S, G>(s, m.spec.bits(), rows, from);
            }
            for part in 0..parts {
                let tokens = TokenBlocks::<K>::new(x, group * x.group + part * K, from);
                for (t, expanded) in expanded.iter().enumerate() {
                    let sums = &mut lanes.as_chunks_mut().0[t * parts + part];
                    tokens.add::<S, G>(s, expanded, from == 0, sums);
                }
            }
        }
        for t in 0..expanded.len() {
            copy_tile(&lanes[t * parts * K..][..parts * K], from_tile + t, y);
        }
    }
}

/// The stored rows of a tile; rows that do not exist are empty.
struct TileRows<'a> {
    low: [&'a [u8]; ROW_TILE],
    /// The plane of the third bits of 3-bit codes.
    high: [&'a [u8]; ROW_TILE],
    scales: [&'a [[u8; 2]]; ROW_TILE],
}

impl<'a> TileRows<'a> {
    #[inline(always)]
    fn new(m: &IntGroupView<'a>, first: usize) -> Self {
        let mut rows =
            Self { low: [&[]; ROW_TILE], high: [&[]; ROW_TILE], scales: [&[]; ROW_TILE] };
        for r in 0..ROW_TILE.min(m.rows - first) {
            [rows.low[r], rows.high[r]] = m.row_planes(first + r);
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
}

/// Four words of each row: word w of all rows in vector w.
#[inline(always)]
fn words<S: Bytes>(s: S, planes: &[&[u8]; ROW_TILE], at: usize) -> [S::B; 4] {
    // Word w of row 4l + v becomes word v in lane l of vector w.
    let mut by_row = [Aligned([0; 64]); 4];
    for (r, plane) in planes.iter().enumerate() {
        let to = &mut by_row[r % 4].0.as_chunks_mut::<16>().0[r / 4];
        if let Some(bytes) = plane.as_chunks().0.get(at) {
            *to = *bytes;
        } else if let Some(rest) = plane.get(16 * at..) {
            to[..rest.len()].copy_from_slice(rest);
        }
    }
    let mut vectors = [s.splat_b(0); 4];
    for (vector, line) in vectors.iter_mut().zip(&by_row) {
        *vector = s.load_b(line);
    }
    s.transpose_words(vectors)
}

/// Some blocks of a tile, expanded to bytes.
#[derive(Clone)]
struct ExpandedTile {
    /// By unit, by word of four columns: the four bytes of each row.
    words: [[Line; WORDS]; DEPTH * UNITS],
    /// By unit, filled for the first unit of each group: the scale of each row.
    scales: [TileLanes; DEPTH * UNITS],
}

impl ExpandedTile {
    const NONE: Self = Self {
        words: [[Aligned([0; 64]); WORDS]; DEPTH * UNITS],
        scales: [TileLanes([0.0; ROW_TILE]); DEPTH * UNITS],
    };

    /// Reads [`DEPTH`] blocks from `block`. Past the last block, activations are zero.
    #[inline(always)]
    fn read<S: Bytes, const G: usize>(
        &mut self,
        s: S,
        bits: u8,
        rows: &TileRows<'_>,
        block: usize,
    ) {
        let unit = block * UNITS;
        match bits {
            1 => self.ones(s, &rows.low, unit, false),
            2 => self.twos(s, &rows.low, unit),
            3 => {
                self.twos(s, &rows.low, unit);
                self.ones(s, &rows.high, unit, true);
            }
            _ => self.fours(s, &rows.low, unit),
        }
        for (g, scales) in self.scales.iter_mut().step_by(G).enumerate() {
            s.store(rows.scales(s, unit / G + g), &mut scales.0);
        }
    }

    /// Expands codes of 4 bits. A unit takes four words; columns k and k + 16 are in byte k.
    #[inline(always)]
    fn fours<S: Bytes>(&mut self, s: S, planes: &[&[u8]; ROW_TILE], unit: usize) {
        let mask = s.splat_b(15);
        for (u, to) in self.words.iter_mut().enumerate() {
            for (w, word) in words(s, planes, unit + u).into_iter().enumerate() {
                s.store_b(s.and_b(word, mask), &mut to[w]);
                s.store_b(s.and_b(s.shr_b::<4>(word), mask), &mut to[4 + w]);
            }
        }
    }

    /// Expands codes of 2 bits to twice the number. A unit takes two words; columns k, k + 8, k + 16 and k + 24
    /// are in byte k.
    #[inline(always)]
    fn twos<S: Bytes>(&mut self, s: S, planes: &[&[u8]; ROW_TILE], unit: usize) {
        let mask = s.splat_b(6);
        for (i, to) in self.words.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for (w, word) in words(s, planes, unit / 2 + i).into_iter().enumerate() {
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
    fn ones<S: Bytes>(&mut self, s: S, planes: &[&[u8]; ROW_TILE], unit: usize, added: bool) {
        let mask = s.splat_b(if added { 8 } else { 2 });
        for (i, to) in self.words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (word, to) in words(s, planes, unit / 4 + i).into_iter().zip(to) {
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
        Self { blocks }
    }

    /// Adds the products with some rows to `sums`; starts from zero if `first`.
    #[inline(always)]
    fn add<S: Bytes, const G: usize>(
        &self,
        s: S,
        rows: &ExpandedTile,
        first: bool,
        sums: &mut [TileLanes; K],
    ) {
        let mut totals = [s.splat(0.0); K];
        if !first {
            for (total, sum) in totals.iter_mut().zip(&*sums) {
                *total = s.load(&sum.0);
            }
        }
        for (b, x) in self.blocks.iter().enumerate() {
            let Some(x) = x else { break };
            for g in 0..UNITS / G {
                let mut acc = [s.splat_i(0); K];
                for u in g * G..(g + 1) * G {
                    let products = unit_products(s, &rows.words[b * UNITS + u], x.codes, u);
                    for k in 0..K {
                        let offset = s.splat_i(x.offsets[u][k].cast_unsigned());
                        acc[k] = s.add_i(acc[k], s.add_i(offset, s.finish_small(products[k])));
                    }
                }
                let scales = s.load(&rows.scales[b * UNITS + g * G].0);
                for k in 0..K {
                    let scale = s.mul(scales, s.splat(x.scales[k]));
                    totals[k] = s.mul_add(scale, s.to_f32(acc[k]), totals[k]);
                }
            }
        }
        for (total, sum) in totals.into_iter().zip(sums) {
            s.store(total, &mut sum.0);
        }
    }
}

/// The products of 16 rows with one unit of each token.
#[inline(always)]
fn unit_products<S: Bytes, const K: usize>(
    s: S,
    words: &[Line; WORDS],
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

/// Writes the offsets of token `t`: for each unit, the lowest code times the sum of activations.
#[inline(always)]
fn offsets(low: i8, codes: &[i8; BLOCK], t: usize, to: &mut BlockOffsets) {
    for (to, unit) in to.iter_mut().zip(codes.as_chunks::<UNIT>().0) {
        to[t] = i32::from(low) * unit.iter().map(|x| i32::from(*x)).sum::<i32>();
    }
}

const _: () = assert!(WORDS * 15 <= MAX_SMALL && TOKENS.is_multiple_of(8), "see the module");
