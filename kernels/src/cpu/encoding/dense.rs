//! Floating-point weights: exact products only.

use std::ops::Range;

use stb_format::encoding::{Dense, DenseView};

use super::row_major::{self, RowMajor, STEP, bytes};
use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8::GemvInput;
use crate::cpu::packed::{PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// A matrix of floats in memory, [rows, cols] row-major.
///
/// # Panics
/// Unless `values` has `rows` × `cols` elements.
#[must_use]
pub fn dense(values: &[f32], rows: usize, cols: usize) -> DenseView<'_> {
    let view = DenseView::new(Dense::F32, rows as u64, cols as u64, bytemuck::cast_slice(values));
    view.expect("rows × cols values")
}

impl PackedMatrix for DenseView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        row_major::gemv(isa, self, x.values, first, y);
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        row_major::unpack(isa, self, block, to);
    }
}

impl RowMajor for DenseView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let data = self.row_bytes(row);
        for col in cols.step_by(STEP) {
            let mut w = [s.splat(0.0); 4];
            for (k, w) in w.iter_mut().enumerate() {
                let at = col + 16 * k;
                *w = match self.kind {
                    Dense::F32 => s.load_bytes(bytes(data, at * 4, &mut [0; 64])),
                    Dense::F16 => s.f16_to_f32(bytes(data, at * 2, &mut [0; 32])),
                    Dense::Bf16 => {
                        s.cast_f(s.shl(s.widen_u16(bytes(data, at * 2, &mut [0; 32])), 16))
                    }
                };
            }
            sink(col, w);
        }
    }
}
