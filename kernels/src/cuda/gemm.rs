//! Products with many tokens on tensor cores.

use bytemuck::{Pod, Zeroable};
use stb_format::Encoding;

use super::compile::Module;
use super::device::{Buffer, Device};
use super::launch::{Launch, Limits, to_u32};
use super::matrix::{Matrix, MatrixParams};
use super::{Error, Result};

/// Threads of a block: `GEMM_THREADS` of gemm.cuh.
const THREADS: usize = 256;
/// Columns of a step: `STEP` of gemm.cuh.
const STEP: usize = 128;
/// Steps in shared memory: `STAGES` of gemm.cuh.
const STAGES: usize = 3;

/// `Gemm` of gemm.cuh.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct GemmParams {
    w: MatrixParams,
    x: u64,
    scale: u64,
    y: u64,
    partial: u64,
    arrived: u64,
    tokens: u32,
    stride: u32,
    steps: u32,
    splits: u32,
    add: u32,
    padding: u32,
}

/// `Prepare` of gemm_prepare.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct PrepareParams {
    w: MatrixParams,
    x: u64,
    out: u64,
    scale: u64,
    tokens: u32,
    stride: u32,
}

/// Elements of a row of prepared activations of `cols` columns.
#[must_use]
pub fn gemm_stride(cols: usize) -> usize {
    cols.next_multiple_of(STEP)
}

/// The launch that prepares activations for [`GemmPlan`]: `x`, [tokens, cols] f32, with the column
/// factors of `matrix`, becomes `out`, [tokens, [`gemm_stride`]] f16, times `scale`, `[tokens]` f32, a power of
/// two for each token. All are addresses.
///
/// # Errors
/// [`Error::Unsupported`] for sizes beyond what kernels count to.
pub fn plan_prepare(
    matrix: MatrixParams,
    x: u64,
    out: u64,
    scale: u64,
    tokens: usize,
) -> Result<Launch> {
    let stride = to_u32("a row of activations", gemm_stride(matrix.cols as usize))?;
    let tokens = to_u32("a number of tokens", tokens)?;
    let params = PrepareParams { w: matrix, x, out, scale, tokens, stride };
    let blocks = [tokens as usize, 1, 1];
    Ok(Launch::new(Module::GEMM_PREPARE, "gemm_prepare", blocks, THREADS as u32, 0, &params))
}

/// A kernel: rows and tokens of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    kernel: &'static str,
    rows: usize,
    tokens: usize,
}

const SPARSE: [Shape; 3] = [
    Shape { kernel: "gemm_512x64", rows: 512, tokens: 64 },
    Shape { kernel: "gemm_256x64", rows: 256, tokens: 64 },
    Shape { kernel: "gemm_256x16", rows: 256, tokens: 16 },
];

/// The launch of a product with many tokens, and the memory it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GemmPlan {
    /// The kernel.
    pub launch: Launch,
    /// Floats for the sums of blocks that share their results with others.
    pub partial: usize,
    /// Counters, zero before and after.
    pub arrived: usize,
}

impl GemmPlan {
    /// Whether there is a kernel for the encoding.
    #[must_use]
    pub fn supports(encoding: &Encoding) -> bool {
        module(encoding).is_some()
    }

    /// Plans `y` (+)= `x` · `matrix`ᵀ: `x` and `scale` from [`plan_prepare`], `y` [tokens, rows] f32, all addresses,
    /// `work` those of the partial sums and counters. Differs from the exact product by at most
    /// 2^-11 · Σ|w·x| (activations in f16), and by the order of the sum.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no kernel for the encoding, or for sizes beyond what kernels count to.
    pub fn new(
        limits: Limits,
        encoding: &Encoding,
        matrix: MatrixParams,
        [x, scale, y]: [u64; 3],
        add: bool,
        tokens: usize,
        work: [u64; 2],
    ) -> Result<Self> {
        let Some((module, vectors, table)) = module(encoding) else {
            let why =
                format!("there is no CUDA kernel for many tokens and the encoding {encoding}");
            return Err(Error::Unsupported { why });
        };
        let (rows, cols) = (matrix.rows as usize, matrix.cols as usize);
        let tokens_u32 = to_u32("a number of tokens", tokens)?;
        let shared = |s: &Shape| {
            table + STAGES * (s.tokens * 2 * STEP + s.rows / 16 * (vectors * 64 + 4 * 16))
        };
        let blocks = |s: &Shape| rows.div_ceil(s.rows) * tokens.div_ceil(s.tokens);
        let target = limits.multiprocessors as usize;
        let fits = |s: &&Shape| shared(s) <= limits.shared as usize;
        // The largest that keeps all multiprocessors busy; few tokens take the narrow one.
        let wanted = |s: &&Shape| match s.tokens {
            16 => true,
            _ => tokens > 32 && (s.rows == 256 || blocks(s) >= target),
        };
        let shape = SPARSE.iter().filter(fits).find(wanted).or(SPARSE.last()).expect("kernels");
        let blocks = blocks(shape);
        let all = cols.div_ceil(STEP).max(1);
        // With too few blocks several share the columns, at least four steps each.
        let splits = (target / blocks.max(1)).clamp(1, all.div_ceil(4)).min(32);
        let steps = all.div_ceil(splits);
        let splits = all.div_ceil(steps);
        let (partial, arrived) = match splits {
            1 => (0, 0),
            _ => (blocks * splits * shape.rows * shape.tokens, blocks),
        };
        let params = GemmParams {
            w: matrix,
            x,
            scale,
            y,
            partial: work[0],
            arrived: work[1],
            tokens: tokens_u32,
            stride: to_u32("a row of activations", gemm_stride(cols))?,
            steps: steps as u32,
            splits: splits as u32,
            add: u32::from(add),
            padding: 0,
        };
        let grid = [rows.div_ceil(shape.rows), tokens.div_ceil(shape.tokens), splits];
        let launch =
            Launch::new(module, shape.kernel, grid, THREADS as u32, shared(shape), &params);
        Ok(Self { launch, partial, arrived })
    }
}

/// The module of an encoding, its vectors of 64 bytes per tile and step, the bytes of its table.
fn module(encoding: &Encoding) -> Option<(Module, usize, usize)> {
    let Encoding::Nm(spec) = encoding else { return None };
    match (spec.n(), spec.m()) {
        (1, 8) => Some((Module::GEMM_NM_1_8, 2, 0)),
        (1, 4) => Some((Module::GEMM_NM_1_4, 3, 0)),
        (2, 8) => Some((Module::GEMM_NM_2_8, 4, 1024)),
        (2, 4) => Some((Module::GEMM_NM_2_4, 5, 0)),
        _ => None,
    }
}

/// Products with many tokens on one device, with the memory they need.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    x: Buffer<u16>,
    scale: Buffer<f32>,
    partial: Buffer<f32>,
    arrived: Buffer<u32>,
}

impl Gemm {
    /// Without memory yet.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            x: device.zeros("activations in f16", 0)?,
            scale: device.zeros("scales of activations", 0)?,
            partial: device.zeros("partial sums", 0)?,
            arrived: device.zeros("counters", 0)?,
        })
    }

    /// Queues `out` (+)= `x` · `matrix`ᵀ, `x` [tokens, cols], `out` [tokens, rows]; activations are rounded to f16 as
    /// [`GemmPlan::new`] says.
    ///
    /// Memory grows with the first calls, so a product that is recorded in a graph has to have been computed
    /// before.
    ///
    /// # Errors
    /// As for [`GemmPlan::new`]; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small for `tokens` tokens.
    pub fn queue(
        &mut self,
        matrix: &Matrix,
        x: &Buffer<f32>,
        out: &mut Buffer<f32>,
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        assert!(x.len() >= tokens * cols && out.len() >= tokens * rows, "room for the tokens");
        let plan = |addresses, work| {
            let limits = self.device.limits();
            GemmPlan::new(limits, &matrix.encoding, matrix.params, addresses, add, tokens, work)
        };
        let needed = plan([0; 3], [0; 2])?;
        if tokens * gemm_stride(cols) > self.x.len() {
            self.x = self.device.zeros("activations in f16", tokens * gemm_stride(cols))?;
        }
        if tokens > self.scale.len() {
            self.scale = self.device.zeros("scales of activations", tokens)?;
        }
        if needed.partial > self.partial.len() {
            self.partial = self.device.zeros("partial sums", needed.partial)?;
        }
        if needed.arrived > self.arrived.len() {
            self.arrived = self.device.zeros("counters", needed.arrived)?;
        }
        let (half, scale) = (self.x.address(), self.scale.address());
        let prepare = plan_prepare(matrix.params, x.address(), half, scale, tokens)?;
        // SAFETY: the matrix' payload was validated for its shape; `x` holds the tokens, and the prepared
        // activations and scales have room for them, as checked. All are on the stream of this device.
        unsafe { self.device.launch(&prepare) }?;
        let work = [self.partial.address(), self.arrived.address()];
        let addresses = [half, scale, out.address()];
        let planned =
            GemmPlan::new(self.device.limits(), &matrix.encoding, matrix.params, addresses, add, tokens, work)?;
        // SAFETY: as above; `out` has room for the result, and the partial sums and counters for what the plan
        // needs.
        unsafe { self.device.launch(&planned.launch) }
    }
}
