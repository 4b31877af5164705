//! Matrices of which some rows are stored a second time with more bits: products with all rows as the coarse encoding
//! has them, whose results are replaced for the listed rows. These are few, so their activations are not quantized,
//! whichever form the coarse encoding uses. Listed rows are stored row by row, so a product may start at any of them.

use std::cell::RefCell;

use stb_format::encoding::{CoarseRowsView, MixedRowsView};

use super::row_major;
use crate::cpu::ops::q8::{GemvInput, GemvScratch};
use crate::cpu::ops::q8_batch::{ActivationsQ8, Q8Layout, QuantizeChunk};
use crate::cpu::packed::{ActivationLayout, PackedGemmQ8, PackedMatrix, UnpackBlock};
use crate::isa::Isa;

/// Listed rows that are computed at a time.
const LISTED: usize = 64;

thread_local! {
    /// Unpacked weights of listed rows, [row][column].
    static UNPACKED: RefCell<Vec<f32>> = RefCell::default();
}

/// The kernels of the coarse rows.
fn coarse<'m>(matrix: &'m MixedRowsView<'_>) -> &'m dyn PackedMatrix {
    match &matrix.coarse {
        CoarseRowsView::IntGroup(view) => view,
        CoarseRowsView::Nm(view) => view,
        CoarseRowsView::Trellis(view) => view,
    }
}

/// Calls `each` for pieces of the list that cover the listed rows among `rows` rows from `first`, with the index of the
/// first entry of the piece and the number of entries, at most [`LISTED`].
fn pieces(
    matrix: &MixedRowsView<'_>,
    first: usize,
    rows: usize,
    mut each: impl FnMut(usize, usize),
) {
    let (from, to) = (matrix.listed_before(first), matrix.listed_before(first + rows));
    for start in (from..to).step_by(LISTED) {
        each(start, (to - start).min(LISTED));
    }
}

/// Replaces the results of the listed rows in `y`, which holds the rows from `first`; `x` is not quantized. If the other
/// results come from activations that were, a result that is not a number stays: an activation that is not finite makes
/// all of them so.
fn replace(
    matrix: &MixedRowsView<'_>,
    isa: Isa,
    x: &[f32],
    (first, quantized): (usize, bool),
    y: &mut [f32],
) {
    pieces(matrix, first, y.len(), |start, count| {
        let mut products = [0.0; LISTED];
        let products = &mut products[..count];
        row_major::gemv(isa, &matrix.fine, x, start, products);
        for (i, product) in products.iter().enumerate() {
            let y = &mut y[matrix.listed_row(start + i) - first];
            if !(quantized && y.is_nan()) {
                *y = *product;
            }
        }
    });
}

impl PackedMatrix for MixedRowsView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn prepare<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        coarse(self).prepare(isa, x, scratch)
    }

    fn prepare_q8<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        coarse(self).prepare_q8(isa, x, scratch)
    }

    /// Quantized batches have the activations themselves, too, which other matrices do not prepare.
    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        if q8 { None } else { coarse(self).activation_layout(false) }
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        coarse(self).gemv(isa, x, first, y);
        replace(self, isa, x.values, (first, x.q8.is_some()), y);
    }

    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        coarse(self).gemv_batch(isa, x, first, y);
        let rows = y.len() / x.len();
        if rows != 0 {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                replace(self, isa, x.values, (first, x.q8.is_some()), y);
            }
        }
    }

    fn gemv_max_batch(&self) -> usize {
        coarse(self).gemv_max_batch()
    }

    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]) {
        coarse(self).unpack(isa, block, to);
        UNPACKED.with_borrow_mut(|lines| {
            lines.resize((LISTED * block.cols).max(lines.len()), 0.0);
            pieces(self, block.first_row, block.rows, |first_row, rows| {
                let listed = UnpackBlock { first_row, rows, ..block };
                row_major::unpack(isa, &self.fine, listed, lines);
                for (i, line) in lines.chunks_exact(block.cols).take(rows).enumerate() {
                    let row = self.listed_row(first_row + i) - block.first_row;
                    to[row * block.cols..][..block.cols].copy_from_slice(line);
                }
            });
        });
    }

    fn gemm_q8(&self) -> Option<&dyn PackedGemmQ8> {
        coarse(self).gemm_q8().map(|_| self as _)
    }
}

/// The kernel of the coarse rows.
///
/// # Panics
/// If they have none: [`PackedMatrix::gemm_q8`] returns none then.
fn coarse_gemm<'m>(matrix: &'m MixedRowsView<'_>) -> &'m dyn PackedGemmQ8 {
    coarse(matrix).gemm_q8().expect("a q8 GEMM of the coarse rows")
}

impl PackedGemmQ8 for MixedRowsView<'_> {
    fn min_batch(&self, isa: Isa) -> usize {
        coarse_gemm(self).min_batch(isa)
    }

    fn prefill_batch(&self, isa: Isa) -> usize {
        coarse_gemm(self).prefill_batch(isa)
    }

    fn layout(&self, isa: Isa, tokens: usize) -> Q8Layout {
        Q8Layout { keep_values: true, ..coarse_gemm(self).layout(isa, tokens) }
    }

    fn quantize(&self, isa: Isa, chunk: &mut QuantizeChunk<'_>) {
        coarse_gemm(self).quantize(isa, chunk);
    }

    fn multiply(
        &self,
        isa: Isa,
        x: &ActivationsQ8,
        group: usize,
        first: usize,
        y: &mut [&mut [f32]],
    ) {
        coarse_gemm(self).multiply(isa, x, group, first, y);
        for (t, y) in y.iter_mut().enumerate() {
            replace(self, isa, x.values(group * x.group + t), (first, true), y);
        }
    }
}
