//! Trellis codes: windows of a bit stream are looked up in tables. 64 windows of 16 rows × 4 columns are one vector, in
//! which the four columns of a row are neighbors, as dot products of bytes take them.

mod exact;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
mod gemm_amx;
mod gemm_lanes;
mod gemm_q8;
mod gemv_q8;
mod levels;

use stb_format::encoding::TrellisView;

use super::batch::gemv_shared;
use crate::cpu::ops::q8::{BLOCK, GemvInput, GemvScratch};
use crate::cpu::packed::{ActivationLayout, PackedGemmQ8, PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// Whether there are kernels for q8 activations. Blocks of weights have to be whole blocks of activations; 0
/// (no blocks) is fine.
fn has_q8(matrix: &TrellisView<'_>) -> bool {
    matrix.spec.block().is_multiple_of(BLOCK)
}

impl PackedMatrix for TrellisView<'_> {
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
        let GemvScratch { values, scaled, q8, .. } = scratch;
        isa.run(gemv_q8::TrellisPrepareQ8 { matrix: self, values, scaled, q8 });
        scratch.set_q8()
    }

    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        match q8 && has_q8(self) {
            true if !self.col_factors.is_empty() => None,
            true => Some(ActivationLayout::new("trellis", [0; 2])),
            // The exact kernel applies the factors itself.
            false => Some(ActivationLayout::AS_GIVEN),
        }
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        match x.q8 {
            Some(x) => {
                isa.run(gemv_q8::TrellisGemvQ8 { matrix: self, x: [x], rows: y.len(), first, y });
            }
            None => isa.run(exact::TrellisGemv { matrix: self, x: x.values, first, y }),
        }
    }

    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        gemv_shared(
            x,
            y,
            |x, rows, y| isa.run(gemv_q8::TrellisGemvQ8 { matrix: self, x, rows, first, y }),
            |x, y| self.gemv(isa, x, first, y),
        );
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        isa.run(exact::TrellisUnpack { matrix: self, block, to });
    }

    fn gemm_q8(&self) -> Option<&dyn PackedGemmQ8> {
        if has_q8(self) { Some(self) } else { None }
    }
}
