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
        tiles.push(Tile::<BITS> {
            whole,
            last,
            all_steps: Steps::of(m, tile),
            steps: Aligned([[1.0; TILE]; DEPTH]),
            row_scales,
        });
    }
    let together = if m.blocks() == 0 { 0 } else { m.spec.block() / BLOCK };
    for from in (0..x.blocks()).step_by(DEPTH) {
        let to = x.blocks().min(from + DEPTH);
        if together > 0 {
            for Tile { all_steps, steps, .. } in &mut tiles {
                for (block, steps) in (from..to).zip(&mut steps.0) {
                    s.store(all_steps.at(s, block / together), steps);
                }
            }
        }
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
    all_steps: Steps<'a>,
    /// Those of the present blocks; 1 if there are none.
    steps: Aligned<[[f32; TILE]; DEPTH]>,
    row_scales: [f32; TILE],
}

/// Some blocks of columns for tokens that share tables.
struct Part<'a, const M: usize> {
    blocks: std::ops::Range<usize>,
    /// [block][quad].
    tables: &'a [Quad],
    /// Scales of activations times the size of a step of the rows' scales: [block][token].
    factors: [[f32; TOGETHER]; DEPTH],
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
        let size = if m.blocks() == 0 { 1.0 } else { Steps::of(m, 0).size };
        let mut factors = [[0.0; TOGETHER]; DEPTH];
        for (factors, block) in factors.iter_mut().zip(blocks.clone()) {
            let scales = &x.scales[token / TOKENS * x.blocks() + block];
            *factors = scales.as_chunks().0[token % TOKENS / TOGETHER].map(|scale| scale * size);
        }
        Self { blocks, tables, factors }
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
                self.finish(s, &tile.steps, block, acc, &mut totals);
                block += 1;
                if block == self.blocks.end {
                    break;
                }
                acc = [s.zero_acc(); TOGETHER];
            }
            self.half::<S, N, BITS>(s, chunk, block, 1, &mut acc);
            self.finish(s, &tile.steps, block, acc, &mut totals);
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
            for q in 0..PART {
                *acc = s.add_lookups(*acc, &tables[q].0, index[q]);
            }
            return;
        }
        let [first, second] = nm8::pairs::<S, M, BITS>(s, planes);
        for q in 0..PART {
            *acc = s.add_lookups(*acc, &tables[q].0, first[q]);
            *acc = s.add_lookups_or_zero(*acc, &tables[q].0, second[q]);
        }
    }

    /// Adds the sums of a block, times their scales.
    #[inline(always)]
    fn finish<S: Bytes>(
        &self,
        s: S,
        steps: &[[f32; TILE]; DEPTH],
        block: usize,
        acc: [S::Acc; TOGETHER],
        totals: &mut [S::F; TOGETHER],
    ) {
        let i = block - self.blocks.start;
        let (factors, steps) = (&self.factors[i], s.load(&steps[i]));
        for k in 0..TOGETHER {
            let scale = s.mul(steps, s.splat(factors[k]));
            totals[k] = s.mul_add(scale, s.to_f32(s.finish(acc[k])), totals[k]);
        }
    }
}
