//! Products with many tokens on tensor cores.

use bytemuck::{Pod, Zeroable};
use stb_format::Encoding;
use stb_format::encoding::Dense;

use super::compile::Module;
use super::device::{Buffer, Device};
use super::gemv::Input;
use super::launch::{Launch, Limits, to_u32};
use super::matrix::{Matrix, MatrixParams};
use super::ops::Ops;
use super::{Error, Result};

/// Threads of a block: `GEMM_THREADS` of gemm.cuh.
const THREADS: usize = 256;
/// Columns of a step: `STEP` of gemm.cuh.
const STEP: usize = 128;
/// Columns of a token that share a scale in 8 bits, which are a step too: `ROUNDED` of gemm.cuh.
const ROUNDED: usize = 2 * STEP;
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
    group: u32,
    padding: u32,
}

/// What activations are rounded to where a matrix of joint codes is multiplied with many tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptNumbers {
    /// 16-bit floats.
    #[default]
    F16,
    /// 8-bit integers with a scale for every 256 columns of a token: an instruction multiplies twice as many, and each
    /// is off by up to 1/254 of the largest of the 256. Encodings whose weights do not fit 8 bits, and all others, go on
    /// as with [`PromptNumbers::F16`].
    Int8,
}

/// What is multiplied with how many tokens, in which numbers.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// The encoding of the matrix.
    pub encoding: &'a Encoding,
    /// The matrix.
    pub matrix: MatrixParams,
    /// Tokens.
    pub tokens: usize,
    /// What activations are rounded to.
    pub numbers: PromptNumbers,
}

impl Product<'_> {
    /// The numbers in fact: scale codes of 8 bits make weights of up to ±256 units.
    fn numbers(&self) -> PromptNumbers {
        match self.encoding {
            Encoding::Nm(spec) if spec.scale_bits() <= 4 => self.numbers,
            _ => PromptNumbers::F16,
        }
    }

    /// How activations have to be prepared.
    fn preparation(&self) -> Preparation {
        let Encoding::Nm(spec) = self.encoding else {
            return Preparation { kernel: "gemm_split", group: 0, factors: false };
        };
        let factors = spec.has_col_factors();
        match self.numbers() {
            PromptNumbers::F16 => Preparation { kernel: "gemm_prepare", group: 0, factors },
            PromptNumbers::Int8 => {
                Preparation { kernel: "gemm_round", group: spec.m() as u32, factors }
            }
        }
    }

    /// Numbers of 16 bits of a row of prepared activations.
    fn stride(&self) -> usize {
        let cols = self.matrix.cols as usize;
        match self.numbers() {
            PromptNumbers::F16 => cols.next_multiple_of(STEP),
            PromptNumbers::Int8 => cols.next_multiple_of(ROUNDED) / 2,
        }
    }
}

/// How activations are prepared: what is prepared alike can be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Preparation {
    kernel: &'static str,
    /// Columns of a group of codes, if their order depends on it.
    group: u32,
    /// Whether column factors are applied, which each matrix has its own of.
    factors: bool,
}

/// Numbers of 16 bits that [`plan_prepare`] writes at most.
#[must_use]
pub fn gemm_prepared(cols: usize, tokens: usize) -> usize {
    2 * tokens * cols.next_multiple_of(STEP)
}

/// Scales that [`plan_prepare`] writes at most.
#[must_use]
pub fn gemm_scales(cols: usize, tokens: usize) -> usize {
    tokens * cols.div_ceil(ROUNDED).max(1)
}

/// The launch that prepares activations, `x`, [tokens, cols] f32, for [`GemmPlan`]. `out` has room for
/// [`gemm_prepared`] numbers of 16 bits, `scale` for [`gemm_scales`] floats; all are addresses. What they hold is
/// between the two kernels: for joint codes, with the column factors of the matrix, f16 times a power of two for each
/// token, or 8-bit integers times a scale; for others two bf16 whose sum it is.
///
/// # Errors
/// [`Error::Unsupported`] for sizes beyond what kernels count to.
pub fn plan_prepare(product: Product<'_>, x: u64, out: u64, scale: u64) -> Result<Launch> {
    let Preparation { kernel, group, .. } = product.preparation();
    let stride = to_u32("a row of activations", product.stride())?;
    let tokens = to_u32("a number of tokens", product.tokens)?;
    let w = product.matrix;
    let params = PrepareParams { w, x, out, scale, tokens, stride, group, padding: 0 };
    let blocks = [tokens as usize, 1, 1];
    Ok(Launch::new(Module::GEMM_PREPARE, kernel, blocks, THREADS as u32, 0, &params))
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

/// Rows of any other encoding: two halves of rows, two of tokens in shared memory.
const ROWS: Shape = Shape { kernel: "gemm_rows", rows: 64, tokens: 64 };

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
        module(encoding, PromptNumbers::F16).is_some()
    }

    /// Plans `y` (+)= `x` · matrixᵀ: `x` and `scale` from [`plan_prepare`] of the same product, `y` [tokens, rows] f32,
    /// all addresses, `work` those of the partial sums and counters. Differs from the exact product by the order of the
    /// sum and by at most 2^-11 · Σ|w·x| (joint codes: activations in f16), Σ|w| · max|x| / 254 over each 256 columns
    /// (in 8 bits; x times the column factors, w without), or 2^-14 · Σ|w·x| (others).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no kernel for the encoding, or for sizes beyond what kernels count to.
    pub fn new(
        limits: Limits,
        product: Product<'_>,
        [x, scale, y]: [u64; 3],
        add: bool,
        work: [u64; 2],
    ) -> Result<Self> {
        let Product { encoding, matrix, tokens, .. } = product;
        let numbers = product.numbers();
        let Some(module) = module(encoding, numbers) else {
            let why =
                format!("there is no CUDA kernel for many tokens and the encoding {encoding}");
            return Err(Error::Unsupported { why });
        };
        let (rows, cols) = (matrix.rows as usize, matrix.cols as usize);
        let tokens_u32 = to_u32("a number of tokens", tokens)?;
        let blocks = |s: &Shape| rows.div_ceil(s.rows) * tokens.div_ceil(s.tokens);
        let target = limits.multiprocessors as usize;
        let (shape, shared) = match codes(encoding) {
            None => (&ROWS, 4 * ROWS.rows * 2 * STEP),
            Some((vectors, table)) => {
                let stage = |s: &Shape| match numbers {
                    PromptNumbers::F16 => s.tokens * 256 + s.rows / 16 * (vectors * 64 + 4 * 16),
                    PromptNumbers::Int8 => {
                        s.tokens * (256 + 4) + 2 * (s.rows / 16 * (vectors * 64 + 4 * 8))
                    }
                };
                let shared = |s: &Shape| table + STAGES * stage(s);
                let fits = |s: &&Shape| shared(s) <= limits.shared as usize;
                // The largest that keeps all multiprocessors busy; few tokens take the narrow one.
                let wanted = |s: &&Shape| match s.tokens {
                    16 => true,
                    _ => tokens > 32 && (s.rows == 256 || blocks(s) >= target),
                };
                let [.., narrow] = &SPARSE;
                let shape = SPARSE.iter().filter(fits).find(wanted).unwrap_or(narrow);
                (shape, shared(shape))
            }
        };
        let blocks = blocks(shape);
        // With too few blocks several share the columns, at least 512 each.
        let (all, least) = match numbers {
            PromptNumbers::F16 => (cols.div_ceil(STEP).max(1), 512 / STEP),
            PromptNumbers::Int8 => (cols.div_ceil(ROUNDED).max(1), 512 / ROUNDED),
        };
        let splits = match codes(encoding) {
            Some(_) => (target / blocks.max(1)).clamp(1, all.div_ceil(least)).min(32),
            None => 1,
        };
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
            stride: to_u32("a row of activations", product.stride())?,
            steps: steps as u32,
            splits: splits as u32,
            add: u32::from(add),
            padding: 0,
        };
        let grid = [rows.div_ceil(shape.rows), tokens.div_ceil(shape.tokens), splits];
        if grid[1] > 65_535 {
            let why = format!("{tokens} tokens at once are more than a launch takes");
            return Err(Error::Unsupported { why });
        }
        let launch = Launch::new(module, shape.kernel, grid, THREADS as u32, shared, &params);
        Ok(Self { launch, partial, arrived })
    }
}

/// The units that prompts of matrices of an encoding run on; `None` if there are no kernels for it.
#[must_use]
pub fn prompt_units(encoding: &Encoding) -> Option<&'static str> {
    module(encoding, PromptNumbers::F16)?;
    Some(match codes(encoding) {
        Some(_) => "2:4 sparse tensor cores",
        None => "dense tensor cores",
    })
}

/// The module of an encoding, of which there is one in these numbers.
fn module(encoding: &Encoding, numbers: PromptNumbers) -> Option<Module> {
    let rounded = numbers == PromptNumbers::Int8;
    Some(match encoding {
        Encoding::Dense(Dense::F32) => Module::GEMM_F32,
        Encoding::Dense(Dense::F16) => Module::GEMM_F16,
        Encoding::Dense(Dense::Bf16) => Module::GEMM_BF16,
        Encoding::IntGroup(spec) => match spec.bits() {
            1 => Module::GEMM_INT1,
            2 => Module::GEMM_INT2,
            3 => Module::GEMM_INT3,
            4 => Module::GEMM_INT4,
            8 => Module::GEMM_INT8,
            _ => return None,
        },
        Encoding::Stbllm(_) => Module::GEMM_STBLLM,
        Encoding::Nm(spec) => match (spec.n(), spec.m()) {
            (1, 8) if rounded => Module::GEMM_NM_S8_1_8,
            (1, 8) => Module::GEMM_NM_1_8,
            (1, 4) if rounded => Module::GEMM_NM_S8_1_4,
            (1, 4) => Module::GEMM_NM_1_4,
            (2, 8) if rounded => Module::GEMM_NM_S8_2_8,
            (2, 8) => Module::GEMM_NM_2_8,
            (2, 4) if rounded => Module::GEMM_NM_S8_2_4,
            (2, 4) => Module::GEMM_NM_2_4,
            _ => return None,
        },
        _ => return None,
    })
}

/// Of joint codes: vectors of 64 bytes per tile and step, bytes of the table.
fn codes(encoding: &Encoding) -> Option<(usize, usize)> {
    let Encoding::Nm(spec) = encoding else { return None };
    Some(match (spec.n(), spec.m()) {
        (1, 8) => (2, 0),
        (1, 4) => (3, 0),
        (2, 8) => (4, 1024),
        _ => (5, 0),
    })
}

/// Products with many tokens on one device, with the memory they need.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    numbers: PromptNumbers,
    ops: Ops,
    input: Buffer<f32>,
    x: Buffer<u16>,
    scale: Buffer<f32>,
    partial: Buffer<f32>,
    arrived: Buffer<u32>,
}

impl Gemm {
    /// Without memory yet; activations in f16.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            numbers: PromptNumbers::default(),
            ops: Ops::new(device),
            input: device.zeros("activations", 0)?,
            x: device.zeros("activations for tensor cores", 0)?,
            scale: device.zeros("scales of activations", 0)?,
            partial: device.zeros("partial sums", 0)?,
            arrived: device.zeros("counters", 0)?,
        })
    }

    /// The same with activations in `numbers`, for products with joint codes.
    #[must_use]
    pub fn with_numbers(self, numbers: PromptNumbers) -> Self {
        Self { numbers, ..self }
    }

    /// Queues `out[i]` (+)= `input` · `matrices[i]`ᵀ, `out[i]` [tokens, rows]; as exact as [`GemmPlan::new`] says.
    ///
    /// Memory grows with the first calls, so a product that is recorded in a graph has to have been computed
    /// before.
    ///
    /// # Errors
    /// As for [`GemmPlan::new`]; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small for `tokens` tokens, or matrices have different widths.
    pub fn queue(
        &mut self,
        matrices: &[&Matrix],
        input: Input<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
        tokens: usize,
    ) -> Result<()> {
        assert!(matrices.len() == out.len() && !matrices.is_empty(), "an output per matrix");
        let cols = matrices[0].cols();
        input.check(cols, tokens);
        let x = match input {
            Input::Plain(x) => x.address(),
            _ => {
                if tokens * cols > self.input.len() {
                    self.input = self.device.zeros("activations", tokens * cols)?;
                }
                self.ops.materialize(input, &mut self.input, cols, tokens)?;
                self.input.address()
            }
        };
        let mut prepared = None;
        for (matrix, out) in matrices.iter().zip(out) {
            assert_eq!(matrix.cols(), cols, "matrices of one input");
            assert!(out.len() >= tokens * matrix.rows(), "room for the result");
            let product = Product {
                encoding: &matrix.encoding,
                matrix: matrix.params,
                tokens,
                numbers: self.numbers,
            };
            // Column factors are each matrix' own.
            let kind = product.preparation();
            if kind.factors || prepared != Some(kind) {
                self.prepare(product, x)?;
            }
            prepared = Some(kind);
            self.multiply(product, out.address(), add)?;
        }
        Ok(())
    }

    /// Prepares activations at `x`, which are [tokens, columns of the matrix].
    fn prepare(&mut self, product: Product<'_>, x: u64) -> Result<()> {
        let (cols, tokens) = (product.matrix.cols as usize, product.tokens);
        let elements = gemm_prepared(cols, tokens);
        if elements > self.x.len() {
            self.x = self.device.zeros("activations for tensor cores", elements)?;
        }
        let scales = gemm_scales(cols, tokens);
        if scales > self.scale.len() {
            self.scale = self.device.zeros("scales of activations", scales)?;
        }
        let launch = plan_prepare(product, x, self.x.address(), self.scale.address())?;
        // SAFETY: the caller has checked that the activations are there; what is prepared and the scales
        // have room. The payload, whose column factors are read, was validated for its shape.
        unsafe { self.device.launch(&launch) }
    }

    /// The product with what was prepared, to the address `out`, which has room for it.
    fn multiply(&mut self, product: Product<'_>, out: u64, add: bool) -> Result<()> {
        let limits = self.device.limits();
        let plan = |addresses, work| GemmPlan::new(limits, product, addresses, add, work);
        let needed = plan([0; 3], [0; 2])?;
        if needed.partial > self.partial.len() {
            self.partial = self.device.zeros("partial sums", needed.partial)?;
        }
        if needed.arrived > self.arrived.len() {
            self.arrived = self.device.zeros("counters", needed.arrived)?;
        }
        let work = [self.partial.address(), self.arrived.address()];
        let planned = plan([self.x.address(), self.scale.address(), out], work)?;
        // SAFETY: the matrix' payload was validated for its shape; activations were prepared for its width
        // and as many tokens; the caller has checked the result's room; and the partial sums and counters
        // have room for what the plan needs. All are on the stream of this device.
        unsafe { self.device.launch(&planned.launch) }
    }
}
