//! Encodings whose kernels read a matrix row by row through a codec: `codec.cuh` says what a codec
//! provides, gemv.cu and gemm_rows.cu use it.

use crate::cuda::encoding::interface::{
    DequantizeKernel, GemmKernels, GemmShared, GemmTile, GemvCall, GemvKernel, Preparation,
};
use crate::cuda::module::Module;
use crate::cuda::precision::ActivationPrecision;

/// Columns of a unit of activations in 8 bits, which share a scale.
const Q8_COLS: usize = 32;
/// `STEP` of gemm.cuh.
const STEP: usize = 128;
/// Rows and tokens of a block of gemm_rows.cu.
const TILE: GemmTile = GemmTile { kernel: "gemm_rows", rows: 64, tokens: 64 };

/// The modules of a codec.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowCodec {
    /// gemv.cu with the codec.
    pub gemv: Module,
    /// gemm_rows.cu with the codec.
    pub gemm: Module,
    /// `PIECE` of the codec: columns that a lane reads at a time.
    pub piece: usize,
    /// `HAS_Q8` of the codec: whether it multiplies activations in 8 bits.
    pub has_q8: bool,
}

/// The two modules of a codec, a struct of `header` in kernels/cuda.
macro_rules! row_codec {
    ($label:literal, $header:literal, $codec:literal, piece: $piece:literal, q8: $q8:literal) => {
        $crate::cuda::encoding::rows::RowCodec {
            gemv: module!(
                $label, "gemv.cu",
                concat!("CODEC_HEADER=\"", $header, "\""), concat!("CODEC=", $codec);
                header!("codec.cuh"), header!($header)
            ),
            gemm: module!(
                concat!("gemm ", $label), "gemm_rows.cu",
                concat!("CODEC_HEADER=\"", $header, "\""), concat!("CODEC=", $codec);
                header!("codec.cuh"), header!("gemm.cuh"), header!($header)
            ),
            piece: $piece,
            has_q8: $q8,
        }
    };
}
pub(super) use row_codec;

impl RowCodec {
    /// Both modules.
    pub(super) fn modules(&self) -> [Module; 2] {
        [self.gemv, self.gemm]
    }

    /// See [`super::interface::CudaEncoding::gemv`].
    pub(super) fn gemv(&self, call: GemvCall<'_>) -> GemvKernel {
        let is_q8 = call.precision == ActivationPrecision::Q8 && self.has_q8;
        let piece = self.piece;
        // A slab is whole pieces, and whole units of activations in 8 bits.
        let slab_cols = piece.max(Q8_COLS);
        // Words of a piece, padded so that the lanes of a quarter-warp read different banks.
        let words = if is_q8 { piece / 4 } else { piece };
        let padding = if piece == 4 && !is_q8 { 0 } else { 4 };
        // The scale and the scaled sum of a unit.
        let scales = if is_q8 { slab_cols / Q8_COLS * 8 } else { 0 };
        GemvKernel {
            module: self.gemv,
            name: match (is_q8, call.tokens) {
                (false, 1) => "gemv_f32_1",
                (false, 2) => "gemv_f32_2",
                (false, _) => "gemv_f32_4",
                (true, 1) => "gemv_q8_1",
                (true, 2) => "gemv_q8_2",
                (true, _) => "gemv_q8_4",
            },
            // `rows_at_once` of gemv.cu.
            warp_rows: if call.tokens == 1 { 4 } else { 2 },
            step_cols: 32 * piece,
            slab_cols,
            slab_bytes: call.tokens * (slab_cols / piece * (words + padding) * 4 + scales),
            fixed_bytes: 0,
        }
    }

    /// See [`super::interface::CudaEncoding::dequantize`].
    pub(super) fn dequantize(&self) -> DequantizeKernel {
        DequantizeKernel { module: self.gemv, name: "dequantize_rows", thread_cols: self.piece }
    }

    /// See [`super::interface::CudaEncoding::gemm`].
    pub(super) fn gemm(&self) -> GemmKernels {
        GemmKernels {
            module: self.gemm,
            preparation: Preparation {
                kernel: "gemm_prepare_bf16x2",
                element_bytes: 2,
                group: 0,
                has_factors: false,
            },
            step_cols: STEP,
            tiles: &[TILE],
            max_splits: 1,
            // Rows and tokens as two bf16 for each number.
            shared: GemmShared { fixed: 4 * TILE.rows * 2 * STEP, per_token: 0, per_16_rows: 0 },
            units: "dense tensor cores",
        }
    }
}
