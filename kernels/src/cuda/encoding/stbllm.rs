//! The structure of STBLLM: N:8 masks with salient columns.

use stb_format::encoding::{Stbllm, StbllmView};

use super::interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemvCall, GemvKernel, MatrixLayout, PackedView,
    PayloadStart,
};
use super::rows::{RowCodec, row_codec};
use crate::cuda::error::Result;
use crate::cuda::module::{Module, header, module};
use crate::cuda::precision::PrefillPrecision;

const CODEC: RowCodec = row_codec!("stbllm", "codec_stbllm.cuh", "Stbllm", piece: 64, q8: true);

impl CudaEncoding for Stbllm {
    fn modules() -> Vec<Module> {
        CODEC.modules().to_vec()
    }

    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel> {
        Some(CODEC.gemv(call))
    }

    fn dequantize(&self) -> Option<DequantizeKernel> {
        Some(CODEC.dequantize())
    }

    fn gemm(&self, _: PrefillPrecision) -> Option<GemmKernels> {
        Some(CODEC.gemm())
    }
}

impl PackedView for StbllmView<'_> {
    /// `units` are the units of 64 columns of a row; `kind` is N.
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout> {
        Ok(MatrixLayout {
            segments: [
                payload.offset(self.salient),
                payload.offset(self.states),
                payload.offset(self.signs),
                payload.offset(self.scales),
            ],
            units: self.units() as u32,
            block: self.spec.block() as u32,
            kind: self.spec.n() as u32,
            ..MatrixLayout::default()
        })
    }
}
