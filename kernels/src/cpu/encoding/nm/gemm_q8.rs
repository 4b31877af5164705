//! Products of N:M codes with many q8 tokens. The operations for each output are those of the products
//! for one token, so that a token has the same result alone and among others.
//!
//! Which way is the fastest depends on the instruction set ([`GemmPath`]): codes are expanded to bytes
//! and multiplied by a unit for tiles ([`gemm_amx`]), looked up in registers for some tokens
//! ([`gemm_lut`]), or they are indices of sums of activations, of many tokens at a time
//! ([`gemm_sum_table`]).

use std::cell::RefCell;

use stb_format::encoding::NmView;

use super::super::gemm_task::GemmQ8Task;
use super::gemm_lut::LutScratch;
use super::{gemm_amx, gemm_lut, gemm_sum_table, scales};
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::ops::q8_batch::{
    ActivationsQ8, Q8Arrangement, Q8Layout, QuantizeChunk, TABLE_TOKENS, TOKENS,
};
use crate::cpu::packed::PackedGemmQ8;
use crate::isa::Isa;

/// From how many tokens on tiles take less time than look-ups, where there are tiles.
const AMX_MIN_BATCH: usize = 12;

/// See the module.
enum GemmPath {
    Amx,
    Lut,
    SumTable,
}

/// Chooses the path for so many tokens.
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

thread_local! {
    static LUT_SCRATCH: RefCell<LutScratch> = RefCell::default();
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
                task_rows: gemm_amx::ROWS,
            },
            GemmPath::Lut => Q8Layout {
                arrangement: Q8Arrangement::Tables { per_block: gemm_lut::quads(self.spec.m()) },
                group: tokens.next_multiple_of(TABLE_TOKENS).min(gemm_lut::GROUP),
                task_rows: gemm_lut::ROWS,
            },
            GemmPath::SumTable => Q8Layout {
                arrangement: Q8Arrangement::ByColumn,
                group: TOKENS,
                task_rows: gemm_sum_table::ROWS,
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
        LUT_SCRATCH.with_borrow_mut(|lut| {
            GemmQ8Task::with(self, x, group, first, y, |task| isa.run(NmGemmQ8 { task, lut }));
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
        let (blocks, m) = (chunk.blocks(), matrix.spec.m());
        let quads = gemm_lut::quads(m);
        chunk.quantize(
            s,
            #[inline(always)]
            |x| scales::multiply_factors(s, matrix, x),
            #[inline(always)]
            |chunk, block, token, codes| {
                if chunk.tables.is_empty() {
                    return;
                }
                let (group, token) = (token / TABLE_TOKENS, token % TABLE_TOKENS);
                let to = &mut chunk.tables[(group * blocks + block) * quads..][..quads];
                gemm_lut::arrange(m, codes, token, to);
            },
        );
    }
}

struct NmGemmQ8<'a, 'y> {
    task: GemmQ8Task<'a, 'y, NmView<'a>>,
    lut: &'a mut LutScratch,
}

impl Task for NmGemmQ8<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { task, lut } = self;
        if S::TILES && !task.x.by_token.is_empty() {
            let done = s.with_tiles(gemm_amx::AmxGemm(task));
            assert!(done.is_some(), "a set with tiles");
        } else if S::WIDE {
            gemm_lut::run(s, task, lut);
        } else {
            gemm_sum_table::run(s, task);
        }
    }
}
