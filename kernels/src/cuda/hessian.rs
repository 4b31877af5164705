//! Hessians and their factors on a device, and the copies and sums that conversion needs besides products.

use bytemuck::{Pod, Zeroable};

use super::blas::{Blas, MatrixSize, Operand, OperandMut};
use super::device::{Buffer, Device};
use super::error::Result;
use super::launch::{Launch, LaunchShape, to_u32};
use super::module::{Module, module};

/// The module of hessian.cu.
pub(super) const MODULE: Module = module!("hessian", "hessian.cu");

const THREADS: usize = 256;

/// `HessianParams` of hessian.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct HessianParams {
    f32: u64,
    f64: u64,
    identity: u64,
    n: u32,
    scale: f32,
}

/// `SubmatrixParams` of hessian.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct SubmatrixParams {
    to: u64,
    from: u64,
    minus: u64,
    to_stride: u64,
    from_stride: u64,
    rows: u32,
    cols: u32,
}

/// `BlockDotsParams` of hessian.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct BlockDotsParams {
    a: u64,
    b: u64,
    a_stride: u64,
    b_stride: u64,
    out: u64,
    rows: u32,
    cols: u32,
    span: u32,
    blocks: u32,
}

/// A launch with a thread per element.
fn elementwise<P: bytemuck::NoUninit>(kernel: &'static str, elements: usize, params: &P) -> Launch {
    let blocks = [elements.div_ceil(THREADS), 1, 1];
    let shape = LaunchShape { blocks, threads: THREADS as u32, shared: 0 };
    Launch::new(MODULE, kernel, shape, params)
}

impl HessianParams {
    fn plan(&self, kernel: &'static str) -> Launch {
        let n = self.n as usize;
        elementwise(kernel, n * n, self)
    }
}

/// The factors of a Hessian H, [n, n] symmetric: H = M Mᵀ and U = M⁻¹, both upper triangular.
#[derive(Clone, Debug)]
pub struct HessianFactors {
    /// U, [n, n].
    pub u: Vec<f32>,
    /// M, [n, n].
    pub m: Vec<f32>,
}

/// Dense linear algebra in f32 and f64 on one device: [`Blas`], and the kernels of hessian.cu that run
/// between its products.
#[derive(Debug)]
pub struct LinearAlgebra {
    blas: Blas,
}

impl LinearAlgebra {
    /// Loads the libraries and compiles the kernels by factoring a 1 × 1 matrix, so that a missing library or
    /// compiler is reported at the start.
    ///
    /// # Errors
    /// As for [`Blas::new`] and [`Blas::cholesky`]; [`super::Error::Compiler`].
    pub fn new(device: &Device) -> Result<Self> {
        let mut algebra = Self { blas: Blas::new(device)? };
        algebra.factor(&[1.0], 1)?;
        Ok(algebra)
    }

    /// cuBLAS and cuSOLVER.
    #[must_use]
    pub fn blas(&self) -> &Blas {
        &self.blas
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.blas.device()
    }

    /// Queues scaling the lower triangle of `h`, [n, n], and copying it to the upper one.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for sizes above 2^30, [`super::Error::Driver`].
    ///
    /// # Panics
    /// If the buffer is too small.
    pub fn finish_hessian(&self, h: &mut Buffer<f32>, n: usize, scale: f32) -> Result<()> {
        assert!(h.len() >= n * n, "a matrix of this size");
        let n = to_u32("a matrix with columns", n)?;
        let params = HessianParams { f32: h.address(), f64: 0, identity: 0, n, scale };
        // SAFETY: the matrix has room, as checked. The kernel uses no other address.
        unsafe { self.device().launch(&params.plan("finish_hessian")) }
    }

    /// Factors `h`, [n, n] symmetric, in f64, and returns the factors on the host; `None` if `h` is not
    /// positive definite.
    ///
    /// # Errors
    /// As for [`Blas::cholesky`].
    ///
    /// # Panics
    /// If `h` has another size.
    pub fn factor(&mut self, h: &[f32], n: usize) -> Result<Option<HessianFactors>> {
        assert_eq!(h.len(), n * n, "a square matrix");
        let single = self.device().upload("a Hessian", h)?;
        let mut double = self.device().zeros::<f64>("a factor", n * n)?;
        let mut inverse = self.device().zeros::<f64>("a factor", n * n)?;
        let size = to_u32("a matrix with columns", n)?;
        let params = |single: &Buffer<f32>, double: u64, identity: u64| {
            let single = single.address();
            HessianParams { f32: single, f64: double, identity, n: size, scale: 1.0 }
        };
        let widen = params(&single, double.address(), inverse.address()).plan("reverse_to_f64");
        // SAFETY: all three matrices are [n, n].
        unsafe { self.device().launch(&widen) }?;
        if !self.blas.cholesky(&mut double, n)? {
            return Ok(None);
        }
        self.blas.solve_lower(&double, &mut inverse, n)?;
        let host = |from: &Buffer<f64>| -> Result<Vec<f32>> {
            let narrow = params(&single, from.address(), 0).plan("reverse_to_f32");
            // SAFETY: both matrices are [n, n]. The kernel does not use the third address.
            unsafe { self.device().launch(&narrow) }?;
            let mut out = vec![0.0; n * n];
            single.read(&mut out)?;
            Ok(out)
        };
        let (u, m) = (host(&inverse)?, host(&double)?);
        // The library does not promise to report NaN.
        if !m.iter().step_by(n + 1).all(|d| d.is_finite() && *d > 0.0) {
            return Ok(None);
        }
        Ok(Some(HessianFactors { u, m }))
    }

    /// Queues `to` = `from` − `minus`, or `to` = `from`, for matrices of this size. `minus` has the
    /// first element and the stride of `from`.
    ///
    /// # Errors
    /// As for [`LinearAlgebra::finish_hessian`].
    ///
    /// # Panics
    /// If a buffer is too small, or `from` is transposed.
    pub fn copy_submatrix(
        &self,
        size: MatrixSize,
        from: Operand<'_>,
        minus: Option<&Buffer<f32>>,
        to: OperandMut<'_>,
    ) -> Result<()> {
        let MatrixSize { rows, cols } = size;
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        assert!(!from.is_transposed, "rows of the buffer");
        let end = |first: usize, stride: usize| first + (rows - 1) * stride + cols;
        let len = minus.map_or(from.buffer.len(), |m| m.len().min(from.buffer.len()));
        assert!(cols <= from.stride && end(from.first, from.stride) <= len, "a part of the matrix");
        assert!(
            cols <= to.stride && end(to.first, to.stride) <= to.buffer.len(),
            "room for the part"
        );
        let address = |buffer: &Buffer<f32>, first: usize| buffer.address() + 4 * first as u64;
        let params = SubmatrixParams {
            to: address(to.buffer, to.first),
            from: address(from.buffer, from.first),
            minus: minus.map_or(0, |minus| address(minus, from.first)),
            to_stride: to.stride as u64,
            from_stride: from.stride as u64,
            rows: to_u32("a matrix with rows", rows)?,
            cols: to_u32("a matrix with columns", cols)?,
        };
        // SAFETY: all three matrices lie in live buffers, as checked.
        unsafe { self.device().launch(&elementwise("copy_submatrix", rows * cols, &params)) }
    }

    /// Queues `out[row, block]` = Σ `a` · `b` over each block of `span` columns of a row, in f64: `a`
    /// and `b` are of this size, `out` is [rows, blocks].
    ///
    /// # Errors
    /// As for [`LinearAlgebra::finish_hessian`].
    ///
    /// # Panics
    /// If a buffer is too small, or an operand is transposed.
    pub fn block_dots(
        &self,
        size: MatrixSize,
        span: usize,
        a: Operand<'_>,
        b: Operand<'_>,
        out: &mut Buffer<f64>,
    ) -> Result<()> {
        let MatrixSize { rows, cols } = size;
        let blocks = cols.div_ceil(span);
        if rows == 0 || blocks == 0 {
            return Ok(());
        }
        let fits = |m: &Operand<'_>| {
            let end = m.first + (rows - 1) * m.stride + cols;
            !m.is_transposed && cols <= m.stride && end <= m.buffer.len()
        };
        assert!(fits(&a) && fits(&b), "matrices of this size");
        assert!(out.len() >= rows * blocks, "room for the sums");
        let address = |m: &Operand<'_>| m.buffer.address() + 4 * m.first as u64;
        let params = BlockDotsParams {
            a: address(&a),
            b: address(&b),
            a_stride: a.stride as u64,
            b_stride: b.stride as u64,
            out: out.address(),
            rows: to_u32("a matrix with rows", rows)?,
            cols: to_u32("a matrix with columns", cols)?,
            span: to_u32("a block", span)?,
            blocks: to_u32("a row with blocks", blocks)?,
        };
        // A warp per block.
        let launch = elementwise("block_dots", rows * blocks * 32, &params);
        // SAFETY: the matrices and sums lie in live buffers, as checked.
        unsafe { self.device().launch(&launch) }
    }
}
