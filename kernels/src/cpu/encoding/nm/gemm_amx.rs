//! Products of N:M codes with many q8 tokens by AMX. Codes are expanded to bytes in cache, a block of rows
//! and columns at a time, which takes about 8 instructions for 16 groups and is shared by all tokens. The
//! unit for tiles then needs 1/16384 of an instruction per weight and token.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{QUAD, TILE};

use stb_format::nm_rates;

use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::codes::{self, CodePlanes, PART};
use super::scales::{block_steps, scale_rows};
use crate::cpu::arch::bytes::{Aligned, Bytes, TileSums, TileTask, TileUnit};
use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};

/// Columns expanded at a time; a multiple of [`BLOCK`].
const DEPTH: usize = 512;
/// Row tiles expanded at a time: 64 rows × [`DEPTH`] columns are 32 KiB.
const TILES: usize = 4;
/// Rows of a task: more rows would share no more work.
pub(super) const ROWS: usize = TILES * TILE;

/// Bytes of 16 rows × 128 columns: for every four columns, the four bytes of each row side by side.
pub(super) type ExpandedBlock = Aligned<[[u8; 64]; BLOCK / 4]>;

/// Products of tiles before they are scaled.
type AlignedSums = Aligned<TileSums>;

pub(super) struct AmxGemm<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, NmView<'a>>,
    /// Scratch for expanded blocks.
    pub expanded: &'a mut Vec<ExpandedBlock>,
}

impl TileTask for AmxGemm<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) {
        let Self { task, expanded } = self;
        expanded.resize(TILES * DEPTH / BLOCK, Aligned([[0; 64]; BLOCK / 4]));
        nm_rates!(task.matrix.spec, |N, M, BITS| {
            all_tiles::<S, N, M, BITS>(s, unit, task, expanded)
        });
    }
}

#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize, const BITS: usize>(
    s: S,
    unit: &impl TileUnit,
    task: GemmQ8Task<'_, '_, NmView<'_>>,
    weights: &mut [ExpandedBlock],
) {
    let GemmQ8Task { matrix: m, x, first, tiles, y: to, lanes, .. } = task;
    let stride = x.group;
    let y = &mut lanes[..tiles * stride];
    let patterns = CodePatterns::<S>::new::<N, M>(s);
    let mut sums: [AlignedSums; 2] = [Aligned([[[[0; 16]; 16]; 2]; 2]); 2];
    y.fill(TileLanes::default());
    for (i, y) in y.chunks_mut(TILES * stride).enumerate() {
        let tile = first / TILE + i * TILES;
        let tiles = y.len() / stride;
        for from in (0..x.blocks()).step_by(DEPTH / BLOCK) {
            let blocks = from..x.blocks().min(from + DEPTH / BLOCK);
            for t in 0..tiles {
                for (k, block) in blocks.clone().enumerate() {
                    let to = &mut weights[t * (DEPTH / BLOCK) + k];
                    patterns.expand::<N, M, BITS>(s, m, tile + t, block, to);
                }
            }
            let product = TileProduct { unit, m, x, tile, tiles, blocks, weights };
            product.add(s, &mut sums, y);
        }
        for (t, y) in y.chunks_exact_mut(stride).enumerate() {
            scale_rows(s, m, tile + t, y);
            copy_tile(y, i * TILES + t, to);
        }
    }
}

/// The bytes that codes expand to, as words of four columns.
struct CodePatterns<S: Simd> {
    /// For the first four columns of a group and for the others, by an index of [`codes::indices`].
    /// 2:8: the word of one weight; the words of both weights are combined by exclusive or.
    tables: [S::F; 2],
    /// 2:4: the same for codes with the negative sign.
    negative: S::F,
}

impl<S: Bytes> CodePatterns<S> {
    #[inline(always)]
    fn new<const N: usize, const M: usize>(s: S) -> Self {
        let change = |negative: bool| u64::from(if negative { -1i8 } else { 1 }.cast_unsigned());
        let (mut low, mut high, mut negative) = ([0u32; 16], [0u32; 16], [0u32; 16]);
        for index in 0..16 {
            if (N, M) == (2, 4) {
                // i + 4j: positive at i; at j positive if i < j, negative if i > j.
                let (i, j) = (index % 4, index / 4);
                let word = |minus: bool| {
                    let at_j = if i == j { 0 } else { change((i > j) != minus) << (8 * j) };
                    (change(minus) << (8 * i) ^ at_j) as u32
                };
                (low[index], negative[index]) = (word(false), word(true));
            } else {
                let bytes = change(index / M % 2 == 1) << (8 * (index % M));
                (low[index], high[index]) = (bytes as u32, (bytes >> 32) as u32);
            }
        }
        let table = |words: &[u32; 16]| {
            let mut floats = [0.0; 16];
            for i in 0..16 {
                floats[i] = f32::from_bits(words[i]);
            }
            s.load(&floats)
        };
        Self { tables: [table(&low), table(&high)], negative: table(&negative) }
    }

    /// Columns `128·block..` of a tile of rows.
    #[inline(always)]
    fn expand<const N: usize, const M: usize, const BITS: usize>(
        &self,
        s: S,
        m: &NmView<'_>,
        tile: usize,
        block: usize,
        to: &mut ExpandedBlock,
    ) {
        let quads = m.groups().div_ceil(QUAD);
        let codes = m.tile_codes(tile).as_chunks::<64>().0;
        let (whole, last) = codes::chunks::<BITS>(codes, quads);
        let words = PART * QUAD * M / 4;
        let parts = BLOCK / 4 / words;
        for (p, to) in to.0.chunks_exact_mut(words).enumerate() {
            let part = block * parts + p;
            if part * PART >= quads {
                // Activations past the last column are zero.
                to.fill([0; 64]);
                continue;
            }
            let chunk = whole.get(part / 2).unwrap_or(&last);
            let planes = CodePlanes { chunk, half: part % 2, arranged: false };
            let (first, second) = if (N, M) == (2, 8) {
                let [first, second] = codes::pairs::<S, 8, BITS>(s, planes);
                (first, second)
            } else {
                let first = codes::indices::<S, N, M, BITS>(s, planes);
                (first, first)
            };
            for (q, to) in to.chunks_exact_mut(QUAD * M / 4).enumerate() {
                // Widening bytes from memory takes fewer operations than widening parts of a vector.
                let (mut a, mut b) = (Aligned([0; 64]), Aligned([0; 64]));
                s.store_b(first[q], &mut a.0);
                if (N, M) == (2, 8) {
                    s.store_b(second[q], &mut b.0);
                }
                let lanes = a.0.as_chunks().0.iter().zip(b.0.as_chunks().0);
                for ((a, b), to) in lanes.zip(to.chunks_exact_mut(M / 4)) {
                    let words = self.words::<N, M>(s, s.widen_u8(a), b);
                    for (k, to) in to.iter_mut().enumerate() {
                        s.store_words(words[k], to);
                    }
                }
            }
        }
    }

    /// The first four columns of 16 groups, and the others.
    #[inline(always)]
    fn words<const N: usize, const M: usize>(
        &self,
        s: S,
        first: S::I,
        second: &[u8; 16],
    ) -> [S::I; 2] {
        let word = |table: S::F, index: S::I| s.cast_i(s.lookup(table, index));
        let [low, high] = self.tables;
        match (N, M) {
            (2, 4) => {
                let (plus, minus) = (word(low, first), word(self.negative, first));
                let sign = s.gt_i(first, s.splat_i(15));
                [s.xor(plus, s.and(s.xor(plus, minus), sign)), plus]
            }
            (2, 8) => {
                let second = s.widen_u8(second);
                let exists = s.gt_i(s.splat_i(128), second);
                [
                    s.xor(word(low, first), s.and(word(low, second), exists)),
                    s.xor(word(high, first), s.and(word(high, second), exists)),
                ]
            }
            _ => [word(low, first), word(high, first)],
        }
    }
}

/// The product of expanded rows and columns with all tokens.
struct TileProduct<'a, U> {
    unit: &'a U,
    m: &'a NmView<'a>,
    x: &'a ActivationsQ8,
    /// First tile of rows, and how many.
    tile: usize,
    tiles: usize,
    /// Blocks of columns.
    blocks: std::ops::Range<usize>,
    /// [tile][block].
    weights: &'a [ExpandedBlock],
}

impl<'a, U: TileUnit> TileProduct<'a, U> {
    #[inline(always)]
    fn expanded(&self, tile: usize, k: usize) -> &'a ExpandedBlock {
        &self.weights[tile * (DEPTH / BLOCK) + k]
    }

    /// Adds to `y`, [tile][token][row].
    #[inline(always)]
    fn add<S: Bytes>(&self, s: S, sums: &mut [AlignedSums; 2], y: &mut [TileLanes]) {
        for token in (0..self.x.tokens).step_by(TOKENS) {
            for tile in (0..self.tiles).step_by(2) {
                if self.x.tokens - token > 16 {
                    self.add_pair::<S, 2>(s, tile, token, sums, y);
                } else {
                    self.add_pair::<S, 1>(s, tile, token, sums, y);
                }
            }
        }
    }

    /// Two tiles of rows (the second perhaps past the last) × `16·T` tokens.
    #[inline(always)]
    fn add_pair<S: Bytes, const T: usize>(
        &self,
        s: S,
        tile: usize,
        token: usize,
        sums: &mut [AlignedSums; 2],
        y: &mut [TileLanes],
    ) {
        let all = self.x.blocks();
        let second = (tile + 1).min(self.tiles - 1);
        // While products of one block are computed, those of the block before are added: results that were
        // just stored from a tile cannot be loaded at once.
        let count = self.blocks.len();
        for k in 0..=count {
            if k < count {
                let w = [&self.expanded(tile, k).0, &self.expanded(second, k).0];
                let x = &self.x.by_token[token / TOKENS * all + self.blocks.start + k];
                self.unit.products::<T>(w, &x.0, &mut sums[k % 2].0);
            }
            if k > 0 {
                let block = self.blocks.start + k - 1;
                let scales = &self.x.scales[token / TOKENS * all + block];
                let sums = &sums[(k - 1) % 2].0;
                for j in 0..(self.tiles - tile).min(2) {
                    let steps = block_steps(s, self.m, self.tile + tile + j, block);
                    let y = &mut y[(tile + j) * self.x.group + token..][..16 * T];
                    let lanes =
                        y.as_chunks_mut::<16>().0.iter_mut().zip(scales.as_chunks::<16>().0);
                    for ((y, scales), sums) in lanes.zip(sums) {
                        for ((y, scale), sums) in y.iter_mut().zip(scales).zip(&sums[j]) {
                            add_to(s, times(s, steps, *scale), s.load_i(sums), y);
                        }
                    }
                }
            }
        }
    }
}

/// `y += scale · sums`.
#[inline(always)]
fn add_to<S: Bytes>(s: S, scale: S::F, sums: S::I, y: &mut TileLanes) {
    s.store(s.mul_add(scale, s.to_f32(sums), s.load(&y.0)), &mut y.0);
}

/// Block scales times the scale of activations, by the same operations as in the product for one token.
#[inline(always)]
fn times<S: Bytes>(s: S, steps: Option<(S::F, f32)>, activation: f32) -> S::F {
    match steps {
        None => s.splat(activation),
        Some((steps, step)) => s.mul(steps, s.splat(activation * step)),
    }
}

// Blocks of weights are whole blocks of activations, and codes are expanded in whole quads.
const _: () = assert!(DEPTH.is_multiple_of(BLOCK) && BLOCK.is_multiple_of(QUAD * 8));
