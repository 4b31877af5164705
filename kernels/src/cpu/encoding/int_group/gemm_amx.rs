//! Products of integers with many q8 tokens by AMX, for groups of whole blocks. Codes are expanded to bytes for all
//! tokens of a task, as in [`super::gemm_q8`]; the unit for tiles then multiplies 32 rows with 16 or 32 tokens. An
//! output takes one addition per group of 128 columns.

use stb_format::encoding::{IntGroup, IntGroupView};

use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::gemm_q8::{
    DEPTH, ExpandedTile, ExpandedTiles, TILES, UNITS, pair_of_tiles, sum_of_places, zeros,
};
use crate::cpu::arch::bytes::{Aligned, Bytes, TileSums, TileTask, TileUnit};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};
use crate::cpu::products::ROW_TILE;

/// Whether matrices of this encoding are multiplied by tiles.
#[inline(always)]
pub(super) fn fits<S: Bytes>(spec: IntGroup) -> bool {
    S::TILES && spec.group() == BLOCK
}

/// Products of tiles before they are scaled.
type AlignedSums = Aligned<TileSums>;

/// See [`PackedGemmQ8::multiply`](crate::PackedGemmQ8::multiply).
pub(super) struct IntAmxGemm<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, IntGroupView<'a>>,
    /// Scratch for tiles.
    pub expanded: &'a mut ExpandedTiles,
}

impl TileTask for IntAmxGemm<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) {
        let Self { task, expanded } = self;
        let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
        let size = y.len();
        let mut products: [AlignedSums; 2] = [Aligned([[[[0; 16]; 16]; 2]; 2]); 2];
        for from_tile in (0..tiles).step_by(TILES) {
            let expanded = &mut expanded[..TILES.min(tiles - from_tile)];
            let rows = pair_of_tiles(m, first + from_tile * ROW_TILE);
            let lanes = zeros(lanes, expanded.len() * DEPTH * size);
            for from in (0..x.blocks()).step_by(DEPTH) {
                for (expanded, rows) in expanded.iter_mut().zip(&rows) {
                    expanded.read(s, m.spec, rows, from);
                }
                for at in (0..size).step_by(TOKENS) {
                    let part = TokenPart { x, token: group * x.group + at, at, size, from };
                    if size - at > 16 {
                        part.add::<S, 2>(s, unit, expanded, &mut products, lanes);
                    } else {
                        part.add::<S, 1>(s, unit, expanded, &mut products, lanes);
                    }
                }
            }
            for (t, sums) in lanes.chunks_exact_mut(DEPTH * size).enumerate() {
                copy_tile(sum_of_places(s, sums, DEPTH), from_tile + t, y);
            }
        }
    }
}

/// Up to [`TOKENS`] tokens in [`DEPTH`] blocks of columns.
struct TokenPart<'a> {
    x: &'a ActivationsQ8,
    /// The first token, and its index in the task.
    token: usize,
    at: usize,
    /// Tokens of the task.
    size: usize,
    /// The first block.
    from: usize,
}

impl TokenPart<'_> {
    /// Adds the products with some tiles to `sums`, [tile][place][token]: 16·`T` tokens at most.
    #[inline(always)]
    fn add<S: Bytes, const T: usize>(
        &self,
        s: S,
        unit: &impl TileUnit,
        tiles: &[ExpandedTile],
        products: &mut [AlignedSums; 2],
        sums: &mut [TileLanes],
    ) {
        let (first, second) = (&tiles[0], &tiles[tiles.len() - 1]);
        let at = self.token / TOKENS * self.x.blocks() + self.from;
        // While products of one block are computed, those of the block before are added: results that were
        // just stored from a tile cannot be loaded at once.
        let count = DEPTH.min(self.x.blocks() - self.from);
        for k in 0..=count {
            if k < count {
                let codes = &self.x.by_token[at + k];
                let words = [first.block(k), second.block(k)];
                unit.products::<T>(words, &codes.0, &mut products[k % 2].0);
            }
            let Some(block) = k.checked_sub(1) else { continue };
            let (scales, offsets) = (&self.x.scales[at + block], self.offsets(s, at + block));
            let products = &products[block % 2].0;
            for (j, tile) in tiles.iter().enumerate() {
                let sums = &mut sums[(j * DEPTH + block) * self.size + self.at..];
                let tokens = products[..T].iter().flat_map(|products| &products[j]);
                let factors = scales.iter().zip(&offsets);
                let steps = s.load(tile.block_scales(block));
                let all = sums.iter_mut().take(self.size - self.at).zip(tokens).zip(factors);
                for ((TileLanes(sum), products), (scale, offset)) in all {
                    let products = s.add_i(s.load_i(products), s.splat_i(*offset));
                    let scale = s.mul(steps, s.splat(*scale));
                    s.store(s.mul_add(scale, s.to_f32(products), s.load(sum)), sum);
                }
            }
        }
    }

    /// The offset of each token in a block.
    #[inline(always)]
    fn offsets<S: Bytes>(&self, _: S, block: usize) -> [u32; TOKENS] {
        let mut sums = [0u32; TOKENS];
        for unit in &self.x.offsets[block] {
            for (sum, offset) in sums.iter_mut().zip(unit) {
                *sum = sum.wrapping_add(offset.cast_unsigned());
            }
        }
        sums
    }
}

const _: () = assert!(TILES == 2 && UNITS * 32 == BLOCK, "pairs of tiles, and units of blocks");
