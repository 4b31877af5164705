//! The host's description of the kernels of one encoding.

use crate::cuda::error::Result;
use crate::cuda::module::Module;
use crate::cuda::precision::{ActivationPrecision, PrefillPrecision};
use bytemuck::{Pod, Zeroable};

/// The CUDA side of one encoding. Each encoding of the format implements this trait for its
/// parameters, in a file of its own. The registry of this folder finds the implementation.
///
/// A method returns `None` where there is no kernel for the parameters.
pub(in crate::cuda) trait CudaEncoding {
    /// All modules with kernels of this encoding.
    fn modules() -> Vec<Module>
    where
        Self: Sized;

    /// The kernel of a GEMV.
    fn gemv(&self, call: GemvCall<'_>) -> Option<GemvKernel>;

    /// The kernel that converts rows to f32.
    fn dequantize(&self) -> Option<DequantizeKernel>;

    /// The kernels of a GEMM with activations in `precision`, or in f16 where the weights do not
    /// allow that precision.
    fn gemm(&self, precision: PrefillPrecision) -> Option<GemmKernels>;
}

/// The payload of a matrix of one encoding, as uploaded. The format's view of the matrix implements this trait.
pub(in crate::cuda) trait PackedView {
    /// The offsets of the segments of the payload, and the parameters that kernels need. The caller fills in
    /// rows and columns.
    ///
    /// # Errors
    /// [`crate::cuda::Error::Unsupported`] for sizes above 2^30.
    fn layout(&self, payload: PayloadStart) -> Result<MatrixLayout>;
}

/// `PackedMatrix` of kernels/cuda/common.cuh: a packed matrix in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MatrixParams {
    /// The address of the payload.
    pub(in crate::cuda) payload: u64,
    pub(in crate::cuda) layout: MatrixLayout,
}

/// The offsets of the segments of a payload. The encoding defines the meaning of all fields but the first
/// three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(in crate::cuda) struct MatrixLayout {
    /// Bytes from the start of the payload to each segment.
    pub segments: [u64; 4],
    /// Output features.
    pub rows: u32,
    /// Input features.
    pub cols: u32,
    /// Units of a row, or bytes of a tile of rows.
    pub units: u32,
    /// Columns that share scales; 0 if none do.
    pub block: u32,
    /// Further parameters of the encoding.
    pub kind: u32,
    /// Zero.
    pub padding: u32,
}

/// The start of a payload in host memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct PayloadStart(usize);

impl PayloadStart {
    pub(in crate::cuda) fn new(payload: &[u8]) -> Self {
        Self(payload.as_ptr().addr())
    }

    /// Bytes from the start of the payload to a segment of it.
    pub(super) fn offset<T>(self, segment: &[T]) -> u64 {
        segment.as_ptr().addr().saturating_sub(self.0) as u64
    }
}

/// A GEMV for which a kernel is looked up.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct GemvCall<'a> {
    /// The matrices of the launch, which share the encoding's modules.
    pub matrices: &'a [MatrixParams],
    /// The precision of activations.
    pub precision: ActivationPrecision,
    /// Tokens that a block multiplies with: 1, 2 or 4.
    pub tokens: usize,
}

/// A GEMV kernel, and how it divides the work. A launch splits the columns into slabs, whose
/// activations (or lookup tables) a block keeps in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct GemvKernel {
    pub module: Module,
    pub name: &'static str,
    /// Rows that a warp computes together.
    pub warp_rows: usize,
    /// Columns that a warp reads in one step.
    pub step_cols: usize,
    /// The columns of a slab are a multiple of this, which divides `step_cols`.
    pub slab_cols: usize,
    /// Bytes of shared memory for that many columns, for all tokens of a block.
    pub slab_bytes: usize,
    /// Bytes of shared memory besides those.
    pub fixed_bytes: usize,
}

/// A kernel that converts rows of a matrix to f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct DequantizeKernel {
    pub module: Module,
    pub name: &'static str,
    /// Columns of a thread.
    pub thread_cols: usize,
}

/// The kernels of a GEMM on tensor cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct GemmKernels {
    pub module: Module,
    /// How activations are prepared.
    pub preparation: Preparation,
    /// Columns of a step. A row of prepared activations is padded to a multiple.
    pub step_cols: usize,
    /// The kernels by rows and tokens of a block, the largest first.
    pub tiles: &'static [GemmTile],
    /// The most blocks that share the columns of one result.
    pub max_splits: usize,
    pub shared: GemmShared,
    /// The units that compute the products, for reports.
    pub units: &'static str,
}

/// How activations are prepared for a GEMM. Products with equal preparations share prepared
/// activations, unless column factors are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Preparation {
    /// The kernel in gemm_prepare.cu.
    pub kernel: &'static str,
    /// Bytes of one number of a prepared row.
    pub element_bytes: usize,
    /// Columns of a group of codes where the order of columns depends on it, else 0.
    pub group: u32,
    /// Whether column factors are applied. Every matrix has its own factors.
    pub has_factors: bool,
}

/// A GEMM kernel: rows and tokens of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct GemmTile {
    pub kernel: &'static str,
    pub rows: usize,
    pub tokens: usize,
}

/// Shared memory of a GEMM kernel, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct GemmShared {
    /// Independent of the tile.
    pub fixed: usize,
    /// Per token of the tile.
    pub per_token: usize,
    /// Per 16 rows of the tile.
    pub per_16_rows: usize,
}

impl GemmShared {
    /// Bytes of a block.
    pub(in crate::cuda) fn bytes(&self, tile: &GemmTile) -> usize {
        self.fixed + tile.tokens * self.per_token + tile.rows / 16 * self.per_16_rows
    }
}
