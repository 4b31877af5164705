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
        (1, 4) => all_tiles::<S, 1, 4, 3>(s, job),
        (1, 8) => all_tiles::<S, 1, 8, 4>(s, job),
        (2, 4) => all_tiles::<S, 2, 4, 5>(s, job),
        (2, 8) => all_tiles::<S, 2, 8, 7>(s, job),
        (n, m) => unreachable!("the format has no {n}:{m} codes"),
    }
}

/// `y` holds [tile][token][row].
#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize>(s: S, job: MatMul<'_>) {
    let MatMul { matrix: m, x, group, first, y } = job;
    let count = (x.tokens - group * x.group).min(x.group);
    let quads = m.groups().div_ceil(QUAD);
    let mut tiles = Vec::with_capacity(y.len() / x.group);
    for tile in first / TILE..first / TILE + y.len() / x.group {
        let (whole, last) = nm8::chunks(m.tile_codes(tile).as_chunks().0, quads);
        let mut row_scales = [0.0; TILE];
        for (to, scale) in row_scales.iter_mut().zip(&m.row_scales[tile * TILE..]) {
            *to = f16::from_le_bytes(*scale).to_f32();
        }
        tiles.push(Tile::<BITS> { whole, last, steps: Steps::of(m, tile), row_scales });
    }
    for from in (0..x.blocks()).step_by(DEPTH) {
        let to = x.blocks().min(from + DEPTH);
        for sub in 0..count.div_ceil(TOGETHER) {
            let part = Part::<M>::new(m, x, group * x.group + sub * TOGETHER, from..to);
            for (tile, y) in tiles.iter().zip(y.chunks_exact_mut(x.group)) {
                let y = &mut y.as_chunks_mut::<TOGETHER>().0[sub];
                part.add::<S, N, BITS>(s, tile, y, to == x.blocks());
            }
        }
    }
}

/// 16 rows; see [`nm8::chunks`].
struct Tile<'a, const BITS: usize> {
    whole: &'a [[[u8; 64]; BITS]],
    last: [[u8; 64]; BITS],
    steps: Steps<'a>,
    row_scales: [f32; TILE],
}

/// Some blocks of columns for tokens that share tables.
struct Part<'a, const M: usize> {
    blocks: std::ops::Range<usize>,
    /// [block][quad].
    tables: &'a [Quad],
    /// Scales of activations times the size of a step of the rows' scales: [block][token].
    factors: [[f32; TOGETHER]; DEPTH],
    /// Blocks that share the rows' scales; 0 if these are 1.
    together: usize,
}

impl<'a, const M: usize> Part<'a, M> {
    #[inline(always)]
    fn new(
        m: &NmView<'_>,
        x: &'a RoundedTokens,
        token: usize,
        blocks: std::ops::Range<usize>,
    ) -> Self {
        let at = token / TOGETHER * x.blocks();
        let tables = &x.tables[(at + blocks.start) * quads(M)..(at + blocks.end) * quads(M)];
        let together = if m.blocks() == 0 { 0 } else { m.spec.block() / BLOCK };
        let size = if together == 0 { 1.0 } else { Steps::of(m, 0).size };
        let mut factors = [[0.0; TOGETHER]; DEPTH];
        for (factors, block) in factors.iter_mut().zip(blocks.clone()) {
            let scales = &x.scales[token / TOKENS * x.blocks() + block];
            *factors = scales.as_chunks().0[token % TOKENS / TOGETHER].map(|scale| scale * size);
        }
        Self { blocks, tables, factors, together }
    }

    /// Adds the products of a tile to `y`, [token][row], or begins there with the first block; after
    /// the `last` one of all, multiplies by the scales of the rows.
    #[inline(always)]
    fn add<S: Bytes, const N: usize, const BITS: usize>(
        &self,
        s: S,
        tile: &Tile<'_, BITS>,
        y: &mut [Lanes; TOGETHER],
        last: bool,
    ) {
        let per_chunk = CHUNK_QUADS / quads(M);
        let mut totals = [s.splat(0.0); TOGETHER];
        if self.blocks.start > 0 {
            for (total, y) in totals.iter_mut().zip(&*y) {
                *total = s.load(&y.0);
            }
        }
        let mut block = self.blocks.start;
        while block < self.blocks.end {
            let chunk = tile.whole.get(block / per_chunk).unwrap_or(&tile.last);
            let mut acc = [s.zero_acc(); TOGETHER];
            self.half::<S, N, BITS>(s, chunk, block, 0, &mut acc);
            if M == 8 {
                self.finish(s, tile.steps, block, acc, &mut totals);
                block += 1;
                if block == self.blocks.end {
                    break;
                }
                acc = [s.zero_acc(); TOGETHER];
            }
            self.half::<S, N, BITS>(s, chunk, block, 1, &mut acc);
            self.finish(s, tile.steps, block, acc, &mut totals);
            block += 1;
        }
        let scale = if last { s.load(&tile.row_scales) } else { s.splat(1.0) };
        for (total, y) in totals.into_iter().zip(y) {
            s.store(s.mul(total, scale), &mut y.0);
        }
    }

    /// Adds half of a chunk to the sums of each token.
    #[inline(always)]
    fn half<S: Bytes, const N: usize, const BITS: usize>(
        &self,
        s: S,
        chunk: &[[u8; 64]; BITS],
        block: usize,
        half: usize,
        acc: &mut [S::Acc; TOGETHER],
    ) {
        let planes = Planes { chunk, half, arranged: true };
        let part = if M == 8 { 0 } else { half };
        let from = (block - self.blocks.start) * quads(M) + part * PART;
        let tables: &[Quad; PART] = self.tables[from..].first_chunk().expect("tables of a block");
        if N == 1 {
            let index = nm8::indices::<S, N, M, BITS>(s, planes);
            for q in [0, 2] {
                for k in 0..TOGETHER {
                    let a = s.lookup_arranged(s.load_b(&tables[q].0[k]), index[q]);
                    let b = s.lookup_arranged(s.load_b(&tables[q + 1].0[k]), index[q + 1]);
                    acc[k] = s.dot2(acc[k], a, b);
                }
            }
            return;
        }
        let [first, second] = nm8::pairs::<S, M, BITS>(s, planes);
        for q in 0..PART {
            for k in 0..TOGETHER {
                let table = s.load_b(&tables[q].0[k]);
                let a = s.lookup_arranged(table, first[q]);
                let b = s.lookup_arranged_or_zero(table, second[q]);
                acc[k] = s.dot2(acc[k], a, b);
            }
        }
    }

    /// Adds the sums of a block, times their scales.
    #[inline(always)]
    fn finish<S: Bytes>(
        &self,
        s: S,
        steps: Steps<'_>,
        block: usize,
        acc: [S::Acc; TOGETHER],
        totals: &mut [S::F; TOGETHER],
    ) {
        let factors = &self.factors[block - self.blocks.start];
        let steps = match self.together {
            0 => None,
            1 => Some(steps.at(s, block)),
            n => Some(steps.at(s, block / n)),
        };
        for k in 0..TOGETHER {
            let mut scale = s.splat(factors[k]);
            if let Some(steps) = steps {
                scale = s.mul(steps, scale);
            }
            totals[k] = s.mul_add(scale, s.to_f32(s.finish(acc[k])), totals[k]);
        }
    }
}
