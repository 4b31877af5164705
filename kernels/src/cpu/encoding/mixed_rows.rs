//! Matrices of which some rows are stored a second time with more bits: products with all rows as the coarse encoding
//! has them, whose results are replaced for the listed rows. These are few, so their activations are not quantized,
//! whichever form the coarse encoding uses.

use std::cell::RefCell;

use stb_format::encoding::{CoarseRowsView, MixedRowsView};

use crate::cpu::ops::q8::{GemvInput, GemvScratch};
use crate::cpu::packed::{ActivationLayout, PackedMatrix, UnpackBlock};
use crate::cpu::products::ROW_TILE;
use crate::isa::Isa;

/// Listed rows that are computed at a time.
const LISTED: usize = 4 * ROW_TILE;

thread_local! {
    /// Unpacked weights of listed rows, [row][column].
    static UNPACKED: RefCell<Vec<f32>> = RefCell::default();
}

/// The kernels of the coarse rows.
fn coarse<'m>(matrix: &'m MixedRowsView<'_>) -> &'m dyn PackedMatrix {
    match &matrix.coarse {
        CoarseRowsView::IntGroup(view) => view,
        CoarseRowsView::Nm(view) => view,
    }
}

/// Calls `each` for pieces of the list that cover the listed rows among `rows` rows from `first`, with the index of the
/// first entry of the piece, a multiple of [`ROW_TILE`], and the number of entries. The first and the last piece may
/// have rows outside.
fn pieces(
    matrix: &MixedRowsView<'_>,
    first: usize,
    rows: usize,
    mut each: impl FnMut(usize, usize),
) {
    let (from, to) = (matrix.listed_before(first), matrix.listed_before(first + rows));
    if from == to {
        return;
    }
    for start in (from / ROW_TILE * ROW_TILE..to).step_by(LISTED) {
        each(start, (to - start).min(LISTED));
    }
}

/// Replaces the results of the listed rows in `y`, which holds the rows from `first`. A result that is not a number
/// stays: with quantized activations, one that is not finite makes all results so.
fn replace(matrix: &MixedRowsView<'_>, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
    let quantized = x.q8.is_some();
    let x = GemvInput { q8: None, ..x };
    pieces(matrix, first, y.len(), |start, count| {
        let mut products = [0.0; LISTED];
        let products = &mut products[..count];
        PackedMatrix::gemv(&matrix.fine, isa, x, start, products);
        for (i, product) in products.iter().enumerate() {
            // An entry below `first` wraps around and is outside too.
            match y.get_mut(matrix.listed_row(start + i).wrapping_sub(first)) {
                Some(y) if !(quantized && y.is_nan()) => *y = *product,
                _ => {}
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

    fn activation_layout(&self, q8: bool) -> Option<ActivationLayout> {
        coarse(self).activation_layout(q8)
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        coarse(self).gemv(isa, x, first, y);
        replace(self, isa, x, first, y);
    }

    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        coarse(self).gemv_batch(isa, x, first, y);
        let rows = y.len() / x.len();
        if rows != 0 {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                replace(self, isa, *x, first, y);
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
                PackedMatrix::unpack(&self.fine, isa, listed, lines);
                for (i, line) in lines.chunks_exact(block.cols).take(rows).enumerate() {
                    let row = self.listed_row(first_row + i).wrapping_sub(block.first_row);
                    if row < block.rows {
                        to[row * block.cols..][..block.cols].copy_from_slice(line);
                    }
                }
            });
        });
    }
}
