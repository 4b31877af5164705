//! N:M sparse-sign matrices: lookup tables of activation sums in a GEMV (gemv_nm.cu), 2:4 sparse
//! tensor cores in a GEMM (gemm_nm.cu, gemm_nm_s8.cu).

use stb_format::encoding::{Nm, NmView};

use super::interface::{
    CudaEncoding, DequantizeKernel, GemmKernels, GemmShared, GemmTile, GemvCall, GemvKernel,
    MatrixLayout, MatrixParams, PackedView, PayloadStart, Preparation,
};
use crate::cuda::error::Result;
use crate::cuda::launch::to_u32;
use crate::cuda::module::{Module, NmRate, header, module};
use crate::cuda::precision::PrefillPrecision;

const GEMV: Module = module!("nm", "gemv_nm.cu");
const GEMM_F16: Module = module!("gemm", "gemm_nm.cu"; header!("gemm.cuh"), header!("gemm_nm.cuh"));
const GEMM_S8: Module =
    module!("gemm s8", "gemm_nm_s8.cu"; header!("gemm.cuh"), header!("gemm_nm.cuh"));

/// Rows of a tile of the format.
const TILE_ROWS: usize = 16;
/// `STEP`, `Q8_COLS` and `STAGES` of gemm.cuh.
const STEP: usize = 128;
const Q8_COLS: usize = 2 * STEP;
const STAGES: usize = 3;
/// The bits of `MatrixLayout::kind` with the bits of a block scale, and the one for column factors.
const SCALE_BITS: u32 = 255;
const COL_FACTORS: u32 = 256;

/// The kernels of both GEMM sources.
const TILES: [GemmTile; 3] = [
    GemmTile { kernel: "gemm_512x64", rows: 512, tokens: 64 },
    GemmTile { kernel: "gemm_256x64", rows: 256, tokens: 64 },
    GemmTile { kernel: "gemm_256x16", rows: 256, tokens: 16 },
];

/// The rate, if the kernels support it.
fn rate(spec: &Nm) -> Option<NmRate> {
    let is_supported = matches!(spec.n(), 1 | 2) && matches!(spec.m(), 4 | 8);
    let rate = || NmRate { n: spec.n() as u8, m: spec.m() as u8 };
    is_supported.then(rate)
}

/// All rates of the format that the kernels support.
fn rates() -> impl Iterator<Item = NmRate> {
    let pairs = [8, 4].into_iter().flat_map(|m| [1, 2].map(|n| (n, m)));
    pairs.filter_map(|(n, m)| rate(&Nm::new(n, m, 0, 0, false)?))
}

/// The constants of gemv_nm.cu that the host plans with.
struct GemvTables {
    /// `STEP`: columns that a lane reads as one vector of codes.
    lane_cols: usize,
    /// `TABLE`: bytes of a lookup table of a warp for one token.
    table_bytes: usize,
    /// `LOOKS`: tables for the columns of a vector.
    tables: usize,
}

impl GemvTables {
    fn new(spec: &Nm) -> Self {
        let bits = spec.code_bits();
        // The widest plane of a code, and the quads whose codes it holds in a vector.
        let quads = if bits >= 4 { 2 } else { 4 };
        // Two codes of 1:4 are looked up together; the sign of 2:8 is not part of the table.
        let pair = if bits == 3 { 2 } else { 1 };
        let index_bits = if bits == 7 { bits - 1 } else { pair * bits };
        Self {
            lane_cols: quads * 4 * spec.m(),
            table_bytes: (1 << index_bits) * 32 * size_of::<f32>(),
            tables: quads / pair as usize,
        }
    }
}

/// Whether a matrix has block scales.
fn has_block_scales(matrix: &MatrixParams) -> bool {
    matrix.layout.kind & SCALE_BITS != 0
}

impl CudaEncoding for Nm {
    fn modules() -> Vec<Module> {
        let modules = [GEMV, GEMM_F16, GEMM_S8].into_iter();
        modules.flat_map(|module| rates().map(move |rate| module.at_rate(rate))).collect()
    }

    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel> {
        let rate = rate(self)?;
        let GemvTables { lane_cols, table_bytes, tables } = GemvTables::new(self);
        // `vectors_of` of gemv_nm.cu: for one token a lane reads two vectors in a step.
        let vectors = if call.tokens == 1 { 2 } else { 1 };
        // Eight groups of four lanes read different columns.
        let step_cols = 8 * lane_cols * vectors;
        let is_scaled = call.matrices.iter().any(has_block_scales);
        Some(GemvKernel {
            module: GEMV.at_rate(rate),
            name: match (is_scaled, call.tokens) {
                (false, 1) => "gemv_f32_1",
                (false, 2) => "gemv_f32_2",
                (false, _) => "gemv_f32_4",
                (true, 1) => "gemv_scaled_1",
                (true, 2) => "gemv_scaled_2",
                (true, _) => "gemv_scaled_4",
            },
            warp_rows: TILE_ROWS,
            step_cols,
            slab_cols: step_cols,
            slab_bytes: vectors * tables * table_bytes * call.tokens,
            // Tables of one token begin at a multiple of their size.
            fixed_bytes: if call.tokens == 1 { table_bytes } else { 0 },
        })
    }

    fn dequantize(&self) -> Option<DequantizeKernel> {
        let module = GEMV.at_rate(rate(self)?);
        Some(DequantizeKernel { module, name: "dequantize_rows", thread_cols: self.m() })
    }

    fn gemm(&self, precision: PrefillPrecision) -> Option<GemmKernels> {
        let rate = rate(self)?;
        // `VECTORS` of gemm_nm.cuh: vectors of 64 bytes of codes for a tile and 128 columns.
        let vectors = match (self.n(), self.m()) {
            (_, 4) => self.code_bits() as usize,
            (1, _) => 2,
            _ => 4,
        };
        // `TABLE` of gemm_nm.cuh, in bytes.
        let table = if self.code_bits() == 7 { 1024 } else { 0 };
        // Scale codes of 8 bits make weights of up to ±256 units, which do not fit 8 bits.
        let is_int8 = precision == PrefillPrecision::Int8 && self.scale_bits() <= 4;
        let has_factors = self.has_col_factors();
        let (module, preparation) = if is_int8 {
            let (kernel, group) = ("gemm_prepare_q8", self.m() as u32);
            (GEMM_S8, Preparation { kernel, element_bytes: 1, group, has_factors })
        } else {
            let kernel = "gemm_prepare_f16";
            (GEMM_F16, Preparation { kernel, element_bytes: 2, group: 0, has_factors })
        };
        // Bytes of a stage: activations (with their scales), codes and scale codes.
        let (per_token, per_16_rows) = match is_int8 {
            true => (256 + 4, 2 * (vectors * 64 + 4 * 8)),
            false => (256, vectors * 64 + 4 * 16),
        };
        Some(GemmKernels {
            module: module.at_rate(rate),
            preparation,
            step_cols: if is_int8 { Q8_COLS } else { STEP },
            tiles: &TILES,
            max_splits: 32,
            shared: GemmShared {
                fixed: table,
                per_token: STAGES * per_token,
                per_16_rows: STAGES * per_16_rows,
            },
            units: "2:4 sparse tensor cores",
        })
    }
}

impl PackedView for NmView<'_> {
    /// `units` are the bytes of the codes of a tile; `kind` is the bits of a block scale, plus 256
    /// if there are column factors.
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout> {
        let factors = if self.spec.has_col_factors() { COL_FACTORS } else { 0 };
        Ok(MatrixLayout {
            segments: [
                payload.offset(self.col_factors),
                payload.offset(self.row_scales),
                payload.offset(self.block_codes),
                payload.offset(self.codes),
            ],
            units: to_u32("a tile of bytes", self.tile_bytes)?,
            block: self.spec.block() as u32,
            kind: u32::from(self.spec.scale_bits()) | factors,
            ..MatrixLayout::default()
        })
    }
}
