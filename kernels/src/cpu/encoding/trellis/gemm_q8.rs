//! Products of trellis codes with many q8 tokens. Each output is computed by the same operations as in the product for
//! one token, so a token has the same result alone and in a batch.

use std::cell::RefCell;

use stb_format::encoding::TrellisView;

use super::super::col_factors::multiply_factors;
use super::super::expanded_amx::{self, ExpandedBlock};
use super::super::gemm_task::GemmQ8Task;
use super::gemv_q8::block_offset;
use super::{gemm_amx, gemm_lanes};
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::ops::q8_batch::{ActivationsQ8, Q8Arrangement, Q8Layout, QuantizeChunk, TOKENS};
use crate::cpu::packed::PackedGemmQ8;
use crate::isa::Isa;

/// The fewest tokens for which AMX takes less time than dot products.
const AMX_MIN_BATCH: usize = 12;

/// Whether a unit for tiles computes the products of this number of tokens.
struct ByTiles {
    tokens: usize,
}

impl Task for ByTiles {
    type Output = bool;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> bool {
        S::TILES && self.tokens >= AMX_MIN_BATCH
    }
}

thread_local! {
    /// Reused by the tasks of a thread, so that it stays in cache.
    static EXPANDED: RefCell<Vec<ExpandedBlock>> = RefCell::default();
}

impl PackedGemmQ8 for TrellisView<'_> {
    fn min_batch(&self, _: Isa) -> usize {
        5
    }

    fn prefill_batch(&self, isa: Isa) -> usize {
        if isa.run(ByTiles { tokens: usize::MAX }) { 512 } else { 128 }
    }

    fn layout(&self, isa: Isa, tokens: usize) -> Q8Layout {
        let (arrangement, task_rows) = if isa.run(ByTiles { tokens }) {
            (Q8Arrangement::ByToken, expanded_amx::ROWS)
        } else {
            (Q8Arrangement::ByTokenWithOffsets, gemm_lanes::ROWS)
        };
        let group = tokens.next_multiple_of(TOKENS);
        Q8Layout { arrangement, group, task_rows, keep_values: false }
    }

    fn quantize(&self, isa: Isa, chunk: &mut QuantizeChunk<'_>) {
        isa.run(TrellisQuantize { matrix: self, chunk });
    }

    fn multiply(
        &self,
        isa: Isa,
        x: &ActivationsQ8,
        group: usize,
        first: usize,
        y: &mut [&mut [f32]],
    ) {
        EXPANDED.with_borrow_mut(|expanded| {
            GemmQ8Task::with(self, x, group, first, y, |task| {
                isa.run(TrellisGemmQ8 { task, expanded });
            });
        });
    }
}

struct TrellisQuantize<'c, 'x> {
    matrix: &'c TrellisView<'c>,
    chunk: &'c mut QuantizeChunk<'x>,
}

impl Task for TrellisQuantize<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, chunk } = self;
        chunk.quantize(
            s,
            #[inline(always)]
            |x| multiply_factors(s, matrix.col_factors, x),
            #[inline(always)]
            |chunk, block, token, codes| {
                if let Some(offsets) = chunk.offsets.get_mut(block) {
                    let size = codes.len() / offsets.len();
                    for (offsets, codes) in offsets.iter_mut().zip(codes.chunks_exact(size)) {
                        offsets[token] = block_offset(codes);
                    }
                }
            },
        );
    }
}

struct TrellisGemmQ8<'a, 'y> {
    task: GemmQ8Task<'a, 'y, TrellisView<'a>>,
    expanded: &'a mut Vec<ExpandedBlock>,
}

impl Task for TrellisGemmQ8<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { task, expanded } = self;
        if S::TILES && task.x.offsets.is_empty() {
            let done = s.with_tiles(gemm_amx::TrellisByTiles { task, expanded });
            assert!(done.is_some(), "a set with tiles");
        } else {
            gemm_lanes::run(s, task);
        }
    }
}
