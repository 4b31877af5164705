//! Products of integers with many q8 tokens. Each output is computed by the same operations as in the product for one
//! token. Codes are multiplied by a unit for tiles where there is one ([`gemm_amx`]), else with rows in the lanes of
//! vectors ([`gemm_lanes`]).

use stb_format::encoding::{IntGroup, IntGroupView};

use super::super::gemm_task::GemmQ8Task;
use super::gemv_q8::{joined, store_times, sums_of_four};
use super::{gemm_amx, gemm_lanes};
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::{BlockOffsets, QuantizeChunk};

/// Whether tiles multiply.
pub(super) struct HasTiles;

impl Task for HasTiles {
    type Output = bool;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> bool {
        S::TILES
    }
}

/// Quantizes a chunk of tokens and computes their offsets.
pub(super) struct IntQuantize<'c, 'x> {
    pub spec: IntGroup,
    pub chunk: &'c mut QuantizeChunk<'x>,
}

impl Task for IntQuantize<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        // Tiles multiply codes of 8 bits as they are.
        let signed = self.spec.bits() == 8 && S::TILES;
        let low = if signed { 0 } else { self.spec.limits().0 };
        self.chunk.quantize(
            s,
            #[inline(always)]
            |_| {},
            #[inline(always)]
            |chunk, block, token, codes| offsets(s, low, codes, token, &mut chunk.offsets[block]),
        );
    }
}

/// See [`PackedGemmQ8::multiply`](crate::PackedGemmQ8::multiply).
pub(super) struct IntGemmQ8<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, IntGroupView<'a>>,
    pub scratch: &'a mut IntGemmScratch,
}

/// Scratch of a task.
pub(super) struct IntGemmScratch {
    lanes: gemm_lanes::ExpandedTiles,
    amx: gemm_amx::AmxScratch,
}

impl IntGemmScratch {
    pub(super) const EMPTY: Self = Self {
        lanes: [gemm_lanes::ExpandedTile::NONE; gemm_lanes::TILES],
        amx: gemm_amx::AmxScratch::EMPTY,
    };
}

impl Task for IntGemmQ8<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { task, scratch } = self;
        if S::TILES {
            let done = s.with_tiles(gemm_amx::IntAmxGemm { task, scratch: &mut scratch.amx });
            assert!(done.is_some(), "a set with tiles");
        } else {
            gemm_lanes::run(s, task, &mut scratch.lanes);
        }
    }
}

/// Writes the offsets of token `t`: for each unit, the lowest code times the sum of activations.
#[inline(always)]
fn offsets<S: Bytes>(s: S, low: i8, codes: &[i8; BLOCK], t: usize, to: &mut BlockOffsets) {
    let mut sums = joined(s, sums_of_four::<S, 2>(s, codes));
    for _ in 0..2 {
        sums = s.add_pairs(sums, sums);
    }
    let mut units = [0; 16];
    store_times(s, low, sums, &mut units);
    for (to, offset) in to.iter_mut().zip(units) {
        to[t] = offset;
    }
}
