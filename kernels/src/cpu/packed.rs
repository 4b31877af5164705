//! The interface of packed matrices.

use crate::cpu::ops::q8::{GemvInput, GemvScratch};
use crate::cpu::ops::q8_batch::{ActivationsQ8, Q8Layout, QuantizeChunk};
use crate::isa::Isa;

/// A matrix with its kernels. Every encoding implements this in a file of its own;
/// [`packed`](crate::packed) finds the implementation for a view.
///
/// The functions of this crate ([`gemv`](crate::gemv) and so on) check their arguments and then call these
/// methods, which may rely on the conditions stated here.
pub trait PackedMatrix: Sync {
    /// Output features.
    fn rows(&self) -> usize;

    /// Input features.
    fn cols(&self) -> usize;

    /// Prepares `x` (one element per column) without rounding.
    ///
    /// # Panics
    /// If `x` has another length.
    fn prepare<'s>(&self, _isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        scratch.set(x, self.cols())
    }

    /// Prepares `x` quantized to 8 bits with one scale per 128 columns. A product then differs from the
    /// exact one by at most Σ_blocks max|x| / 254 · Σ|w|, and by summation in f32. The same as
    /// [`PackedMatrix::prepare`] if there is no kernel for it.
    ///
    /// # Panics
    /// If `x` has another length.
    fn prepare_q8<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut GemvScratch) -> GemvInput<'s> {
        self.prepare(isa, x, scratch)
    }

    /// The layout of prepared activations (quantized, if `q8`). Matrices of the same width and layout share
    /// prepared activations. `None` if no other matrix can use them.
    fn activation_layout(&self, _q8: bool) -> Option<ActivationLayout> {
        Some(ActivationLayout::AS_GIVEN)
    }

    /// `y[r] = Σ_c w[first + r, c] · x[c]` for the rows that `y` has room for. `first` is a multiple of
    /// [`ROW_TILE`](crate::ROW_TILE), and `x` was prepared for a matrix of the same layout and width.
    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]);

    /// [`PackedMatrix::gemv`] for several tokens: `y` holds the rows for the first token, then for the
    /// next.
    fn gemv_batch(&self, isa: Isa, x: &[GemvInput<'_>], first: usize, y: &mut [f32]) {
        let rows = y.len() / x.len();
        for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
            self.gemv(isa, *x, first, y);
        }
    }

    /// The largest batch for which [`gemv_batch`](crate::gemv_batch) is faster than [`gemm`](crate::gemm),
    /// which unpacks the weights. Callers use at most [`GEMV_MAX_BATCH`](crate::GEMV_MAX_BATCH).
    fn gemv_max_batch(&self) -> usize {
        16
    }

    /// Writes the exact weights of a block to `to`, row-major with `block.cols` floats for each row. `to` has
    /// room for rows up to a multiple of [`ROW_TILE`](crate::ROW_TILE). Weights outside the matrix are
    /// unspecified.
    fn unpack(&self, isa: Isa, block: UnpackBlock, to: &mut [f32]);

    /// The GEMM with quantized activations, if the encoding has one.
    fn gemm_q8(&self) -> Option<&dyn PackedGemmQ8> {
        None
    }
}

/// Some rows and columns of a matrix; the columns may reach past the last one.
#[derive(Clone, Copy, Debug)]
pub struct UnpackBlock {
    /// A multiple of [`ROW_TILE`](crate::ROW_TILE).
    pub first_row: usize,
    /// The number of rows.
    pub rows: usize,
    /// A multiple of 128.
    pub first_col: usize,
    /// The number of columns, a multiple of 128.
    pub cols: usize,
}

/// The name of an arrangement of activations, see [`PackedMatrix::activation_layout`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ActivationLayout {
    name: &'static str,
    variant: [usize; 2],
}

impl ActivationLayout {
    /// Activations in the order of columns, not quantized.
    pub const AS_GIVEN: Self = Self { name: "as given", variant: [0; 2] };

    /// A variant of the arrangement of one encoding.
    #[must_use]
    pub const fn new(name: &'static str, variant: [usize; 2]) -> Self {
        Self { name, variant }
    }
}

/// Products of a packed matrix with many tokens that are quantized to 8 bits. Each output has the same bits as that of
/// [`gemv`](crate::gemv) with quantized activations, whatever the number of tokens, the split and the instruction set.
pub trait PackedGemmQ8: PackedMatrix {
    /// The smallest batch for which [`gemm_q8`](crate::gemm_q8) is faster than
    /// [`gemv_batch`](crate::gemv_batch), as measured. GEMM computes whole groups of 8 or 16 tokens and expands
    /// codes first.
    fn min_batch(&self, isa: Isa) -> usize;

    /// The batch size beyond which [`gemm_q8`](crate::gemm_q8) gets no faster per token.
    fn prefill_batch(&self, isa: Isa) -> usize;

    /// The layout of activations for a batch of `tokens`.
    fn layout(&self, isa: Isa, tokens: usize) -> Q8Layout;

    /// Quantizes the activations of a chunk in the layout it was made for, times the column factors of this
    /// matrix.
    fn quantize(&self, isa: Isa, chunk: &mut QuantizeChunk<'_>);

    /// See [`gemm_q8`](crate::gemm_q8): `y` has a piece of the same length, not empty, for each token of
    /// the group.
    fn multiply(
        &self,
        isa: Isa,
        x: &ActivationsQ8,
        group: usize,
        first: usize,
        y: &mut [&mut [f32]],
    );
}
