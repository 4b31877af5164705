//! Dense matrices: f32, f16 and bf16.

use stb_format::encoding::{Dense, DenseView};

use super::interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemvCall, GemvKernel, MatrixLayout, PackedView,
    PayloadStart,
};
use super::rows::{RowCodec, row_codec};
use crate::cuda::error::Result;
use crate::cuda::module::{Module, header, module};
use crate::cuda::precision::PrefillPrecision;

const F32: RowCodec = row_codec!("f32", "codec_dense.cuh", "DenseF32", piece: 4, q8: false);
const F16: RowCodec = row_codec!("f16", "codec_dense.cuh", "DenseF16", piece: 8, q8: false);
const BF16: RowCodec = row_codec!("bf16", "codec_dense.cuh", "DenseBf16", piece: 8, q8: false);

fn codec(spec: Dense) -> &'static RowCodec {
    match spec {
        Dense::F32 => &F32,
        Dense::F16 => &F16,
        Dense::Bf16 => &BF16,
    }
}

impl CudaEncoding for Dense {
    fn modules() -> Vec<Module> {
        [F32, F16, BF16].iter().flat_map(RowCodec::modules).collect()
    }

    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel> {
        Some(codec(*self).gemv(call))
    }

    fn dequantize(&self) -> Option<DequantizeKernel> {
        Some(codec(*self).dequantize())
    }

    fn gemm(&self, _: PrefillPrecision) -> Option<GemmKernels> {
        Some(codec(*self).gemm())
    }
}

impl PackedView for DenseView<'_> {
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout> {
        let mut layout = MatrixLayout::default();
        layout.segments[0] = payload.offset(self.data);
        Ok(layout)
    }
}
