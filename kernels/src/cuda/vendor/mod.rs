//! Dense products and factorizations by the vendor's libraries, cuBLAS and cuSOLVER: what conversion
//! computes with, and what our kernels are measured against.
//!
//! Matrices here are row-major. The libraries' are column-major: to them each is its transpose, so a
//! product `A · B` is asked for as `Bᵀ · Aᵀ`, and a lower triangle is an upper one.

mod library;
mod simulated;

use super::device::{Buffer, Device};
use super::{Error, Result};
use library::Library;

/// `cublasOperation_t`: the matrix as it is (in columns), or its transpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    None = 0,
    Transpose = 1,
}

/// `cudaDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    F32 = 0,
    Bf16 = 14,
}

/// A column-major matrix: address and leading dimension.
#[derive(Clone, Copy, Debug)]
struct Columns {
    address: u64,
    stride: i32,
}

/// The calls that are made, with the meaning that BLAS and LAPACK give them. Columns.
#[derive(Debug)]
enum Vendor {
    Library(Box<Library>),
    /// The host's own loops over simulated memory.
    Simulated,
}

/// A matrix of a product: in device memory by rows, or the transpose of what is there.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    buffer: &'a Buffer<f32>,
    at: usize,
    stride: usize,
    transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix whose first element is element `at` of `buffer`, with `stride` elements from one row to the
    /// next.
    #[must_use]
    pub fn new(buffer: &'a Buffer<f32>, at: usize, stride: usize) -> Self {
        Self { buffer, at, stride, transposed: false }
    }

    /// Its transpose.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// As an operand of the library, if it is [rows, cols] after transposition.
    fn columns(&self, rows: usize, cols: usize) -> (Op, Columns) {
        let (op, [rows, cols]) = match self.transposed {
            false => (Op::None, [rows, cols]),
            true => (Op::Transpose, [cols, rows]),
        };
        (op, columns(self.buffer, self.at, self.stride, rows, cols))
    }
}

/// # Panics
/// If the buffer does not hold [rows, cols] from `at` on, or a size is no `i32`.
fn columns<T>(buffer: &Buffer<T>, at: usize, stride: usize, rows: usize, cols: usize) -> Columns {
    assert!(cols <= stride && rows > 0, "rows do not overlap");
    assert!(at + (rows - 1) * stride + cols <= buffer.len(), "a matrix of this size");
    Columns { address: buffer.address() + (at * size_of::<T>()) as u64, stride: size(stride) }
}

fn size(n: usize) -> i32 {
    i32::try_from(n).expect("a size of a matrix")
}

/// Dense linear algebra on one device. Everything is queued on the device's stream.
#[derive(Debug)]
pub struct Blas {
    vendor: Vendor,
    device: Device,
}

impl Blas {
    /// Loads the libraries and opens them for `device`.
    ///
    /// # Errors
    /// [`Error::Library`] if cuBLAS is not installed or does not work. cuSOLVER is asked for when it is
    /// needed first.
    pub fn new(device: &Device) -> Result<Self> {
        let vendor = match device.simulated_memory() {
            Some(_) => Vendor::Simulated,
            None => Vendor::Library(Box::new(Library::new(device)?)),
        };
        Ok(Self { vendor, device: device.clone() })
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Queues `c` = `alpha` · `a` · `b` + `beta` · `c` in f32: `a` [m, k], `b` [k, n], `c` [m, n] from element
    /// `to.0` of the buffer on, a row every `to.1` elements. What is in `c` is not read for a `beta` of 0.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        alpha: f32,
        a: Operand<'_>,
        b: Operand<'_>,
        beta: f32,
        c: &mut Buffer<f32>,
        to: (usize, usize),
    ) -> Result<()> {
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        let ((op_a, a), (op_b, b)) = (a.columns(m, k), b.columns(k, n));
        let c = columns(c, to.0, to.1, m, n);
        let sizes = [n, m, k].map(size);
        self.gemm(Number::F32, [op_b, op_a], sizes, alpha, b, a, beta, c)
    }

    /// Queues `y` = `x` · `w`ᵀ in bf16 with sums in f32: `w` [rows, cols], `x` [tokens, cols], `y` [tokens, rows].
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn multiply_bf16(
        &self,
        w: &Buffer<u16>,
        x: &Buffer<u16>,
        y: &mut Buffer<u16>,
        [rows, cols, tokens]: [usize; 3],
    ) -> Result<()> {
        let w = columns(w, 0, cols, rows, cols);
        let x = columns(x, 0, cols, tokens, cols);
        let y = columns(y, 0, rows, tokens, rows);
        let sizes = [rows, tokens, cols].map(size);
        self.gemm(Number::Bf16, [Op::Transpose, Op::None], sizes, 1.0, w, x, 0.0, y)
    }

    /// Queues the lower triangle of `h` += `x`ᵀ · `x`: `x` [tokens, n], `h` [n, n]. The upper triangle stays.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn add_gram(
        &self,
        x: &Buffer<f32>,
        tokens: usize,
        n: usize,
        h: &mut Buffer<f32>,
    ) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        let (x, h) = (columns(x, 0, n, tokens, n), columns(h, 0, n, n, n));
        let [n, k] = [n, tokens].map(size);
        match &self.vendor {
            // SAFETY: the matrices lie in live buffers with room for these sizes.
            Vendor::Library(library) => unsafe { library.syrk(&self.device, n, k, x, h) },
            Vendor::Simulated => {
                simulated::syrk(self.memory()?, n, k, x, h);
                Ok(())
            }
        }
    }

    /// Replaces the lower triangle of `matrix`, [n, n] symmetric and positive definite, by that of L with
    /// L Lᵀ = `matrix`. The upper triangle stays. Waits; false if it is not positive definite.
    ///
    /// # Errors
    /// [`Error::Library`] if cuSOLVER is not installed; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If the buffer is too small.
    pub fn cholesky(&mut self, matrix: &mut Buffer<f64>, n: usize) -> Result<bool> {
        let a = columns(matrix, 0, n, n, n);
        let info = match &mut self.vendor {
            // SAFETY: the matrix lies in a live buffer with room for this size.
            Vendor::Library(library) => unsafe { library.potrf(&self.device, size(n), a)? },
            Vendor::Simulated => simulated::potrf(self.memory()?, size(n), a),
        };
        match info {
            0 => Ok(true),
            1.. => Ok(false),
            _ => Err(Error::Driver {
                what: "factorize with cuSOLVER",
                error: format!("argument {} is wrong", -info),
            }),
        }
    }

    /// Queues `x` = L⁻¹ · `x`: `lower` [n, n] with L in its lower triangle, `x` [n, n].
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn solve_lower(&self, lower: &Buffer<f64>, x: &mut Buffer<f64>, n: usize) -> Result<()> {
        let (a, x) = (columns(lower, 0, n, n, n), columns(x, 0, n, n, n));
        match &self.vendor {
            // SAFETY: both matrices lie in live buffers with room for this size.
            Vendor::Library(library) => unsafe { library.trsm(&self.device, size(n), a, x) },
            Vendor::Simulated => {
                simulated::trsm(self.memory()?, size(n), a, x);
                Ok(())
            }
        }
    }

    fn gemm(
        &self,
        number: Number,
        ops: [Op; 2],
        sizes: [i32; 3],
        alpha: f32,
        a: Columns,
        b: Columns,
        beta: f32,
        c: Columns,
    ) -> Result<()> {
        match &self.vendor {
            // SAFETY: the caller has checked that the matrices lie in live buffers.
            Vendor::Library(library) => unsafe {
                library.gemm(&self.device, number, ops, sizes, alpha, a, b, beta, c)
            },
            Vendor::Simulated => {
                assert_eq!(number, Number::F32, "products in bf16 are for measurements");
                simulated::gemm(self.memory()?, ops, sizes, alpha, a, b, beta, c);
                Ok(())
            }
        }
    }

    fn memory(&self) -> Result<&super::simulated::Simulated> {
        let memory = self.device.simulated_memory().expect("a simulated device");
        // As on a stream: after what is queued.
        memory.synchronize()?;
        Ok(memory)
    }
}
