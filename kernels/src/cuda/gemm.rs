//! GEMM: products of packed matrices with many tokens on tensor cores.

use bytemuck::{Pod, Zeroable};
use stb_format::Encoding;

use super::activations::ActivationOps;
use super::device::{Buffer, Device};
use super::encoding::{self, GemmKernels, GemmTile, MatrixParams, MatrixPart, Preparation};
use super::error::{Error, Result};
use super::input::ActivationInput;
use super::launch::{
    DeviceLimits, Launch, LaunchShape, ScratchAddresses, ScratchSize, check_grid_y, to_u32,
};
use super::matrix::Matrix;
use super::mixed_rows::ListedScratch;
use super::module::{Module, header, module};
use super::precision::PrefillPrecision;
use super::scratch::SplitScratch;

/// The kernels that prepare activations.
pub(super) const PREPARE: Module =
    module!("gemm activations", "gemm_prepare.cu"; header!("gemm.cuh"));

/// Threads of a block: `GEMM_THREADS` of gemm.cuh.
const THREADS: usize = 256;
/// Columns of a step with activations of 16 bits: `STEP` of gemm.cuh.
const STEP: usize = 128;
/// Columns of a token that share a scale in 8 bits: `Q8_COLS` of gemm.cuh.
const Q8_COLS: usize = 2 * STEP;
/// The fewest columns of a split.
const SPLIT_COLS: usize = 512;
/// The most tokens for which the smallest kernel is used.
const SMALL_BATCH: usize = 32;

/// `GemmParams` of gemm.cuh.
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

/// `PrepareParams` of gemm_prepare.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct PrepareParams {
    w: MatrixParams,
    x: u64,
    out: u64,
    scale: u64,
    tokens: u32,
    stride: u32,
    group: u32,
    padding: u32,
}

/// A GEMM: a matrix, the number of tokens, and the requested precision.
#[derive(Clone, Copy, Debug)]
pub struct GemmProblem<'a> {
    /// The encoding of the matrix.
    pub encoding: &'a Encoding,
    /// The matrix.
    pub matrix: MatrixParams,
    /// Tokens.
    pub tokens: usize,
    /// The precision of activations.
    pub precision: PrefillPrecision,
}

/// The addresses of a GEMM.
#[derive(Clone, Copy, Debug, Default)]
pub struct GemmAddresses {
    /// Prepared activations.
    pub x: u64,
    /// Their scales.
    pub scale: u64,
    /// The result, [tokens, rows] f32.
    pub y: u64,
}

impl GemmProblem<'_> {
    fn kernels(&self) -> Result<GemmKernels> {
        kernels(self.encoding, self.precision).ok_or_else(|| Error::Unsupported {
            why: format!(
                "there is no CUDA kernel for many tokens and the encoding {}",
                self.encoding
            ),
        })
    }

    /// The length of a row of prepared activations, in units of 16 bits.
    fn stride(&self, kernels: &GemmKernels) -> Result<u32> {
        let cols = self.matrix.cols().next_multiple_of(kernels.step_cols);
        to_u32("a row of activations", cols * kernels.preparation.element_bytes / 2)
    }
}

/// The kernels of an encoding; `None` if it has none.
fn kernels(encoding: &Encoding, precision: PrefillPrecision) -> Option<GemmKernels> {
    encoding::of(encoding).ok()?.gemm(precision)
}

/// The units that compute the GEMM of matrices of an encoding (of mixed rows, of all of them); `None` if there is no
/// kernel for it.
#[must_use]
pub fn gemm_units(encoding: &Encoding) -> Option<&'static str> {
    kernels(&encoding::of_all_rows(encoding), PrefillPrecision::F16).map(|kernels| kernels.units)
}

/// The most 16-bit words that [`plan_prepare`] writes.
#[must_use]
pub fn gemm_prepared(cols: usize, tokens: usize) -> usize {
    2 * tokens * cols.next_multiple_of(STEP)
}

/// The most scales that [`plan_prepare`] writes.
#[must_use]
pub fn gemm_scales(cols: usize, tokens: usize) -> usize {
    tokens * cols.div_ceil(Q8_COLS).max(1)
}

/// Plans the preparation of activations, `x`, [tokens, cols] f32, for [`GemmPlan`]. `out` has room
/// for [`gemm_prepared`] words of 16 bits, `scale` for [`gemm_scales`] floats; all are addresses. The
/// two kernels agree on the content. For N:M encodings it is the activations times the column
/// factors of the matrix: f16 times a power of two for each token, or 8-bit integers times a scale.
/// For other encodings every activation is the sum of two bf16.
///
/// # Errors
/// [`Error::Unsupported`] for encodings without a kernel and sizes above 2^30.
pub fn plan_prepare(problem: GemmProblem<'_>, x: u64, out: u64, scale: u64) -> Result<Launch> {
    let kernels = problem.kernels()?;
    let Preparation { kernel, group, .. } = kernels.preparation;
    let stride = problem.stride(&kernels)?;
    let tokens = to_u32("a number of tokens", problem.tokens)?;
    let w = problem.matrix;
    let params = PrepareParams { w, x, out, scale, tokens, stride, group, padding: 0 };
    let blocks = [tokens as usize, 1, 1];
    let shape = LaunchShape { blocks, threads: THREADS as u32, shared: 0 };
    Ok(Launch::new(PREPARE, kernel, shape, &params))
}

/// The launch of a GEMM, and the scratch memory that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GemmPlan {
    /// The launch.
    pub launch: Launch,
    /// The scratch memory.
    pub scratch: ScratchSize,
}

/// How a GEMM is divided among blocks.
#[derive(Clone, Copy, Debug)]
struct GemmSplit {
    tile: GemmTile,
    /// Blocks of the grid in x, y and z; z are the splits of the columns.
    grid: [usize; 3],
    /// Steps of a split.
    steps: usize,
}

impl GemmSplit {
    fn new(limits: DeviceLimits, problem: &GemmProblem<'_>, kernels: &GemmKernels) -> Self {
        let (rows, cols, tokens) = (problem.matrix.rows(), problem.matrix.cols(), problem.tokens);
        let blocks = |tile: &GemmTile| rows.div_ceil(tile.rows) * tokens.div_ceil(tile.tokens);
        let target = limits.multiprocessors as usize;
        // The largest tile that keeps all multiprocessors busy. The last but one is used whatever
        // the number of blocks, the last for small batches.
        let last = kernels.tiles.len() - 1;
        let larger = kernels.tiles[..last].iter().enumerate();
        let tile = larger
            .filter(|(_, tile)| kernels.shared.bytes(tile) <= limits.shared as usize)
            .find(|(i, tile)| tokens > SMALL_BATCH && (i + 1 == last || blocks(tile) >= target))
            .map_or(kernels.tiles[last], |(_, tile)| *tile);
        // With too few blocks several share the columns.
        let all = cols.div_ceil(kernels.step_cols).max(1);
        let most = all.div_ceil(SPLIT_COLS / kernels.step_cols);
        let splits = (target / blocks(&tile).max(1)).clamp(1, most).min(kernels.max_splits);
        let steps = all.div_ceil(splits);
        let grid = [rows.div_ceil(tile.rows), tokens.div_ceil(tile.tokens), all.div_ceil(steps)];
        Self { tile, grid, steps }
    }

    fn scratch(&self) -> ScratchSize {
        let [x, y, splits] = self.grid;
        match splits {
            1 => ScratchSize::default(),
            _ => ScratchSize {
                partial: x * y * splits * self.tile.rows * self.tile.tokens,
                arrived: x * y,
            },
        }
    }
}

impl GemmPlan {
    /// Whether there is a kernel for the encoding.
    #[must_use]
    pub fn supports(encoding: &Encoding) -> bool {
        gemm_units(encoding).is_some()
    }

    /// Plans `y` (+)= `x` · matrixᵀ: `x` and `scale` from [`plan_prepare`] of the same problem. The
    /// result differs from the exact product by the order of the sum and by at most
    /// 2^-11 · Σ|w·x| (N:M encodings, activations in f16), Σ|w| · max|x| / 254 over each 256 columns
    /// (N:M encodings, activations in 8 bits; x times the column factors, w without), or
    /// 2^-14 · Σ|w·x| (other encodings).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no kernel for the encoding, or for sizes above 2^30.
    pub fn new(
        limits: DeviceLimits,
        problem: GemmProblem<'_>,
        at: GemmAddresses,
        add: bool,
        scratch: ScratchAddresses,
    ) -> Result<Self> {
        let kernels = problem.kernels()?;
        let tokens = to_u32("a number of tokens", problem.tokens)?;
        let split = GemmSplit::new(limits, &problem, &kernels);
        let params = GemmParams {
            w: problem.matrix,
            x: at.x,
            scale: at.scale,
            y: at.y,
            partial: scratch.partial,
            arrived: scratch.arrived,
            tokens,
            stride: problem.stride(&kernels)?,
            steps: split.steps as u32,
            splits: split.grid[2] as u32,
            add: u32::from(add),
            padding: 0,
        };
        check_grid_y(split.grid[1], problem.tokens, "tokens")?;
        let shared = kernels.shared.bytes(&split.tile);
        let shape = LaunchShape { blocks: split.grid, threads: THREADS as u32, shared };
        let launch = Launch::new(kernels.module, split.tile.kernel, shape, &params);
        Ok(Self { launch, scratch: split.scratch() })
    }
}

/// GEMM on one device, with its memory.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    precision: PrefillPrecision,
    ops: ActivationOps,
    input: Buffer<f32>,
    x: Buffer<u16>,
    scale: Buffer<f32>,
    /// How `x` and `scale` were prepared, for the next matrix of the same input.
    prepared: Option<Preparation>,
    scratch: SplitScratch,
    listed: ListedScratch,
}

impl Gemm {
    /// A GEMM without memory yet, with activations in f16.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            precision: PrefillPrecision::default(),
            ops: ActivationOps::new(device),
            input: device.zeros("activations", 0)?,
            x: device.zeros("activations for tensor cores", 0)?,
            scale: device.zeros("scales of activations", 0)?,
            prepared: None,
            scratch: SplitScratch::new(device)?,
            listed: ListedScratch::new(device)?,
        })
    }

    /// This GEMM with activations in `precision`, for matrices of N:M encodings.
    #[must_use]
    pub fn with_precision(self, precision: PrefillPrecision) -> Self {
        Self { precision, ..self }
    }

    /// Queues `out[i]` (+)= `input` · `matrices[i]`ᵀ, `out[i]` [tokens, rows]. [`GemmPlan::new`] says
    /// how exact the result is.
    ///
    /// The first calls allocate memory. A GEMM has to run once before it is recorded in a graph.
    ///
    /// # Errors
    /// As for [`GemmPlan::new`]; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small for `tokens` tokens, or matrices have different widths.
    pub fn queue(
        &mut self,
        matrices: &[&Matrix],
        input: ActivationInput<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        assert!(matrices.len() == out.len() && !matrices.is_empty(), "an output per matrix");
        let cols = matrices[0].cols();
        input.check(cols, tokens);
        let x = match input {
            ActivationInput::Plain(x) => x.address(),
            _ => {
                if tokens * cols > self.input.len() {
                    self.input = self.device.zeros("activations", tokens * cols)?;
                }
                self.ops.compute(input, &mut self.input, cols, tokens)?;
                self.input.address()
            }
        };
        self.prepared = None;
        for (matrix, out) in matrices.iter().zip(out) {
            assert_eq!(matrix.cols(), cols, "matrices of one input");
            assert!(out.len() >= tokens * matrix.rows(), "room for the result");
            let listed = self.listed.begin(matrix, out, add, tokens)?;
            self.queue_part(matrix.all(), x, out.address(), add, tokens)?;
            if let Some(product) = listed {
                self.queue_part(product.part, x, product.values, add, tokens)?;
                self.listed.finish(&product)?;
            }
        }
        Ok(())
    }

    /// Queues the product of rows of one encoding with the activations at `x`, whose result has room at `out`.
    fn queue_part(
        &mut self,
        part: &MatrixPart,
        x: u64,
        out: u64,
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        let MatrixPart { encoding, params: matrix } = part;
        let problem = GemmProblem { encoding, matrix: *matrix, tokens, precision: self.precision };
        // Every matrix has its own column factors.
        let preparation = problem.kernels()?.preparation;
        if preparation.has_factors || self.prepared != Some(preparation) {
            self.prepare(problem, x)?;
        }
        self.prepared = Some(preparation);
        self.multiply(problem, out, add)
    }

    /// Prepares the activations at `x`, [tokens, columns of the matrix].
    fn prepare(&mut self, problem: GemmProblem<'_>, x: u64) -> Result<()> {
        let (cols, tokens) = (problem.matrix.cols(), problem.tokens);
        let elements = gemm_prepared(cols, tokens);
        if elements > self.x.len() {
            self.x = self.device.zeros("activations for tensor cores", elements)?;
        }
        let scales = gemm_scales(cols, tokens);
        if scales > self.scale.len() {
            self.scale = self.device.zeros("scales of activations", scales)?;
        }
        let launch = plan_prepare(problem, x, self.x.address(), self.scale.address())?;
        // SAFETY: the caller has checked the activations, and the prepared ones and their scales
        // have room. The payload, whose column factors are read, was validated for its shape.
        unsafe { self.device.launch(&launch) }
    }

    /// Multiplies the prepared activations. The address `out` has room for the result.
    fn multiply(&mut self, problem: GemmProblem<'_>, out: u64, add: bool) -> Result<()> {
        let limits = self.device.limits();
        let plan = |at, scratch| GemmPlan::new(limits, problem, at, add, scratch);
        let needed = plan(GemmAddresses::default(), ScratchAddresses::default())?.scratch;
        let scratch = self.scratch.reserve(needed)?;
        let at = GemmAddresses { x: self.x.address(), scale: self.scale.address(), y: out };
        let planned = plan(at, scratch)?;
        // SAFETY: the payload was validated for the matrix' shape. The activations were prepared for
        // its width and as many tokens, the caller has checked the room for the result, and the
        // scratch memory has the size that the plan needs. All are on the stream of this device.
        unsafe { self.device.launch(&planned.launch) }
    }
}
