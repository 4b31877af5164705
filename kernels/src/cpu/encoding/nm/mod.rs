//! N:M sparse signs: positions and signs of a group are one code, the index of a look-up.

mod codes;
mod exact;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
mod gemm_amx;
mod gemm_lut;
mod gemm_q8;
mod gemm_sum_table;
mod gemv_q8;

use stb_format::encoding::NmView;

use super::batch::gemv_shared;
use super::col_factors::multiply_factors;
use crate::cpu::arch::scalar::Scalar;
use crate::cpu::ops::q8::{BLOCK, GemvInput, GemvScratch};
use crate::cpu::packed::{ActivationLayout, PackedGemmQ8, PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// Whether there are kernels for q8 activations. Blocks of weights have to be whole blocks of activations; 0
/// (no blocks) is fine.
fn has_q8(matrix: &NmView<'_>) -> bool {
    matrix.spec.block().is_multiple_of(BLOCK)
}

impl PackedMatrix for NmView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn prepare<'s>(&self, _: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        scratch.set(x, self.cols);
        multiply_factors(Scalar, self.col_factors, &mut scratch.values);
        scratch.input()
    }

    fn prepare_q8<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        if !has_q8(self) {
            return self.prepare(isa, x, scratch);
        }
        scratch.set(x, self.cols);
        let (values, q8) = (&mut scratch.values, &mut scratch.q8);
        isa.run(gemv_q8::NmPrepareQ8 { matrix: self, values, q8 });
        scratch.set_q8()
    }

    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        if !self.col_factors.is_empty() {
            return None;
        }
        Some(if q8 && has_q8(self) {
            ActivationLayout::new("nm", [self.spec.n(), self.spec.m()])
        } else {
            ActivationLayout::AS_GIVEN
        })
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        match x.q8 {
            Some(x) => {
                isa.run(gemv_q8::NmGemvQ8 { matrix: self, x: [x], rows: y.len(), first, y });
            }
            None => isa.run(exact::NmGemv { matrix: self, x: x.values, first, y }),
        }
    }

    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        gemv_shared(
            x,
            y,
            |x, rows, y| isa.run(gemv_q8::NmGemvQ8 { matrix: self, x, rows, first, y }),
            |x, y| self.gemv(isa, x, first, y),
        );
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        isa.run(exact::NmUnpack { matrix: self, block, to });
    }

    fn gemm_q8(&self) -> Option<&dyn PackedGemmQ8> {
        if has_q8(self) { Some(self) } else { None }
    }
}
