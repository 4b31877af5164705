//! Second moments and their factors on a device, and parts of matrices: what conversion needs beside products.

use bytemuck::{Pod, Zeroable};

use super::Result;
use super::compile::Module;
use super::device::{Buffer, Device};
use super::launch::{Launch, to_u32};
use super::vendor::Blas;

const THREADS: usize = 256;

/// `Square` of moments.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Square {
    single: u64,
    twice: u64,
    unit: u64,
    n: u32,
    scale: f32,
}

/// `Part` of moments.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Part {
    to: u64,
    from: u64,
    minus: u64,
    to_stride: u64,
    from_stride: u64,
    rows: u32,
    cols: u32,
}

/// `Dots` of moments.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Dots {
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

impl Square {
    fn plan(&self, kernel: &'static str) -> Launch {
        let n = self.n as usize;
        let blocks = [(n * n).div_ceil(THREADS), 1, 1];
        Launch::new(Module::MOMENTS, kernel, blocks, THREADS as u32, 0, self)
    }
}

/// The factors of a symmetric matrix H, [n, n]: H = M Mᵀ and U = M⁻¹, both upper triangular.
#[derive(Clone, Debug)]
pub struct Factors {
    /// U, [n, n].
    pub u: Vec<f32>,
    /// M, [n, n].
    pub m: Vec<f32>,
}

/// Dense matrices on one device: [`Blas`] and what lies between its products.
#[derive(Debug)]
pub struct Dense {
    blas: Blas,
}

impl Dense {
    /// With all that it needs: factors a number, so that a missing library or compiler is known at the start.
    ///
    /// # Errors
    /// As for [`Blas::new`] and [`Blas::cholesky`]; [`super::Error::Compiler`].
    pub fn new(device: &Device) -> Result<Self> {
        let mut dense = Self { blas: Blas::new(device)? };
        dense.factor(&[1.0], 1)?;
        Ok(dense)
    }

    /// The products.
    #[must_use]
    pub fn blas(&self) -> &Blas {
        &self.blas
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.blas.device()
    }

    /// Queues scaling the lower triangle of `h`, [n, n], and copying it to the upper one.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for sizes beyond what kernels count to, [`super::Error::Driver`].
    ///
    /// # Panics
    /// If the buffer is too small.
    pub fn finish(&self, h: &mut Buffer<f32>, n: usize, scale: f32) -> Result<()> {
        assert!(h.len() >= n * n, "a matrix of this size");
        let n = to_u32("a matrix with columns", n)?;
        let square = Square { single: h.address(), twice: 0, unit: 0, n, scale };
        // SAFETY: the matrix has room, as checked; the kernel uses nothing else.
        unsafe { self.device().launch(&square.plan("finish")) }
    }

    /// Factors `h`, [n, n] symmetric, in f64, and brings the factors to the host. `None` if it is not
    /// positive definite.
    ///
    /// # Errors
    /// As for [`Blas::cholesky`].
    ///
    /// # Panics
    /// If `h` has another size.
    pub fn factor(&mut self, h: &[f32], n: usize) -> Result<Option<Factors>> {
        assert_eq!(h.len(), n * n, "a square matrix");
        let single = self.device().upload("second moments", h)?;
        let mut twice = self.device().zeros::<f64>("a factor", n * n)?;
        let mut unit = self.device().zeros::<f64>("a factor", n * n)?;
        let size = to_u32("a matrix with columns", n)?;
        let square = |single: &Buffer<f32>, twice: u64, unit: u64| {
            let single = single.address();
            Square { single, twice, unit, n: size, scale: 1.0 }
        };
        let widen = square(&single, twice.address(), unit.address()).plan("widen");
        // SAFETY: all three matrices are [n, n].
        unsafe { self.device().launch(&widen) }?;
        if !self.blas.cholesky(&mut twice, n)? {
            return Ok(None);
        }
        self.blas.solve_lower(&twice, &mut unit, n)?;
        let host = |from: &Buffer<f64>| -> Result<Vec<f32>> {
            let narrow = square(&single, from.address(), 0).plan("narrow");
            // SAFETY: both matrices are [n, n]; the kernel does not use the third.
            unsafe { self.device().launch(&narrow) }?;
            let mut out = vec![0.0; n * n];
            single.read(&mut out)?;
            Ok(out)
        };
        let (u, m) = (host(&unit)?, host(&twice)?);
        // What the library makes of NaN is its own affair.
        if !m.iter().step_by(n + 1).all(|d| d.is_finite() && *d > 0.0) {
            return Ok(None);
        }
        Ok(Some(Factors { u, m }))
    }

    /// Queues copying `from` − `minus`, or `from`, both [rows, cols] from element `first` on with a row every
    /// `stride` elements, to `to`, from element `at.0` on with a row every `at.1`.
    ///
    /// # Errors
    /// As for [`Dense::finish`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn copy_part(
        &self,
        [rows, cols]: [usize; 2],
        from: &Buffer<f32>,
        minus: Option<&Buffer<f32>>,
        (first, stride): (usize, usize),
        to: &mut Buffer<f32>,
        at: (usize, usize),
    ) -> Result<()> {
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let end = |(first, stride): (usize, usize)| first + (rows - 1) * stride + cols;
        let read = minus.map_or(from.len(), |minus| minus.len().min(from.len()));
        assert!(cols <= stride && end((first, stride)) <= read, "a part of the matrix");
        assert!(cols <= at.1 && end(at) <= to.len(), "room for the part");
        let address = |buffer: &Buffer<f32>, first: usize| buffer.address() + 4 * first as u64;
        let part = Part {
            to: address(to, at.0),
            from: address(from, first),
            minus: minus.map_or(0, |minus| address(minus, first)),
            to_stride: at.1 as u64,
            from_stride: stride as u64,
            rows: to_u32("a matrix with rows", rows)?,
            cols: to_u32("a matrix with columns", cols)?,
        };
        let blocks = [(rows * cols).div_ceil(THREADS), 1, 1];
        let launch = Launch::new(Module::MOMENTS, "copy_part", blocks, THREADS as u32, 0, &part);
        // SAFETY: the parts lie in live buffers, as checked.
        unsafe { self.device().launch(&launch) }
    }

    /// Queues `out[row, block]` = Σ `a` · `b` over every `span` columns of a row, in f64: both [rows, cols], a row every so
    /// many elements, `out` [rows, blocks].
    ///
    /// # Errors
    /// As for [`Dense::finish`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn block_dots(
        &self,
        [rows, cols]: [usize; 2],
        span: usize,
        (a, a_stride): (&Buffer<f32>, usize),
        (b, b_stride): (&Buffer<f32>, usize),
        out: &mut Buffer<f64>,
    ) -> Result<()> {
        let blocks = cols.div_ceil(span);
        if rows == 0 || blocks == 0 {
            return Ok(());
        }
        let holds = |buffer: &Buffer<f32>, stride| {
            cols <= stride && (rows - 1) * stride + cols <= buffer.len()
        };
        assert!(holds(a, a_stride) && holds(b, b_stride), "matrices of this size");
        assert!(out.len() >= rows * blocks, "room for the sums");
        let dots = Dots {
            a: a.address(),
            b: b.address(),
            a_stride: a_stride as u64,
            b_stride: b_stride as u64,
            out: out.address(),
            rows: to_u32("a matrix with rows", rows)?,
            cols: to_u32("a matrix with columns", cols)?,
            span: to_u32("a block", span)?,
            blocks: to_u32("a row with blocks", blocks)?,
        };
        let grid = [(rows * blocks).div_ceil(THREADS / 32), 1, 1];
        let launch = Launch::new(Module::MOMENTS, "block_dots", grid, THREADS as u32, 0, &dots);
        // SAFETY: the matrices and sums lie in live buffers, as checked.
        unsafe { self.device().launch(&launch) }
    }
}
