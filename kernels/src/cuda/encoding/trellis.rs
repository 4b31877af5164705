//! Trellis codes.

use stb_format::encoding::{Trellis, TrellisView};

use super::interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemvCall, GemvKernel, MatrixLayout, PackedView,
    PayloadStart,
};
use super::rows::{RowCodec, row_codec};
use crate::cuda::error::Result;
use crate::cuda::launch::to_u32;
use crate::cuda::module::{Module, header, module};
use crate::cuda::precision::{ActivationPrecision, PrefillPrecision};

/// The codec of each rate: bits and weights of a step.
const CODECS: [((usize, usize), RowCodec); 7] = [
    ((1, 2), row_codec!("trellis 1/2", "codec_trellis.cuh", "Trellis12", piece: 32, q8: true)),
    ((1, 1), row_codec!("trellis 1/1", "codec_trellis.cuh", "Trellis11", piece: 32, q8: true)),
    ((3, 2), row_codec!("trellis 3/2", "codec_trellis.cuh", "Trellis32", piece: 32, q8: true)),
    ((2, 1), row_codec!("trellis 2/1", "codec_trellis.cuh", "Trellis21", piece: 32, q8: true)),
    ((5, 2), row_codec!("trellis 5/2", "codec_trellis.cuh", "Trellis52", piece: 32, q8: true)),
    ((3, 1), row_codec!("trellis 3/1", "codec_trellis.cuh", "Trellis31", piece: 32, q8: true)),
    ((4, 1), row_codec!("trellis 4/1", "codec_trellis.cuh", "Trellis41", piece: 32, q8: true)),
];

/// The bit of `MatrixLayout::kind` for column factors, next to the bits of a block scale.
const COL_FACTORS: u32 = 256;

fn codec(spec: &Trellis) -> Option<&'static RowCodec> {
    let rate = (spec.step_bits(), spec.step_weights());
    CODECS.iter().find(|(known, _)| *known == rate).map(|(_, codec)| codec)
}

impl CudaEncoding for Trellis {
    fn modules() -> Vec<Module> {
        CODECS.iter().flat_map(|(_, codec)| codec.modules()).collect()
    }

    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel> {
        let has_factors = call.matrices.iter().any(|m| m.layout.kind & COL_FACTORS != 0);
        let precision = if has_factors { ActivationPrecision::F32 } else { call.precision };
        codec(self).map(|codec| codec.gemv(GemvCall { precision, ..call }))
    }

    fn dequantize(&self) -> Option<DequantizeKernel> {
        codec(self).map(RowCodec::dequantize)
    }

    fn gemm(&self, _: PrefillPrecision) -> Option<GemmKernels> {
        codec(self).map(RowCodec::gemm)
    }
}

impl PackedView for TrellisView<'_> {
    /// `units` is the number of bytes of a tile, `kind` that of bits of a block scale, plus 256 if there are column
    /// factors, whose place follows from that of the tables.
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout> {
        let factors = if self.spec.has_col_factors() { COL_FACTORS } else { 0 };
        Ok(MatrixLayout {
            segments: [
                payload.offset(self.tables),
                payload.offset(self.row_scales),
                payload.offset(self.block_codes),
                payload.offset(self.streams),
            ],
            block: self.spec.block() as u32,
            units: to_u32("a tile of bytes", self.tile_bytes)?,
            kind: u32::from(self.spec.scale_bits()) | factors,
            ..MatrixLayout::default()
        })
    }
}
