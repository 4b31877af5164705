//! Products of packed matrices with a few tokens.

use bytemuck::{Pod, Zeroable};
use stb_format::encoding::Encoding;

use super::device::{Buffer, Device};
use super::launch::{Launch, Limits, to_u32};
use super::matrix::{Kind, Matrix, MatrixParams};
use super::{Error, Result};

/// Threads of a block, and the warps they are: common.cuh.
const THREADS: u32 = 256;
const WARPS: usize = 8;
/// The most matrices of a launch.
const MATRICES: usize = 3;
/// Rows of a tile of joint codes.
const TILE: usize = 16;
/// Shared memory that leaves room for several blocks on a multiprocessor.
const SHARED: usize = 48 << 10;
/// Blocks for each multiprocessor that a launch is split into, if there is enough work.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// `Gemv` of kernels/cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Params {
    matrices: [MatrixParams; MATRICES],
    out: [u64; MATRICES],
    x: u64,
    with: u64,
    partial: u64,
    arrived: u64,
    count: u32,
    tokens: u32,
    source: u32,
    add: u32,
    slab: u32,
    slabs: u32,
    block_rows: u32,
    eps: f32,
}

/// `Decode` of kernels/cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct DecodeParams {
    matrix: MatrixParams,
    ids: u64,
    out: u64,
    count: u32,
    padding: u32,
}

/// What the activations of a product are: `Source` of common.cuh. `A` is a buffer or an address.
#[derive(Clone, Copy, Debug)]
pub enum Input<A> {
    /// x, [tokens, cols].
    Plain(A),
    /// x · weight / sqrt(mean(x²) + eps): RMSNorm, with a weight per column.
    Norm {
        /// [tokens, cols].
        x: A,
        /// `[cols]`.
        weight: A,
        /// Added to the mean.
        eps: f32,
    },
    /// silu(gate) · up, both [tokens, cols].
    Silu {
        /// [tokens, cols].
        gate: A,
        /// [tokens, cols].
        up: A,
    },
}

impl<A> Input<A> {
    /// The same with something else for each `A`.
    fn map<B>(self, f: impl Fn(A) -> B) -> Input<B> {
        match self {
            Self::Plain(x) => Input::Plain(f(x)),
            Self::Norm { x, weight, eps } => Input::Norm { x: f(x), weight: f(weight), eps },
            Self::Silu { gate, up } => Input::Silu { gate: f(gate), up: f(up) },
        }
    }
}

impl Input<u64> {
    /// x, the other input, its kind and epsilon, as kernels take them.
    pub(super) fn fields(self) -> (u64, u64, u32, f32) {
        match self {
            Self::Plain(x) => (x, 0, 0, 0.0),
            Self::Norm { x, weight, eps } => (x, weight, 1, eps),
            Self::Silu { gate, up } => (gate, up, 2, 0.0),
        }
    }
}

impl Input<&Buffer<f32>> {
    /// # Panics
    /// If a buffer does not hold `tokens` tokens of `cols` numbers.
    pub(super) fn check(self, cols: usize, tokens: usize) {
        let fits = match self {
            Self::Plain(x) => x.len() >= tokens * cols,
            Self::Norm { x, weight, .. } => x.len() >= tokens * cols && weight.len() == cols,
            Self::Silu { gate, up } => gate.len().min(up.len()) >= tokens * cols,
        };
        assert!(fits, "whole tokens");
    }

    pub(super) fn addresses(self) -> Input<u64> {
        self.map(Buffer::address)
    }
}

/// How activations enter a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// As they are: f32.
    Exact,
    /// Rounded to 8 bits with one scale per 32 columns, where there is a kernel for it (integer groups and
    /// STBLLM; joint codes need none). A product differs from the exact one by at most
    /// Σ_units max|x| / 254 · Σ|w|, and by summation in f32.
    Rounded,
}

/// A planned product: its launch, and the memory for sums of parts that it needs.
#[derive(Clone, Debug)]
pub struct MatVecPlan {
    /// The kernel.
    pub launch: Launch,
    /// Floats of partial sums.
    pub partial: usize,
    /// Counters, which are zero before and after.
    pub arrived: usize,
}

/// Splits of the work.
#[derive(Clone, Copy, Debug)]
struct Split {
    slab: usize,
    slabs: usize,
    block_rows: usize,
    row_blocks: usize,
    shared: usize,
}

impl MatVecPlan {
    /// Where the kernels of an encoding are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for encodings without a kernel.
    pub fn module(encoding: &Encoding) -> Result<super::Module> {
        Kind::of(encoding).map(|kind| kind.module)
    }

    /// `out[i]` (+)= `input` · `matrices[i]`ᵀ for up to three matrices of one kind and width; `out` are
    /// [tokens, rows]. `work` are the addresses of partial sums and counters.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for encodings without a kernel and sizes beyond what kernels count to.
    ///
    /// # Panics
    /// For no or more than three matrices, or different widths or kinds.
    pub fn new(
        limits: Limits,
        encoding: &Encoding,
        matrices: &[(MatrixParams, u64)],
        input: Input<u64>,
        numbers: Numbers,
        add: bool,
        tokens: usize,
        work: [u64; 2],
    ) -> Result<Self> {
        assert!((1..=MATRICES).contains(&matrices.len()) && tokens > 0, "up to three matrices");
        let cols = matrices[0].0.cols;
        assert!(matrices.iter().all(|(m, _)| m.cols == cols), "matrices of one input");
        let kind = Kind::of(encoding)?;
        let rounded = numbers == Numbers::Rounded && kind.rounded;
        let at_once = match tokens {
            1 | 2 => tokens,
            _ => 4,
        };
        let groups = tokens.div_ceil(at_once);
        let rows: Vec<usize> = matrices.iter().map(|(m, _)| m.rows as usize).collect();
        let split = Split::new(limits, kind, rounded, at_once, groups, &rows, cols as usize);
        let (x, with, source, eps) = input.fields();
        let mut params = Params {
            x,
            with,
            partial: work[0],
            arrived: work[1],
            count: matrices.len() as u32,
            tokens: to_u32("a batch of tokens", tokens)?,
            source,
            add: u32::from(add),
            slab: to_u32("a slab", split.slab)?,
            slabs: split.slabs as u32,
            block_rows: split.block_rows as u32,
            eps,
            ..Params::default()
        };
        for (i, (matrix, out)) in matrices.iter().enumerate() {
            params.matrices[i] = *matrix;
            params.out[i] = *out;
        }
        let scaled = kind.table > 0 && matrices.iter().any(|(m, _)| m.has_block_scales());
        let kernel = match (rounded, at_once) {
            _ if scaled => match at_once {
                1 => "scaled_1",
                2 => "scaled_2",
                _ => "scaled_4",
            },
            (false, 1) => "exact_1",
            (false, 2) => "exact_2",
            (false, _) => "exact_4",
            (true, 1) => "rounded_1",
            (true, 2) => "rounded_2",
            (true, _) => "rounded_4",
        };
        let blocks = [split.row_blocks, split.slabs, groups];
        let launch = Launch::new(kind.module, kernel, blocks, THREADS, split.shared, &params);
        let parts = if split.slabs > 1 { split.row_blocks * groups } else { 0 };
        let partial = parts * split.slabs * split.block_rows * at_once;
        Ok(Self { launch, partial, arrived: parts })
    }
}

impl Split {
    fn new(
        limits: Limits,
        kind: Kind,
        rounded: bool,
        at_once: usize,
        groups: usize,
        rows: &[usize],
        cols: usize,
    ) -> Self {
        let is_codes = kind.table > 0;
        // A lane of joint codes takes two pieces for one token: `vectors_of` of gemv_nm.cu.
        let pieces = if is_codes && at_once == 1 { 2 } else { 1 };
        let step = 32 * kind.piece * pieces;
        // Bytes of shared memory for `slab` columns: tables, or activations with their padding.
        let bytes = |slab: usize| {
            if is_codes {
                // Tables of one token begin at a multiple of their size.
                let aligned = if at_once == 1 { kind.table / kind.tables } else { 0 };
                return slab / step * pieces * kind.table * at_once + aligned;
            }
            let pad = if kind.piece == 4 && !rounded { 0 } else { 4 };
            let words = if rounded { kind.piece / 4 } else { kind.piece };
            let scales = if rounded { slab / 32 * 8 } else { 0 };
            at_once * (slab / kind.piece * (words + pad) * 4 + scales)
        };
        // Joint codes work in whole steps. Else a slab is whole pieces and units of 32, better steps.
        let whole = if is_codes { step } else { kind.piece.max(32) };
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
        let at_least = WARPS
            * if is_codes {
                TILE
            } else if at_once == 1 {
                4
            } else {
                2
            };
        let row_blocks = |block_rows: usize| -> usize {
            rows.iter().map(|rows| rows.div_ceil(block_rows)).sum()
        };
        let blocks = row_blocks(at_least) * groups;
        let wanted = target.div_ceil(blocks.max(1)).max(cols.div_ceil(most));
        let slab = fit(cols.div_ceil(wanted).max(1)).min(most).max(whole);
        let slabs = cols.div_ceil(slab).max(1);
        // More rows for a block while there are blocks enough: its tables are made once.
        let mut block_rows = at_least;
        let shared = |block_rows: usize| bytes(slab) + block_rows * at_once * 4;
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

/// The launch that decodes rows of a matrix: `ids` (an address, 0 for all rows in order) of `count` rows
/// into `out`, [count, cols] floats.
///
/// # Errors
/// As for [`MatVecPlan::new`].
pub fn plan_decode(
    encoding: &Encoding,
    matrix: MatrixParams,
    ids: u64,
    count: usize,
    out: u64,
) -> Result<Launch> {
    const THREADS: usize = 128;
    let kind = Kind::of(encoding)?;
    let cols = matrix.cols as usize;
    let work = match encoding {
        Encoding::Nm(spec) => cols.div_ceil(spec.m()),
        _ => cols.div_ceil(kind.piece),
    };
    if count > 65_535 {
        let why = format!("{count} rows at once are more than a launch takes");
        return Err(Error::Unsupported { why });
    }
    let params = DecodeParams { matrix, ids, out, count: count as u32, padding: 0 };
    let blocks = [work.div_ceil(THREADS), count, 1];
    Ok(Launch::new(kind.module, "decode_rows", blocks, THREADS as u32, 0, &params))
}

impl Matrix {
    /// Rows that [`Matrix::queue_decode`] takes at most.
    pub const DECODED_ROWS: usize = 65_535;

    /// Queues all weights as numbers into `out`, [rows, cols].
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more than [`Matrix::DECODED_ROWS`] rows; [`Error::Driver`].
    ///
    /// # Panics
    /// If `out` is too small.
    pub fn queue_decode(&self, out: &mut Buffer<f32>) -> Result<()> {
        assert!(out.len() >= self.rows() * self.cols(), "room for the rows");
        let launch = plan_decode(&self.encoding, self.params, 0, self.rows(), out.address())?;
        // SAFETY: the matrix' payload was validated for its shape; there is room for its rows.
        unsafe { self.device().launch(&launch) }
    }
}

/// Matrix-vector products on one device, with the memory they need.
#[derive(Debug)]
pub struct Gemv {
    device: Device,
    partial: Buffer<f32>,
    arrived: Buffer<u32>,
}

impl Gemv {
    /// Without memory yet.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            partial: device.zeros("partial sums", 0)?,
            arrived: device.zeros("counters", 0)?,
        })
    }

    /// Queues `out[i]` (+)= `input` · `matrices[i]`ᵀ. Matrices of one kind are one launch.
    ///
    /// Memory grows with the first calls, so a product that is recorded in a graph has to have been computed
    /// before.
    ///
    /// # Errors
    /// As for [`MatVecPlan::new`]; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small for `tokens` tokens, or matrices have different widths.
    pub fn queue(
        &mut self,
        matrices: &[&Matrix],
        input: Input<&Buffer<f32>>,
        numbers: Numbers,
        out: &mut [&mut Buffer<f32>],
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        assert!(matrices.len() == out.len() && !matrices.is_empty(), "an output per matrix");
        let cols = matrices[0].cols();
        input.check(cols, tokens);
        let input = input.addresses();
        let mut first = 0;
        while first < matrices.len() {
            let same = matrices[first..].iter().take_while(|m| m.shares_launch(matrices[first]));
            let count = same.count().min(MATRICES);
            let parts: Vec<(MatrixParams, u64)> = matrices[first..first + count]
                .iter()
                .zip(&out[first..])
                .map(|(matrix, out)| {
                    assert_eq!(matrix.cols(), cols, "matrices of one input");
                    assert!(out.len() >= tokens * matrix.rows(), "room for the result");
                    (matrix.params, out.address())
                })
                .collect();
            let plan = |work| {
                let encoding = &matrices[first].encoding;
                let limits = self.device.limits();
                MatVecPlan::new(limits, encoding, &parts, input, numbers, add, tokens, work)
            };
            let needed = plan([0, 0])?;
            if needed.partial > self.partial.len() {
                self.partial = self.device.zeros("partial sums", needed.partial)?;
            }
            if needed.arrived > self.arrived.len() {
                self.arrived = self.device.zeros("counters", needed.arrived)?;
            }
            let planned = plan([self.partial.address(), self.arrived.address()])?;
            // SAFETY: the plan is for these matrices, whose payloads were validated for their shapes;
            // inputs and outputs have room for the tokens, and the partial sums and counters for what
            // the plan needs, as checked above. All are on the stream of this device.
            unsafe { self.device.launch(&planned.launch) }?;
            first += count;
        }
        Ok(())
    }

    /// Queues the rows `ids` of `matrix` as numbers into `out`, [count, cols]. Rows outside the matrix are
    /// left as they are.
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
        assert!(ids.len() >= count && out.len() >= count * matrix.cols(), "room for the rows");
        let (encoding, params) = (&matrix.encoding, matrix.params);
        let launch = plan_decode(encoding, params, ids.address(), count, out.address())?;
        // SAFETY: as in `queue`; the kernel skips ids outside the matrix.
        unsafe { self.device.launch(&launch) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stb_format::encoding::Nm;

    /// No launch asks for more shared memory than a block of the device may have: an A100's, a 4090's and an
    /// H100's, layers of 7B and 70B models and large heads.
    #[test]
    fn shared_memory_stays_within_the_device() {
        let devices = [(108, 163), (128, 99), (132, 227)];
        let shapes =
            [(4096, 4096), (11_008, 4096), (28_672, 8192), (8192, 28_672), (128_256, 8192)];
        for (multiprocessors, kib) in devices {
            let limits = Limits { multiprocessors, shared: (kib - 1) << 10 };
            for (n, m) in [(1, 8), (1, 4), (2, 8), (2, 4)] {
                let encoding = Encoding::Nm(Nm::new(n, m, 4, 128, false).unwrap());
                for ((rows, cols), count) in shapes.into_iter().flat_map(|s| [(s, 1), (s, 2)]) {
                    let mut matrix = MatrixParams::default();
                    (matrix.rows, matrix.cols) = (rows, cols);
                    for tokens in 1..=16 {
                        let plan = MatVecPlan::new(
                            limits,
                            &encoding,
                            &vec![(matrix, 0); count],
                            Input::Plain(0),
                            Numbers::Rounded,
                            false,
                            tokens,
                            [0; 2],
                        );
                        let shared = plan.unwrap().launch.shared;
                        let what = format!("{n}:{m}, {rows} x {cols}, {tokens} tokens, {kib} KiB");
                        assert!(shared <= limits.shared, "{what}: {shared}");
                    }
                }
            }
        }
    }
}
