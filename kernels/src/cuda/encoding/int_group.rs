//! Groups of integers of 1, 2, 3, 4 or 8 bits.

use stb_format::encoding::{IntGroup, IntGroupView};

use super::interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemvCall, GemvKernel, MatrixLayout, PackedView,
    PayloadStart,
};
use super::rows::{RowCodec, row_codec};
use crate::cuda::error::Result;
use crate::cuda::module::{Module, header, module};
use crate::cuda::precision::PrefillPrecision;

const INT1: RowCodec = row_codec!("int1", "codec_int_group.cuh", "Int1", piece: 128, q8: true);
const INT2: RowCodec = row_codec!("int2", "codec_int_group.cuh", "Int2", piece: 64, q8: true);
const INT3: RowCodec = row_codec!("int3", "codec_int_group.cuh", "Int3", piece: 64, q8: true);
const INT4: RowCodec = row_codec!("int4", "codec_int_group.cuh", "Int4", piece: 32, q8: true);
const INT8: RowCodec = row_codec!("int8", "codec_int_group.cuh", "Int8", piece: 32, q8: true);

fn codec(spec: &IntGroup) -> Option<&'static RowCodec> {
    Some(match spec.bits() {
        1 => &INT1,
        2 => &INT2,
        3 => &INT3,
        4 => &INT4,
        8 => &INT8,
        _ => return None,
    })
}

impl CudaEncoding for IntGroup {
    fn modules() -> Vec<Module> {
        [INT1, INT2, INT3, INT4, INT8].iter().flat_map(RowCodec::modules).collect()
    }

    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel> {
        codec(self).map(|codec| codec.gemv(call))
    }

    fn dequantize(&self) -> Option<DequantizeKernel> {
        codec(self).map(RowCodec::dequantize)
    }

    fn gemm(&self, _: PrefillPrecision) -> Option<GemmKernels> {
        codec(self).map(RowCodec::gemm)
    }
}

impl PackedView for IntGroupView<'_> {
    /// `units` are the units of 32 columns of a row, with its padding.
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout> {
        let mut layout = MatrixLayout::default();
        layout.segments[0] = payload.offset(self.codes);
        layout.segments[1] = payload.offset(self.scales);
        layout.block = self.spec.group() as u32;
        layout.units = (self.groups() * self.spec.group() / 32) as u32;
        Ok(layout)
    }
}
