//! Products of trellis codes with many q8 tokens by dot products of bytes: the levels of a tile and a block of columns
//! are expanded once and multiplied with some tokens at a time.

use stb_format::encoding::TILE;
use stb_format::encoding::TrellisView;
use stb_format::trellis_rates;

use super::super::expanded_amx::ExpandedBlock;
use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::super::tile_scales::{block_steps, scale_rows, times};
use super::levels::{Levels, expand};
use crate::cpu::arch::bytes::{Aligned, Bytes};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{ActivationsQ8, TOKENS};

/// Rows of a task: more rows would share no more work.
pub(super) const ROWS: usize = 4 * TILE;

#[inline(always)]
pub(super) fn run<S: Bytes>(s: S, task: GemmQ8Task<'_, '_, TrellisView<'_>>) {
    let GemmQ8Task { matrix: m, x, first, tiles, y: to, lanes, .. } = task;
    let lanes = &mut lanes[..tiles * x.group];
    lanes.fill(TileLanes::default());
    trellis_rates!(m.spec, |BITS, WEIGHTS| {
        let levels = Levels::<S, WEIGHTS>::new(s, m.tables, false);
        let mut weights: ExpandedBlock = Aligned([[0; 64]; BLOCK / 4]);
        for (t, y) in lanes.chunks_exact_mut(x.group).enumerate() {
            let tile = first / TILE + t;
            for block in 0..x.blocks() {
                expand::<S, BITS, WEIGHTS>(s, m, &levels, tile, block, &mut weights);
                let steps = block_steps(s, &m.scales(), tile, block);
                // As many tokens as there are registers for.
                let mut token = 0;
                while token < x.tokens {
                    let place = Place { x, token, block };
                    token += if S::WIDE && x.tokens - token > 4 {
                        place.add::<S, 8>(s, &weights, steps, &mut y[token..])
                    } else if S::WIDE || x.tokens - token > 2 {
                        place.add::<S, 4>(s, &weights, steps, &mut y[token..])
                    } else {
                        place.add::<S, 2>(s, &weights, steps, &mut y[token..])
                    };
                }
            }
            scale_rows(s, &m.scales(), tile, y);
            copy_tile(y, t, to);
        }
    });
}

/// Activations of some tokens in a block of columns.
struct Place<'a> {
    x: &'a ActivationsQ8,
    token: usize,
    block: usize,
}

impl Place<'_> {
    /// Adds the products of `K` tokens to `y`, which has padding for a multiple of 8; returns `K`.
    #[inline(always)]
    fn add<S: Bytes, const K: usize>(
        &self,
        s: S,
        weights: &ExpandedBlock,
        steps: Option<(S::F, f32)>,
        y: &mut [TileLanes],
    ) -> usize {
        let at = self.token / TOKENS * self.x.blocks() + self.block;
        let first = self.token % TOKENS;
        let tokens = &self.x.by_token[at].0[first..first + K];
        let offsets = &self.x.offsets[at];
        let mut acc = [s.splat_i(0); K];
        for (k, acc) in acc.iter_mut().enumerate() {
            let mut offset = 0;
            for offsets in offsets {
                offset += offsets[first + k];
            }
            *acc = s.splat_i(offset.cast_unsigned());
        }
        for (c, line) in weights.0.iter().enumerate() {
            let levels = s.load_b(line);
            for k in 0..K {
                let word: [i8; 4] = tokens[k].as_chunks().0[c];
                acc[k] = s.dot4(acc[k], levels, s.splat_word(word.map(i8::cast_unsigned)));
            }
        }
        for k in 0..K {
            let scale = times(s, steps, self.x.scales[at][first + k]);
            let TileLanes(y) = &mut y[k];
            s.store(s.mul_add(scale, s.to_f32(acc[k]), s.load(y)), y);
        }
        K
    }
}
