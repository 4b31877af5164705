//! The STBLLM structure.

mod exact;
mod gemv_q8;

use stb_format::encoding::StbllmView;

use super::row_major;
use crate::cpu::ops::q8::{BLOCK, GemvInput, GemvScratch};
use crate::cpu::packed::{ActivationLayout, PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// Whether there is a kernel for q8 activations. Blocks of weights have to be whole blocks of activations.
fn has_q8(matrix: &StbllmView<'_>) -> bool {
    matrix.spec.block().is_multiple_of(BLOCK)
}

impl PackedMatrix for StbllmView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn prepare_q8<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        if !has_q8(self) {
            return self.prepare(isa, x, scratch);
        }
        scratch.set(x, self.cols);
        let (values, q8) = (&scratch.values, &mut scratch.q8);
        isa.run(gemv_q8::StbllmPrepareQ8 { values, q8 });
        scratch.set_q8()
    }

    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        Some(if q8 && has_q8(self) {
            ActivationLayout::new("stbllm", [0; 2])
        } else {
            ActivationLayout::AS_GIVEN
        })
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        match x.q8 {
            Some(x) => isa.run(gemv_q8::StbllmGemvQ8 { matrix: self, x, first, y }),
            None => row_major::gemv(isa, self, x.values, first, y),
        }
    }

    fn gemv_max_batch(&self) -> usize {
        8
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        row_major::unpack(isa, self, block, to);
    }
}
