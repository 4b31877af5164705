//! Integers of 1 to 8 bits with one scale per group of columns.

mod exact;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
mod gemm_amx;
mod gemm_lanes;
mod gemm_q8;
mod gemv_q8;

use std::cell::RefCell;

use stb_format::encoding::IntGroupView;

use super::batch::gemv_shared;
use super::gemm_task::GemmQ8Task;
use super::row_major;
use crate::cpu::ops::q8::{GemvInput, GemvScratch};
use crate::cpu::ops::q8_batch::{ActivationsQ8, Q8Arrangement, Q8Layout, QuantizeChunk, TOKENS};
use crate::cpu::packed::{ActivationLayout, PackedGemmQ8, PackedMatrix, UnpackBlock};
use crate::cpu::products::GEMV_MAX_BATCH;
use crate::isa::Isa;

thread_local! {
    /// Reused by the tasks of a thread, so that it stays in cache.
    static SCRATCH: RefCell<Box<gemm_q8::IntGemmScratch>> =
        RefCell::new(Box::new(gemm_q8::IntGemmScratch::EMPTY));
}

impl PackedMatrix for IntGroupView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn prepare_q8<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        scratch.set(x, self.cols);
        let (values, q8) = (&scratch.values, &mut scratch.q8);
        isa.run(gemv_q8::IntPrepareQ8 { spec: self.spec, values, q8 });
        scratch.set_q8()
    }

    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        let variant = [usize::from(self.spec.bits()), self.spec.group()];
        Some(if q8 { ActivationLayout::new("int", variant) } else { ActivationLayout::AS_GIVEN })
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        match x.q8 {
            Some(x) => {
                isa.run(gemv_q8::IntGemvQ8 { matrix: self, x: [x], rows: y.len(), first, y });
            }
            None => row_major::gemv(isa, self, x.values, first, y),
        }
    }

    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        gemv_shared(
            x,
            y,
            |x, rows, y| isa.run(gemv_q8::IntGemvQ8 { matrix: self, x, rows, first, y }),
            |x, y| self.gemv(isa, x, first, y),
        );
    }

    fn gemv_max_batch(&self) -> usize {
        GEMV_MAX_BATCH
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        row_major::unpack(isa, self, block, to);
    }

    fn gemm_q8(&self) -> Option<&dyn PackedGemmQ8> {
        Some(self)
    }
}

impl PackedGemmQ8 for IntGroupView<'_> {
    fn min_batch(&self, isa: Isa) -> usize {
        // Of groups of 32 columns, half of what tiles multiply is zeros.
        if self.spec.group() == 32 && isa.run(gemm_q8::HasTiles) { 8 } else { 5 }
    }

    fn prefill_batch(&self, _: Isa) -> usize {
        128
    }

    fn layout(&self, isa: Isa, tokens: usize) -> Q8Layout {
        Q8Layout {
            arrangement: match isa.run(gemm_q8::HasTiles) {
                true => Q8Arrangement::ByFourWithOffsets,
                false => Q8Arrangement::ByTokenWithOffsets,
            },
            group: tokens.next_multiple_of(TOKENS).min(gemm_lanes::GROUP),
            task_rows: gemm_lanes::ROWS,
            keep_values: false,
        }
    }

    fn quantize(&self, isa: Isa, chunk: &mut QuantizeChunk<'_>) {
        isa.run(gemm_q8::IntQuantize { spec: self.spec, chunk });
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
            GemmQ8Task::with(self, x, group, first, y, |task| {
                isa.run(gemm_q8::IntGemmQ8 { task, scratch });
            });
        });
    }
}
