//! Products of N:M codes with many q8 tokens by look-ups in registers. Indices that are extracted from the
//! codes serve 8 tokens at a time; each look-up finds the weights of 16 rows in four groups of columns for
//! one token. For instruction sets whose look-ups and sums take one instruction each ([`Bytes::WIDE`]).
//!
//! For each token, 64 codes take one look-up in a table in memory and one dot product with ones (2:M: two of
//! each). Tables of [`DEPTH`] blocks and the codes for them stay in the L1 cache. With more than 8 tokens,
//! indices are extracted once and kept. That also avoids cache conflicts: rows often take a power of two
//! bytes, so the codes of several tiles would compete for the same few cache sets.

use std::ops::Range;

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE};
use stb_format::nm_rates;

use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::super::tile_scales::{self, BlockScales};
use super::codes::{self, CodePlanes, PART};
use crate::cpu::arch::bytes::{Aligned, Bytes, Line};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TABLE_TOKENS, TOKENS, TokenTables};

/// Rows of a task: tables are read from the L3 cache once for all of them.
pub(super) const ROWS: usize = 1024;
/// Tokens of a task: indices are extracted once for all of them, and their sums stay in the L2 cache.
pub(super) const GROUP: usize = 128;
/// Tokens whose sums are in registers together.
const TOGETHER: usize = TABLE_TOKENS;
/// Blocks of columns whose tables fit in the L1 cache: whole chunks of codes.
const DEPTH: usize = 4;

/// Writes the tables of token `t` of a group of [`TABLE_TOKENS`] for a block of columns to `to`, one for each
/// quad.
#[inline(always)]
pub(super) fn arrange<const M: usize>(codes: &[i8; BLOCK], t: usize, to: &mut [TokenTables]) {
    for (Aligned(to), quad) in to.iter_mut().zip(codes.chunks_exact(QUAD * M)) {
        codes::signed_table::<M>(quad, &mut to[t]);
    }
}

/// Quads of a block.
#[inline(always)]
pub(super) fn quads(m: usize) -> usize {
    BLOCK / (QUAD * m)
}

/// Blocks of a chunk of codes.
#[inline(always)]
fn blocks_of_chunk(m: usize) -> usize {
    CHUNK_QUADS / quads(m)
}

#[inline(always)]
pub(super) fn run<S: Bytes>(s: S, task: GemmQ8Task<'_, '_, NmView<'_>>, scratch: &mut LutScratch) {
    nm_rates!(task.matrix.spec, |N, M, BITS| {
        // Vectors that a block of a tile looks up.
        const INDICES: usize = N * BLOCK / (QUAD * M);
        all_tiles::<S, N, M, BITS, INDICES>(s, task, scratch)
    });
}

/// Sums are [group of tokens][tile][token][row]. A block of a tile looks up `INDICES` vectors.
#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize, const INDICES: usize>(
    s: S,
    task: GemmQ8Task<'_, '_, NmView<'_>>,
    scratch: &mut LutScratch,
) {
    let GemmQ8Task { matrix: m, x, group, first, tiles: count, y, lanes } = task;
    let parts = y.len().div_ceil(TOGETHER);
    let mut tiles = Vec::with_capacity(count);
    for tile in first / TILE..first / TILE + count {
        tiles.push(StoredTile::<N, M, BITS>::new(s, m, tile));
    }
    let mut decoded = scratch.tiles::<N, M, INDICES>(if parts > 1 { count } else { 0 });
    let (sums, _) = lanes.as_chunks_mut::<TOGETHER>();
    for from in (0..x.blocks()).step_by(DEPTH) {
        let blocks = from..x.blocks().min(from + DEPTH);
        for part in 0..parts {
            let token = group * x.group + part * TOGETHER;
            let tokens = LutTokens::new(m, x, token, blocks.clone());
            let sums = &mut sums[part * count..][..count];
            for (t, (tile, sums)) in tiles.iter_mut().zip(sums).enumerate() {
                tile.first_block = from;
                let Some(decoded) = decoded.get_mut(t) else {
                    tokens.add::<S, N, M>(s, tile, &tile.row_scales, sums);
                    continue;
                };
                if part == 0 {
                    decoded.read(s, tile, blocks.clone());
                }
                tokens.add::<S, N, M>(s, decoded, &tile.row_scales, sums);
            }
        }
    }
    for (y, sums) in y.chunks_mut(TOGETHER).zip(sums.chunks_exact(count)) {
        for (t, sums) in sums.iter().enumerate() {
            copy_tile(sums, t, y);
        }
    }
}

/// A tile of 16 rows, over some blocks of columns.
trait LutRows {
    /// The indices of the first and of the second weight of each group, in half of a chunk, in the order of
    /// [`Bytes::arrange`].
    fn indices<S: Bytes>(&self, s: S, chunk: usize, half: usize) -> [[S::B; PART]; 2];

    /// The block scales of the rows in a block, in steps; 1 if there are none.
    fn steps<S: Bytes>(&self, s: S, block: usize) -> S::F;
}

/// A tile as stored, from block `first_block` on.
struct StoredTile<'a, const N: usize, const M: usize, const BITS: usize> {
    /// See [`codes::chunks`].
    whole: &'a [[[u8; 64]; BITS]],
    last: [[u8; 64]; BITS],
    steps: BlockScales<'a>,
    row_scales: [f32; TILE],
    first_block: usize,
    /// Blocks of activations per block of weights; 0 if there are no block scales.
    together: usize,
}

impl<'a, const N: usize, const M: usize, const BITS: usize> StoredTile<'a, N, M, BITS> {
    #[inline(always)]
    fn new<S: Bytes>(s: S, m: &NmView<'a>, tile: usize) -> Self {
        let codes = m.tile_codes(tile).as_chunks().0;
        let (whole, last) = codes::chunks(codes, m.groups().div_ceil(QUAD));
        let mut row_scales = [0.0; TILE];
        s.store(tile_scales::row_scales(s, &m.scales(), tile), &mut row_scales);
        let together = if m.blocks() == 0 { 0 } else { m.spec.block() / BLOCK };
        Self {
            whole,
            last,
            steps: BlockScales::of(&m.scales(), tile),
            row_scales,
            first_block: 0,
            together,
        }
    }
}

impl<const N: usize, const M: usize, const BITS: usize> LutRows for StoredTile<'_, N, M, BITS> {
    #[inline(always)]
    fn indices<S: Bytes>(&self, s: S, chunk: usize, half: usize) -> [[S::B; PART]; 2] {
        let chunk = self.first_block / blocks_of_chunk(M) + chunk;
        let chunk = self.whole.get(chunk).unwrap_or(&self.last);
        if half == 0 {
            // Prefetches the codes of the next blocks.
            let ahead = DEPTH / blocks_of_chunk(M) * BITS * 64;
            chunk.iter().for_each(|v| s.prefetch(v.as_ptr().wrapping_add(ahead)));
        }
        let planes = CodePlanes { chunk, half, arranged: true };
        if N == 1 {
            let index = codes::indices::<S, N, M, BITS>(s, planes);
            [index, index]
        } else {
            codes::pairs::<S, M, BITS>(s, planes)
        }
    }

    #[inline(always)]
    fn steps<S: Bytes>(&self, s: S, block: usize) -> S::F {
        match self.together {
            0 => s.splat(1.0),
            1 => self.steps.at(s, self.first_block + block),
            n => self.steps.at(s, (self.first_block + block) / n),
        }
    }
}

/// Scratch for the indices and scales of tiles.
#[derive(Default)]
pub(super) struct LutScratch {
    indices: Vec<Line>,
    steps: Vec<TileLanes>,
}

impl LutScratch {
    #[inline(always)]
    fn tiles<const N: usize, const M: usize, const INDICES: usize>(
        &mut self,
        count: usize,
    ) -> Vec<DecodedTile<'_, N, M, INDICES>> {
        let all = count * DEPTH;
        if self.steps.len() < all || self.indices.len() < all * INDICES {
            self.steps.resize(all, TileLanes::default());
            self.indices.resize(all * INDICES, Aligned([0; 64]));
        }
        let indices = self.indices.as_chunks_mut().0.as_chunks_mut().0.iter_mut();
        let steps = self.steps.as_chunks_mut().0.iter_mut();
        let decoded = indices.zip(steps).map(|(indices, steps)| DecodedTile { indices, steps });
        decoded.take(count).collect()
    }
}

/// Indices and scales of some blocks of a tile.
struct DecodedTile<'a, const N: usize, const M: usize, const INDICES: usize> {
    /// By block, by quad: the index of each weight of a group.
    indices: &'a mut [[Line; INDICES]; DEPTH],
    steps: &'a mut [TileLanes; DEPTH],
}

impl<const N: usize, const M: usize, const INDICES: usize> DecodedTile<'_, N, M, INDICES> {
    #[inline(always)]
    fn read<S: Bytes>(&mut self, s: S, tile: &impl LutRows, blocks: Range<usize>) {
        let halves = self.indices.as_flattened_mut().chunks_exact_mut(N * PART);
        for (i, to) in halves.take(blocks.len() * quads(M) / PART).enumerate() {
            let index =
                if i % 2 == 0 { tile.indices(s, i / 2, 0) } else { tile.indices(s, i / 2, 1) };
            for (q, to) in to.chunks_exact_mut(N).enumerate() {
                for n in 0..N {
                    s.store_b(index[n][q], &mut to[n]);
                }
            }
        }
        for (block, to) in self.steps.iter_mut().enumerate().take(blocks.len()) {
            s.store(tile.steps(s, block), &mut to.0);
        }
    }
}

impl<const N: usize, const M: usize, const INDICES: usize> LutRows
    for DecodedTile<'_, N, M, INDICES>
{
    #[inline(always)]
    fn indices<S: Bytes>(&self, s: S, chunk: usize, half: usize) -> [[S::B; PART]; 2] {
        let stored = &self.indices.as_flattened()[(2 * chunk + half) * N * PART..][..N * PART];
        let mut index = [[s.splat_b(0); PART]; 2];
        for q in 0..PART {
            for n in 0..N {
                index[n][q] = s.load_b(&stored[q * N + n]);
            }
        }
        index
    }

    #[inline(always)]
    fn steps<S: Bytes>(&self, s: S, block: usize) -> S::F {
        s.load(&self.steps[block].0)
    }
}

/// Some blocks of columns for tokens that share tables.
struct LutTokens<'a> {
    /// [block][quad].
    tables: &'a [TokenTables],
    /// Scales of activations times the size of a step of the rows' scales: [block][token].
    factors: [[f32; TOGETHER]; DEPTH],
    /// The number of blocks.
    count: usize,
    first: bool,
    last: bool,
}

impl<'a> LutTokens<'a> {
    #[inline(always)]
    fn new(m: &NmView<'_>, x: &'a ActivationsQ8, token: usize, blocks: Range<usize>) -> Self {
        let at = token / TOGETHER * x.blocks();
        let quads = quads(m.spec.m());
        let tables = &x.tables[(at + blocks.start) * quads..(at + blocks.end) * quads];
        let size = if m.blocks() == 0 { 1.0 } else { BlockScales::of(&m.scales(), 0).size };
        let mut factors = [[0.0; TOGETHER]; DEPTH];
        for (factors, block) in factors.iter_mut().zip(blocks.clone()) {
            let scales = &x.scales[token / TOKENS * x.blocks() + block];
            *factors = scales.as_chunks().0[token % TOKENS / TOGETHER].map(|scale| scale * size);
        }
        let (first, last) = (blocks.start == 0, blocks.end == x.blocks());
        Self { tables, factors, count: blocks.len(), first, last }
    }

    /// Adds the products with some rows to `sums`, [token][row]. Starts from zero at the first block of the
    /// matrix; multiplies by the row scales after its last block.
    #[inline(always)]
    fn add<S: Bytes, const N: usize, const M: usize>(
        &self,
        s: S,
        rows: &impl LutRows,
        row_scales: &[f32; TILE],
        sums: &mut [TileLanes; TOGETHER],
    ) {
        let mut totals = [s.splat(0.0); TOGETHER];
        if !self.first {
            for (total, sum) in totals.iter_mut().zip(&*sums) {
                *total = s.load(&sum.0);
            }
        }
        let mut tables = self.tables.as_chunks().0.iter();
        for chunk in 0..self.count.div_ceil(blocks_of_chunk(M)) {
            let mut acc = [s.zero_acc(); TOGETHER];
            for half in 0..2 {
                // The last chunk may have one block only.
                let Some(tables) = tables.next() else { break };
                acc = add_half::<S, N>(s, rows.indices(s, chunk, half), tables, acc);
                if M == 8 || half == 1 {
                    let block = if M == 8 { 2 * chunk + half } else { chunk };
                    let steps = rows.steps(s, block);
                    for k in 0..TOGETHER {
                        let scale = s.mul(steps, s.splat(self.factors[block][k]));
                        totals[k] = s.mul_add(scale, s.to_f32(s.finish(acc[k])), totals[k]);
                    }
                    acc = [s.zero_acc(); TOGETHER];
                }
            }
        }
        let scale = if self.last { s.load(row_scales) } else { s.splat(1.0) };
        for (total, sum) in totals.into_iter().zip(sums) {
            s.store(s.mul(total, scale), &mut sum.0);
        }
    }
}

/// Adds half of a chunk to the sums of each token.
#[inline(always)]
fn add_half<S: Bytes, const N: usize>(
    s: S,
    indices: [[S::B; PART]; 2],
    tables: &[TokenTables; PART],
    acc: [S::Acc; TOGETHER],
) -> [S::Acc; TOGETHER] {
    let mut acc = acc;
    for q in 0..PART {
        acc = s.add_lookups::<false>(acc, &tables[q].0, indices[0][q]);
        if N == 2 {
            acc = s.add_lookups::<true>(acc, &tables[q].0, indices[1][q]);
        }
    }
    acc
}

const _: () = assert!(DEPTH.is_multiple_of(CHUNK_QUADS * QUAD * 8 / BLOCK), "whole chunks");
