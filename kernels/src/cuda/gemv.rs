//! GEMV: products of packed matrices with about up to 16 tokens.

use bytemuck::{Pod, Zeroable};
use stb_format::encoding::Encoding;

use super::device::{Buffer, Device};
use super::encoding::{self, GemvCall, GemvKernel, MatrixParams, MatrixPart};
use super::error::Result;
use super::input::ActivationInput;
use super::launch::{
    DeviceLimits, Launch, LaunchShape, ScratchAddresses, ScratchSize, check_grid_y, to_u32,
};
use super::matrix::Matrix;
use super::mixed_rows::ListedScratch;
use super::module::Module;
use super::precision::ActivationPrecision;
use super::scratch::SplitScratch;

/// Threads of a block, and its warps: common.cuh.
const THREADS: u32 = 256;
const WARPS: usize = 8;
/// The most matrices of a launch.
const MATRICES: usize = 3;
/// Shared memory of a block that leaves room for several blocks on a multiprocessor.
const SHARED: usize = 48 << 10;
/// Blocks per multiprocessor that a launch is split into, if there is enough work.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// `GemvParams` of kernels/cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct GemvParams {
    matrices: [MatrixParams; MATRICES],
    out: [u64; MATRICES],
    x: u64,
    with: u64,
    partial: u64,
    arrived: u64,
    count: u32,
    tokens: u32,
    input: u32,
    add: u32,
    slab: u32,
    slabs: u32,
    block_rows: u32,
    eps: f32,
}

/// `DequantizeParams` of kernels/cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct DequantizeParams {
    matrix: MatrixParams,
    ids: u64,
    out: u64,
    count: u32,
    padding: u32,
}

/// One GEMV: `out[i]` (+)= `input` · `matrices[i]`ᵀ for up to three matrices that share a module and
/// a width.
#[derive(Clone, Copy, Debug)]
pub struct GemvProblem<'a> {
    /// The encoding of the matrices.
    pub encoding: &'a Encoding,
    /// The matrices.
    pub matrices: &'a [MatrixParams],
    /// The address of the result of each matrix, [tokens, rows].
    pub out: &'a [u64],
    /// The activations.
    pub input: ActivationInput<u64>,
    /// The precision of activations.
    pub precision: ActivationPrecision,
    /// Whether the product is added to `out`.
    pub add: bool,
    /// Tokens.
    pub tokens: usize,
}

/// A planned GEMV: its launch, and the scratch memory that it needs.
#[derive(Clone, Debug)]
pub struct GemvPlan {
    /// The launch.
    pub launch: Launch,
    /// The scratch memory.
    pub scratch: ScratchSize,
}

/// How a GEMV is divided among blocks.
#[derive(Clone, Copy, Debug)]
struct GemvSplit {
    /// Columns of a slab.
    slab: usize,
    slabs: usize,
    /// Rows of a block.
    block_rows: usize,
    row_blocks: usize,
    /// Bytes of shared memory of a block.
    shared: usize,
}

/// The work that is divided.
#[derive(Clone, Copy, Debug)]
struct GemvWork<'a> {
    kernel: &'a GemvKernel,
    /// Tokens of a block.
    block_tokens: usize,
    /// Groups of that many tokens.
    groups: usize,
    /// The rows of each matrix.
    rows: &'a [usize],
    cols: usize,
}

impl GemvPlan {
    /// The module of an encoding's GEMV kernels.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for encodings without a kernel.
    pub fn module(encoding: &Encoding) -> Result<Module> {
        let (matrices, precision) = (&[][..], ActivationPrecision::F32);
        encoding::gemv(encoding, GemvCall { matrices, precision, tokens: 1 }).map(|k| k.module)
    }

    /// Plans a GEMV with its scratch memory at `scratch`.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for encodings without a kernel and sizes above 2^30.
    ///
    /// # Panics
    /// For no or more than three matrices, another number of results, or different widths.
    pub fn new(
        limits: DeviceLimits,
        problem: &GemvProblem<'_>,
        scratch: ScratchAddresses,
    ) -> Result<Self> {
        let GemvProblem { encoding, matrices, out, input, precision, add, tokens } = *problem;
        assert!((1..=MATRICES).contains(&matrices.len()) && tokens > 0, "up to three matrices");
        assert_eq!(matrices.len(), out.len(), "a result per matrix");
        let cols = matrices[0].cols();
        assert!(matrices.iter().all(|m| m.cols() == cols), "matrices of one input");
        let block_tokens = match tokens {
            1 | 2 => tokens,
            _ => 4,
        };
        let call = GemvCall { matrices, precision, tokens: block_tokens };
        let kernel = &encoding::gemv(encoding, call)?;
        let groups = tokens.div_ceil(block_tokens);
        let rows: Vec<usize> = matrices.iter().map(MatrixParams::rows).collect();
        let work = GemvWork { kernel, block_tokens, groups, rows: &rows, cols };
        let split = GemvSplit::new(limits, &work);
        let input = input.fields();
        let mut params = GemvParams {
            x: input.x,
            with: input.with,
            partial: scratch.partial,
            arrived: scratch.arrived,
            count: matrices.len() as u32,
            tokens: to_u32("a batch of tokens", tokens)?,
            input: input.kind,
            add: u32::from(add),
            slab: to_u32("a slab", split.slab)?,
            slabs: split.slabs as u32,
            block_rows: split.block_rows as u32,
            eps: input.eps,
            ..GemvParams::default()
        };
        params.matrices[..matrices.len()].copy_from_slice(matrices);
        params.out[..out.len()].copy_from_slice(out);
        let shape = LaunchShape {
            blocks: [split.row_blocks, split.slabs, groups],
            threads: THREADS,
            shared: split.shared,
        };
        let launch = Launch::new(kernel.module, kernel.name, shape, &params);
        let arrived = if split.slabs > 1 { split.row_blocks * groups } else { 0 };
        let partial = arrived * split.slabs * split.block_rows * block_tokens;
        Ok(Self { launch, scratch: ScratchSize { partial, arrived } })
    }
}

impl GemvSplit {
    fn new(limits: DeviceLimits, work: &GemvWork<'_>) -> Self {
        let GemvWork { kernel, block_tokens, groups, rows, cols } = *work;
        let (step, whole) = (kernel.step_cols, kernel.slab_cols);
        // Bytes of shared memory for `slab` columns, whole units of `slab_cols`.
        let bytes = |slab: usize| slab / whole * kernel.slab_bytes + kernel.fixed_bytes;
        // Slabs of less than a step are whole units, larger ones are whole steps.
        let fit = |slab: usize| {
            if slab >= step { slab.next_multiple_of(step) } else { slab.next_multiple_of(whole) }
        };
        let room = SHARED.max(bytes(step)).min(limits.shared as usize);
        let mut most = step;
        while most < cols && bytes(most + step) <= room {
            most += step;
        }
        let target = BLOCKS_PER_MULTIPROCESSOR * limits.multiprocessors as usize;
        // The fewest rows that keep all warps busy.
        let at_least = WARPS * kernel.warp_rows;
        let row_blocks = |block_rows: usize| -> usize {
            rows.iter().map(|rows| rows.div_ceil(block_rows)).sum()
        };
        let blocks = row_blocks(at_least) * groups;
        let wanted = target.div_ceil(blocks.max(1)).max(cols.div_ceil(most));
        let slab = fit(cols.div_ceil(wanted).max(1)).min(most).max(whole);
        let slabs = cols.div_ceil(slab).max(1);
        // A block takes more rows while there are enough blocks, because it fills its shared memory
        // once for all its rows.
        let mut block_rows = at_least;
        let shared = |block_rows: usize| bytes(slab) + block_rows * block_tokens * 4;
        while row_blocks(2 * block_rows) * groups * slabs >= target
            && block_rows < 64 * at_least
            && shared(2 * block_rows) <= limits.shared as usize
        {
            block_rows *= 2;
        }
        let shared = shared(block_rows);
        Self { slab, slabs, block_rows, row_blocks: row_blocks(block_rows), shared }
    }
}

/// Plans the conversion of `count` rows of a matrix to f32. `ids` is the address of the row numbers,
/// or 0 for all rows in order; `out` that of the result, [count, cols].
///
/// # Errors
/// As for [`GemvPlan::new`].
pub fn plan_dequantize(
    encoding: &Encoding,
    matrix: MatrixParams,
    ids: u64,
    count: usize,
    out: u64,
) -> Result<Launch> {
    const THREADS: usize = 128;
    let kernel = encoding::dequantize(encoding)?;
    let threads = matrix.cols().div_ceil(kernel.thread_cols);
    check_grid_y(count, count, "rows")?;
    let params = DequantizeParams { matrix, ids, out, count: count as u32, padding: 0 };
    let blocks = [threads.div_ceil(THREADS), count, 1];
    let shape = LaunchShape { blocks, threads: THREADS as u32, shared: 0 };
    Ok(Launch::new(kernel.module, kernel.name, shape, &params))
}

impl Matrix {
    /// The most rows that [`Matrix::queue_dequantize`] converts.
    pub const DEQUANTIZED_ROWS: usize = 65_535;

    /// Queues the conversion of all weights to f32 into `out`, [rows, cols].
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for more than [`Matrix::DEQUANTIZED_ROWS`] rows; [`super::Error::Memory`],
    /// [`super::Error::Driver`].
    ///
    /// # Panics
    /// If `out` is too small.
    pub fn queue_dequantize(&self, out: &mut Buffer<f32>) -> Result<()> {
        let mut scratch = ListedScratch::new(self.device())?;
        queue_conversion(self, &mut scratch, None, self.rows(), out)
    }
}

/// Queues the conversion of `count` rows to f32 into `out`: the first of `ids`, or those of the matrix in order.
fn queue_conversion(
    matrix: &Matrix,
    scratch: &mut ListedScratch,
    ids: Option<&Buffer<u32>>,
    count: usize,
    out: &mut Buffer<f32>,
) -> Result<()> {
    assert!(ids.is_none_or(|ids| ids.len() >= count), "as many rows");
    assert!(out.len() >= count * matrix.cols(), "room for the rows");
    let to = out.address();
    let convert = |part: &MatrixPart, ids: Option<&Buffer<u32>>| {
        let ids = ids.map_or(0, Buffer::address);
        let launch = plan_dequantize(&part.encoding, part.params, ids, count, to)?;
        // SAFETY: the payload was validated for the part's shape, and `out` has room for the rows. The kernel skips
        // ids outside the part.
        unsafe { matrix.device().launch(&launch) }
    };
    convert(matrix.all(), ids)?;
    match matrix.listed() {
        Some(listed) => convert(&listed.part, Some(scratch.find(listed, ids, count)?)),
        None => Ok(()),
    }
}

/// What the launches of a GEMV have in common.
#[derive(Clone, Copy, Debug)]
struct GemvArgs {
    input: ActivationInput<u64>,
    precision: ActivationPrecision,
    add: bool,
    tokens: usize,
}

/// GEMV on one device, with its scratch memory.
#[derive(Debug)]
pub struct Gemv {
    device: Device,
    scratch: SplitScratch,
    listed: ListedScratch,
}

impl Gemv {
    /// A GEMV without scratch memory yet.
    ///
    /// # Errors
    /// [`super::Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        let (scratch, listed) = (SplitScratch::new(device)?, ListedScratch::new(device)?);
        Ok(Self { device: device.clone(), scratch, listed })
    }

    /// Queues `out[i]` (+)= `input` · `matrices[i]`ᵀ. Neighboring matrices that share a module are
    /// one launch; a matrix of mixed rows takes three, or four with `add`.
    ///
    /// The first calls allocate scratch memory. A GEMV has to run once before it is recorded in a
    /// graph.
    ///
    /// # Errors
    /// As for [`GemvPlan::new`]; [`super::Error::Memory`], [`super::Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small for `tokens` tokens, or matrices have different widths.
    pub fn queue(
        &mut self,
        matrices: &[&Matrix],
        input: ActivationInput<&Buffer<f32>>,
        precision: ActivationPrecision,
        out: &mut [&mut Buffer<f32>],
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        assert!(matrices.len() == out.len() && !matrices.is_empty(), "an output per matrix");
        let cols = matrices[0].cols();
        input.check(cols, tokens);
        let args = GemvArgs { input: input.addresses(), precision, add, tokens };
        let mut first = 0;
        while first < matrices.len() {
            let same = matrices[first..].iter().take_while(|m| m.shares_launch(matrices[first]));
            // A matrix with listed rows is alone.
            let count = same.count().clamp(1, MATRICES);
            let (matrix, to) = (matrices[first], &mut *out[first]);
            let listed = self.listed.begin(matrix, to, add, tokens)?;
            let pairs = matrices[first..first + count].iter().zip(&out[first..]);
            for (matrix, out) in pairs.clone() {
                assert_eq!(matrix.cols(), cols, "matrices of one input");
                assert!(out.len() >= tokens * matrix.rows(), "room for the result");
            }
            let (params, addresses): (Vec<MatrixParams>, Vec<u64>) =
                pairs.map(|(matrix, out)| (matrix.all().params, out.address())).unzip();
            self.multiply(&matrix.all().encoding, &params, &addresses, args)?;
            if let Some(product) = listed {
                let MatrixPart { encoding, params } = product.part;
                self.multiply(encoding, &[*params], &[product.values], args)?;
                self.listed.finish(&product)?;
            }
            first += count;
        }
        Ok(())
    }

    /// Queues one launch for `matrices`, which the caller has checked with their input. Each address in `out` has room
    /// for the result of its matrix.
    fn multiply(
        &mut self,
        encoding: &Encoding,
        matrices: &[MatrixParams],
        out: &[u64],
        args: GemvArgs,
    ) -> Result<()> {
        let GemvArgs { input, precision, add, tokens } = args;
        let limits = self.device.limits();
        let problem = GemvProblem { encoding, matrices, out, input, precision, add, tokens };
        let needed = GemvPlan::new(limits, &problem, ScratchAddresses::default())?.scratch;
        let scratch = self.scratch.reserve(needed)?;
        let planned = GemvPlan::new(limits, &problem, scratch)?;
        // SAFETY: the plan is for these matrices, whose payloads were validated for their shapes.
        // The caller has checked that inputs and outputs have room for the tokens, and the scratch
        // memory has the size that the plan needs. All are on the stream of this device.
        unsafe { self.device.launch(&planned.launch) }
    }

    /// Queues the conversion of the rows `ids` of `matrix` to f32 into `out`, [count, cols]. Rows of
    /// `out` whose id is outside the matrix are not written.
    ///
    /// # Errors
    /// As for [`Gemv::queue`].
    ///
    /// # Panics
    /// If `out` or `ids` is too small.
    pub fn queue_rows(
        &mut self,
        matrix: &Matrix,
        ids: &Buffer<u32>,
        count: usize,
        out: &mut Buffer<f32>,
    ) -> Result<()> {
        queue_conversion(matrix, &mut self.listed, Some(ids), count, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stb_format::encoding::Nm;

    /// No launch asks for more shared memory than a block of the device may have: an A100, a 4090
    /// and an H100, layers of 7B and 70B models and large heads.
    #[test]
    fn shared_memory_stays_within_the_device() {
        let devices = [(108, 163), (128, 99), (132, 227)];
        let shapes =
            [(4096, 4096), (11_008, 4096), (28_672, 8192), (8192, 28_672), (128_256, 8192)];
        for (multiprocessors, kib) in devices {
            let limits = DeviceLimits { multiprocessors, shared: (kib - 1) << 10 };
            for (n, m) in [(1, 8), (1, 4), (2, 8), (2, 4)] {
                let encoding = &Encoding::Nm(Nm::new(n, m, 4, 128, false).unwrap());
                for ((rows, cols), count) in shapes.into_iter().flat_map(|s| [(s, 1), (s, 2)]) {
                    let matrices = &vec![MatrixParams::empty(rows, cols); count];
                    for tokens in 1..=16 {
                        let problem = GemvProblem {
                            encoding,
                            matrices,
                            out: &vec![0; count],
                            input: ActivationInput::Plain(0),
                            precision: ActivationPrecision::Q8,
                            add: false,
                            tokens,
                        };
                        let plan = GemvPlan::new(limits, &problem, ScratchAddresses::default());
                        let shared = plan.unwrap().launch.shared;
                        let what = format!("{n}:{m}, {rows} x {cols}, {tokens} tokens, {kib} KiB");
                        assert!(shared <= limits.shared, "{what}: {shared}");
                    }
                }
            }
        }
    }
}
