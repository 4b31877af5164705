//! Products of integers with many q8 tokens by AMX. Codes are expanded to bytes for all tokens of a task, as in
//! [`super::gemm_q8`]; the unit for tiles then multiplies 32 rows with 16 or 32 tokens, 128 or 64 columns at a time. Of
//! groups of 32 columns, it multiplies one and as many zeros: that takes less time than tiles of another shape, which
//! would have to be configured. An output takes one addition per group.

use stb_format::encoding::IntGroupView;

use super::super::gemm_task::{GemmQ8Task, TileLanes};
use super::gemm_q8::{
    DEPTH, ExpandedTile, ExpandedTiles, NextCodes, TILES, UNITS, WORDS, pair_of_tiles, room,
    write_sums,
};
use crate::cpu::arch::bytes::{Aligned, Bytes, TileSums, TileTask, TileUnit};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};
use crate::cpu::products::ROW_TILE;

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
        match self.task.matrix.spec.group() {
            32 => self.all_tiles::<S, 4>(s, unit),
            64 => self.all_tiles::<S, 2>(s, unit),
            _ => self.all_tiles::<S, 1>(s, unit),
        }
    }
}

impl IntAmxGemm<'_, '_> {
    /// A block of columns has `P` groups.
    #[inline(always)]
    fn all_tiles<S: Bytes, const P: usize>(self, s: S, unit: &impl TileUnit) {
        let Self { task, expanded } = self;
        let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
        let (size, places) = (y.len(), DEPTH * P);
        let mut products: [AlignedSums; 2] = [Aligned([[[[0; 16]; 16]; 2]; 2]); 2];
        for from_tile in (0..tiles).step_by(TILES) {
            let expanded = &mut expanded[..TILES.min(tiles - from_tile)];
            let rows = pair_of_tiles(m, first + from_tile * ROW_TILE);
            let lanes = room(lanes, expanded.len() * places * size, x.blocks() >= DEPTH);
            let mut next = NextCodes::new(m, first + from_tile * ROW_TILE);
            for from in (0..x.blocks()).step_by(DEPTH) {
                let blocks = from..x.blocks().min(from + DEPTH);
                for (expanded, rows) in expanded.iter_mut().zip(&rows) {
                    expanded.read(s, m.spec, rows, blocks.clone());
                    if P == UNITS {
                        expanded.take_apart(blocks.len());
                    }
                }
                for at in (0..size).step_by(TOKENS) {
                    let part = TokenPart::<P> { x, token: group * x.group + at, at, size, from };
                    let next = (at == 0).then_some(&mut next);
                    let scratch = (&mut products, &mut *lanes);
                    if size - at > 16 {
                        part.add::<S, 2>(s, unit, expanded, next, scratch);
                    } else {
                        part.add::<S, 1>(s, unit, expanded, next, scratch);
                    }
                }
            }
            for (t, sums) in lanes.chunks_exact_mut(places * size).enumerate() {
                write_sums(s, sums, places, from_tile + t, y);
            }
        }
    }
}

/// Up to [`TOKENS`] tokens in [`DEPTH`] blocks of columns, which have `P` groups each.
struct TokenPart<'a, const P: usize> {
    x: &'a ActivationsQ8,
    /// The first token, and its index in the task.
    token: usize,
    at: usize,
    /// Tokens of the task.
    size: usize,
    /// The first block.
    from: usize,
}

impl<const P: usize> TokenPart<'_, P> {
    /// Adds the products with some tiles to `sums`, [tile][place][token]: 16·`T` tokens at most. Those of the first
    /// columns replace what is there.
    #[inline(always)]
    fn add<S: Bytes, const T: usize>(
        &self,
        s: S,
        unit: &impl TileUnit,
        tiles: &[ExpandedTile],
        mut next: Option<&mut NextCodes>,
        (products, sums): (&mut [AlignedSums; 2], &mut [TileLanes]),
    ) {
        let (first, second) = (&tiles[0], &tiles[tiles.len() - 1]);
        let at = self.token / TOKENS * self.x.blocks() + self.from;
        // While products of one group are computed, those of the group before are added: results that were
        // just stored from a tile cannot be loaded at once.
        let count = P * DEPTH.min(self.x.blocks() - self.from);
        for g in 0..=count {
            if g < count {
                let (codes, from) = (&self.x.by_token[at + g / P].0, g * UNITS / P);
                let to = &mut products[g % 2].0;
                match P {
                    1 => {
                        let words = [first.words_from(from), second.words_from(from)];
                        unit.products::<T>(words, codes, to);
                    }
                    2 => {
                        let words = [first.words_from(from), second.words_from(from)];
                        unit.half_products::<T>(words, codes, g % 2, to);
                    }
                    _ => {
                        let words = [first.unit_apart(from), second.unit_apart(from)];
                        unit.half_products::<T>(words, codes, g % 4 / 2, to);
                    }
                }
            }
            if let Some(next) = &mut next {
                next.prefetch(s);
            }
            let Some(group) = g.checked_sub(1) else { continue };
            let block = at + group / P;
            let (scales, offsets) = (&self.x.scales[block], self.offsets(block, group % P));
            let products = &products[group % 2].0;
            for (j, tile) in tiles.iter().enumerate() {
                let sums = &mut sums[(j * DEPTH * P + group) * self.size + self.at..];
                let tokens = products[..T].iter().flat_map(|products| &products[j]);
                let factors = scales.iter().zip(&offsets);
                let steps = s.load(tile.group_scales(group * UNITS / P));
                let all = sums.iter_mut().take(self.size - self.at).zip(tokens).zip(factors);
                for ((TileLanes(sum), products), (scale, offset)) in all {
                    let products = s.add_i(s.load_i(products), s.splat_i(*offset));
                    let scale = s.mul(steps, s.splat(*scale));
                    let before = if self.from == 0 { s.splat(0.0) } else { s.load(sum) };
                    s.store(s.mul_add(scale, s.to_f32(products), before), sum);
                }
            }
        }
    }

    /// The offset of each token in a group of a block.
    #[inline(always)]
    fn offsets(&self, block: usize, group: usize) -> [u32; TOKENS] {
        let mut sums = [0u32; TOKENS];
        for unit in &self.x.offsets[block][group * UNITS / P..][..UNITS / P] {
            for (sum, offset) in sums.iter_mut().zip(unit) {
                *sum = sum.wrapping_add(offset.cast_unsigned());
            }
        }
        sums
    }
}

const _: () = assert!(TILES == 2 && UNITS * WORDS * 4 == BLOCK, "pairs of tiles; words of blocks");
