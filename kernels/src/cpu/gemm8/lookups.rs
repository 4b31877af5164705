//! Codes looked up in registers, for 8 tokens at a time: what a code is taken apart to serves all of
//! them, and each look-up finds 16 rows in four groups of columns of one token. For sets whose look-ups
//! and sums take one instruction each ([`Bytes::WIDE`]).
//!
//! For each token and 64 codes: a look-up and a dot product with ones (2:M: two each), whose operand
//! comes from memory. Tables of [`DEPTH`] blocks and the codes they meet stay in the first cache.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{CHUNK_QUADS, QUAD, TILE};
use stb_format::half::f16;

use super::super::bytes::Bytes;
use super::super::int8::BLOCK;
use super::super::nm::Steps;
use super::super::nm8::{self, PART, Planes};
use super::{Aligned, Lanes, MatMul, RoundedTokens, TOKENS};

/// Rows of a task that share the tables in the second cache.
pub(super) const ROWS: usize = 256;
/// Tokens whose sums are in registers together.
pub(super) const TOGETHER: usize = 8;
/// Blocks of columns whose tables are in the first cache.
const DEPTH: usize = 4;

/// The tables of a quad, by token.
pub(super) type Quad = Aligned<[[u8; 64]; TOGETHER]>;

/// Writes the tables of one token, `t` of those together, for a block of columns: [quad] in `to`.
#[inline(always)]
pub(super) fn arrange(m: usize, codes: &[i8; BLOCK], t: usize, to: &mut [Quad]) {
    for (Aligned(to), quad) in to.iter_mut().zip(codes.chunks_exact(QUAD * m)) {
        match m {
            8 => nm8::signed::<8>(quad, &mut to[t]),
            _ => nm8::signed::<4>(quad, &mut to[t]),
        }
    }
}

/// Quads of a block.
#[inline(always)]
pub(super) fn quads(m: usize) -> usize {
    BLOCK / (QUAD * m)
}

#[inline(always)]
pub(super) fn run<S: Bytes>(s: S, job: MatMul<'_>) {
    let m = job.matrix;
    match (m.spec.n(), m.spec.m()) {
        (1, 4) => all_tiles::<S, 1, 4, 3, 8>(s, job),
        (1, 8) => all_tiles::<S, 1, 8, 4, 4>(s, job),
        (2, 4) => all_tiles::<S, 2, 4, 5, 16>(s, job),
        (2, 8) => all_tiles::<S, 2, 8, 7, 8>(s, job),
        (n, m) => unreachable!("the format has no {n}:{m} codes"),
    }
}

/// `y` holds [tile][token][row].
#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize, const INDICES: usize>(
    s: S,
    job: MatMul<'_>,
) {
    let MatMul { matrix: m, x, group, first, y } = job;
    let count = (x.tokens - group * x.group).min(x.group);
    let mut tiles: Vec<_> = (first / TILE..first / TILE + y.len() / x.group)
        .map(
            #[inline(always)]
            |tile| Tile::<BITS, INDICES>::new(m, tile),
        )
        .collect();
    for from in (0..x.blocks()).step_by(DEPTH) {
        let to = x.blocks().min(from + DEPTH);
        for tile in &mut tiles {
            tile.read::<S, N, M>(s, m, from..to);
        }
        for sub in 0..count.div_ceil(TOGETHER) {
            let part = Part::new(m, x, group * x.group + sub * TOGETHER, from..to);
            for (tile, y) in tiles.iter().zip(y.chunks_exact_mut(x.group)) {
                let y = &mut y.as_chunks_mut::<TOGETHER>().0[sub];
                part.add::<S, N, BITS, INDICES>(s, tile, y);
            }
        }
    }
}

/// 16 rows, and what those blocks of them look up that are multiplied at the moment.
struct Tile<'a, const BITS: usize, const INDICES: usize> {
    /// By block, by quad: of each weight of a group, arranged.
    indices: Aligned<[[[u8; 64]; INDICES]; DEPTH]>,
    /// Scales of rows in steps, by block; 1 if there are none.
    steps: [[f32; TILE]; DEPTH],
    row_scales: [f32; TILE],
    /// See [`nm8::chunks`].
    whole: &'a [[[u8; 64]; BITS]],
    last: [[u8; 64]; BITS],
    all_steps: Steps<'a>,
}

impl<'a, const BITS: usize, const INDICES: usize> Tile<'a, BITS, INDICES> {
    #[inline(always)]
    fn new(m: &NmView<'a>, tile: usize) -> Self {
        let codes = m.tile_codes(tile).as_chunks().0;
        let (whole, last) = nm8::chunks(codes, m.groups().div_ceil(QUAD));
        let mut row_scales = [0.0; TILE];
        for (to, scale) in row_scales.iter_mut().zip(&m.row_scales[tile * TILE..]) {
            *to = f16::from_le_bytes(*scale).to_f32();
        }
        Self {
            indices: Aligned([[[0; 64]; INDICES]; DEPTH]),
            steps: [[1.0; TILE]; DEPTH],
            row_scales,
            whole,
            last,
            all_steps: Steps::of(m, tile),
        }
    }

    /// Takes the codes of `blocks` apart, which begin with a chunk.
    #[inline(always)]
    fn read<S: Bytes, const N: usize, const M: usize>(
        &mut self,
        s: S,
        m: &NmView<'_>,
        blocks: std::ops::Range<usize>,
    ) {
        let per_chunk = CHUNK_QUADS / quads(M);
        let chunks = blocks.start / per_chunk..blocks.end.div_ceil(per_chunk);
        let indices = self.indices.0.as_flattened_mut().chunks_exact_mut(N * CHUNK_QUADS);
        for (chunk, to) in chunks.zip(indices) {
            let chunk = self.whole.get(chunk).unwrap_or(&self.last);
            for (half, to) in to.chunks_exact_mut(N * PART).enumerate() {
                let planes = Planes { chunk, half, arranged: true };
                if N == 1 {
                    let index = nm8::indices::<S, N, M, BITS>(s, planes);
                    for q in 0..PART {
                        s.store_b(index[q], &mut to[q]);
                    }
                } else {
                    let index = nm8::pairs::<S, M, BITS>(s, planes);
                    for q in 0..PART {
                        s.store_b(index[0][q], &mut to[2 * q]);
                        s.store_b(index[1][q], &mut to[2 * q + 1]);
                    }
                }
            }
        }
        if m.blocks() > 0 {
            let together = m.spec.block() / BLOCK;
            for (block, steps) in blocks.zip(&mut self.steps) {
                s.store(self.all_steps.at(s, block / together), steps);
            }
        }
    }
}

/// Some blocks of columns for tokens that share tables.
struct Part<'a> {
    /// [block][quad].
    tables: &'a [Quad],
    /// Scales of activations times the size of a step of the rows' scales: [block][token].
    factors: [[f32; TOGETHER]; DEPTH],
    count: usize,
    first: bool,
    last: bool,
}

impl<'a> Part<'a> {
    #[inline(always)]
    fn new(
        m: &NmView<'_>,
        x: &'a RoundedTokens,
        token: usize,
        blocks: std::ops::Range<usize>,
    ) -> Self {
        let at = token / TOGETHER * x.blocks();
        let quads = quads(m.spec.m());
        let tables = &x.tables[(at + blocks.start) * quads..(at + blocks.end) * quads];
        let size = if m.blocks() == 0 { 1.0 } else { Steps::of(m, 0).size };
        let mut factors = [[0.0; TOGETHER]; DEPTH];
        for (factors, block) in factors.iter_mut().zip(blocks.clone()) {
            let scales = &x.scales[token / TOKENS * x.blocks() + block];
            *factors = scales.as_chunks().0[token % TOKENS / TOGETHER].map(|scale| scale * size);
        }
        let (first, last) = (blocks.start == 0, blocks.end == x.blocks());
        Self { tables, factors, count: blocks.len(), first, last }
    }

    /// Adds the products of a tile to `y`, [token][row], or begins there with the first block; after
    /// the last one of all, multiplies by the scales of the rows.
    #[inline(always)]
    fn add<S: Bytes, const N: usize, const BITS: usize, const INDICES: usize>(
        &self,
        s: S,
        tile: &Tile<'_, BITS, INDICES>,
        y: &mut [Lanes; TOGETHER],
    ) {
        let mut totals = [s.splat(0.0); TOGETHER];
        if !self.first {
            for (total, y) in totals.iter_mut().zip(&*y) {
                *total = s.load(&y.0);
            }
        }
        let blocks = tile.indices.iter().zip(self.tables.chunks_exact(INDICES / N));
        let scales = tile.steps.iter().zip(&self.factors);
        for ((indices, tables), (steps, factors)) in blocks.zip(scales).take(self.count) {
            let mut acc = [s.zero_acc(); TOGETHER];
            for (table, index) in tables.iter().zip(indices.chunks_exact(N)) {
                acc = s.add_lookups(acc, &table.0, s.load_b(&index[0]));
                if N == 2 {
                    acc = s.add_lookups_or_zero(acc, &table.0, s.load_b(&index[1]));
                }
            }
            let steps = s.load(steps);
            for k in 0..TOGETHER {
                let scale = s.mul(steps, s.splat(factors[k]));
                totals[k] = s.mul_add(scale, s.to_f32(s.finish(acc[k])), totals[k]);
            }
        }
        let scale = if self.last { s.load(&tile.row_scales) } else { s.splat(1.0) };
        for (total, y) in totals.into_iter().zip(y) {
            s.store(s.mul(total, scale), &mut y.0);
        }
    }
}
