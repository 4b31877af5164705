//! Products of expanded weights with many q8 tokens by AMX, for encodings with tiles of 16 rows. Codes are expanded to
//! bytes in cache, a block of rows and columns at a time, which is shared by all tokens. The unit for tiles then needs
//! 1/16384 of an instruction per weight and token.

use stb_format::encoding::{TILE, TileScales};

use super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::tile_scales::{block_steps, scale_rows, times};
use crate::cpu::arch::bytes::{Aligned, Bytes, TileSums, TileUnit};
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

/// The products of a task. `expand` writes the weights of a tile and a block of columns, without their scales.
#[inline(always)]
pub(super) fn all_tiles<S: Bytes, M>(
    s: S,
    unit: &impl TileUnit,
    task: GemmQ8Task<'_, '_, M>,
    scales: &TileScales<'_>,
    weights: &mut Vec<ExpandedBlock>,
    expand: impl Fn(usize, usize, &mut ExpandedBlock),
) {
    weights.resize(TILES * DEPTH / BLOCK, Aligned([[0; 64]; BLOCK / 4]));
    let GemmQ8Task { x, first, tiles, y: to, lanes, .. } = task;
    let stride = x.group;
    let y = &mut lanes[..tiles * stride];
    let mut sums: [AlignedSums; 2] = [Aligned([[[[0; 16]; 16]; 2]; 2]); 2];
    y.fill(TileLanes::default());
    for (i, y) in y.chunks_mut(TILES * stride).enumerate() {
        let tile = first / TILE + i * TILES;
        let tiles = y.len() / stride;
        for from in (0..x.blocks()).step_by(DEPTH / BLOCK) {
            let blocks = from..x.blocks().min(from + DEPTH / BLOCK);
            for t in 0..tiles {
                for (k, block) in blocks.clone().enumerate() {
                    expand(tile + t, block, &mut weights[t * (DEPTH / BLOCK) + k]);
                }
            }
            let product = TileProduct { unit, scales, x, tile, tiles, blocks, weights };
            product.add(s, &mut sums, y);
        }
        for (t, y) in y.chunks_exact_mut(stride).enumerate() {
            scale_rows(s, scales, tile + t, y);
            copy_tile(y, i * TILES + t, to);
        }
    }
}

/// The product of expanded rows and columns with all tokens.
struct TileProduct<'a, U> {
    unit: &'a U,
    scales: &'a TileScales<'a>,
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
                let activations = &self.x.scales[token / TOKENS * all + block];
                let sums = &sums[(k - 1) % 2].0;
                for j in 0..(self.tiles - tile).min(2) {
                    let steps = block_steps(s, self.scales, self.tile + tile + j, block);
                    let y = &mut y[(tile + j) * self.x.group + token..][..16 * T];
                    let lanes =
                        y.as_chunks_mut::<16>().0.iter_mut().zip(activations.as_chunks::<16>().0);
                    for ((y, activations), sums) in lanes.zip(sums) {
                        for ((y, scale), sums) in y.iter_mut().zip(activations).zip(&sums[j]) {
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

// Blocks of weights are whole blocks of activations.
const _: () = assert!(DEPTH.is_multiple_of(BLOCK));
