//! Products of N:M codes with many q8 tokens. Each output is computed by the same operations as in the product
//! for one token, so a token has the same result alone and in a batch. The fastest path depends on the
//! instruction set and the number of tokens, see [`GemmPath`].

use std::cell::RefCell;

use stb_format::encoding::NmView;
use stb_format::nm_rates;

use super::super::col_factors::multiply_factors;
use super::super::expanded_amx;
use super::super::gemm_task::GemmQ8Task;
use super::gemm_lut::LutScratch;
use super::{gemm_amx, gemm_lut, gemm_sum_table};
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::ops::q8_batch::{
    ActivationsQ8, Q8Arrangement, Q8Layout, QuantizeChunk, TABLE_TOKENS, TOKENS,
};
use crate::cpu::packed::PackedGemmQ8;
use crate::isa::Isa;

/// The fewest tokens for which AMX takes less time than look-ups.
const AMX_MIN_BATCH: usize = 12;

/// How products are computed.
enum GemmPath {
    /// Codes are expanded to bytes and multiplied by a unit for tiles, see [`gemm_amx`].
    Amx,
    /// Weights of some tokens are looked up in registers, see [`gemm_lut`].
    Lut,
    /// Sums of activations of many tokens are looked up in memory, see [`gemm_sum_table`].
    SumTable,
}

/// Chooses the path for this number of tokens.
struct ChoosePath {
    tokens: usize,
}

impl Task for ChoosePath {
    type Output = GemmPath;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> GemmPath {
        if S::TILES && self.tokens >= AMX_MIN_BATCH {
            GemmPath::Amx
        } else if S::WIDE {
            GemmPath::Lut
        } else {
            GemmPath::SumTable
        }
    }
}

/// Scratch of the paths.
#[derive(Default)]
struct GemmScratch {
    lut: LutScratch,
    expanded: Vec<expanded_amx::ExpandedBlock>,
}

thread_local! {
    /// Reused by the tasks of a thread, so that it stays in cache.
    static SCRATCH: RefCell<GemmScratch> = RefCell::default();
}

impl PackedGemmQ8 for NmView<'_> {
    fn min_batch(&self, isa: Isa) -> usize {
        match isa.run(ChoosePath { tokens: 1 }) {
            GemmPath::Lut => 5,
            _ if (self.spec.n(), self.spec.m()) == (1, 8) => 11,
            _ => 8,
        }
    }

    fn prefill_batch(&self, isa: Isa) -> usize {
        match isa.run(ChoosePath { tokens: usize::MAX }) {
            GemmPath::Amx => 512,
            GemmPath::Lut | GemmPath::SumTable => 128,
        }
    }

    fn layout(&self, isa: Isa, tokens: usize) -> Q8Layout {
        match isa.run(ChoosePath { tokens }) {
            GemmPath::Amx => Q8Layout {
                arrangement: Q8Arrangement::ByToken,
                group: tokens.next_multiple_of(TOKENS),
                task_rows: expanded_amx::ROWS,
                keep_values: false,
            },
            GemmPath::Lut => Q8Layout {
                arrangement: Q8Arrangement::Tables { per_block: gemm_lut::quads(self.spec.m()) },
                group: tokens.next_multiple_of(TABLE_TOKENS).min(gemm_lut::GROUP),
                task_rows: gemm_lut::ROWS,
                keep_values: false,
            },
            GemmPath::SumTable => Q8Layout {
                arrangement: Q8Arrangement::ByColumn,
                group: TOKENS,
                task_rows: gemm_sum_table::ROWS,
                keep_values: false,
            },
        }
    }

    fn quantize(&self, isa: Isa, chunk: &mut QuantizeChunk<'_>) {
        isa.run(NmQuantize { matrix: self, chunk });
    }

    fn multiply(
        &self,
        isa: Isa,
        x: &ActivationsQ8,
        group: usize,
        first: usize,
        y: &mut [&mut [f32]],
    ) {
        SCRATCH.with_borrow_mut(|scratch| {
            GemmQ8Task::with(self, x, group, first, y, |task| isa.run(NmGemmQ8 { task, scratch }));
        });
    }
}

struct NmQuantize<'m, 'c, 'x> {
    matrix: &'m NmView<'m>,
    chunk: &'c mut QuantizeChunk<'x>,
}

impl Task for NmQuantize<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, chunk } = self;
        let blocks = chunk.blocks();
        let quads = gemm_lut::quads(matrix.spec.m());
        chunk.quantize(
            s,
            #[inline(always)]
            |x| multiply_factors(s, matrix.col_factors, x),
            #[inline(always)]
            |chunk, block, token, codes| {
                if chunk.tables.is_empty() {
                    return;
                }
                let (group, token) = (token / TABLE_TOKENS, token % TABLE_TOKENS);
                let to = &mut chunk.tables[(group * blocks + block) * quads..][..quads];
                nm_rates!(matrix.spec, |N, M, BITS| gemm_lut::arrange::<M>(codes, token, to));
            },
        );
    }
}

struct NmGemmQ8<'a, 'y> {
    task: GemmQ8Task<'a, 'y, NmView<'a>>,
    scratch: &'a mut GemmScratch,
}

impl Task for NmGemmQ8<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { task, scratch } = self;
        if S::TILES && !task.x.by_token.is_empty() {
            let done = s.with_tiles(gemm_amx::AmxGemm { task, expanded: &mut scratch.expanded });
            assert!(done.is_some(), "a set with tiles");
        } else if S::WIDE {
            gemm_lut::run(s, task, &mut scratch.lut);
        } else {
            gemm_sum_table::run(s, task);
        }
    }
}
