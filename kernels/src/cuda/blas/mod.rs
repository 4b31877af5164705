//! Dense products and factorizations with cuBLAS and cuSOLVER. Conversion computes with them, and
//! `gpu-check` compares the packed kernels with them.
//!
//! Matrices here are row-major. To the libraries, which are column-major, each of them is its
//! transpose: a product `A · B` is requested as `Bᵀ · Aᵀ`, and a lower triangle is an upper one.

mod column_major;
mod host;
mod libraries;
mod operand;

use super::device::{Buffer, Device};
use super::error::{Error, Result};
use super::simulated::SimulatedMemory;
use column_major::{ColumnMajor, DataType, GemmCall, GemmFactor, MatrixOp};
use libraries::CudaLibraries;
pub use operand::{GemmSize, MatrixSize, Operand, OperandMut};
use operand::{column_major, to_i32};

/// The library calls, with the meaning that BLAS and LAPACK give them.
#[derive(Debug)]
enum BlasBackend {
    Cuda(Box<CudaLibraries>),
    /// The host's own loops over simulated memory.
    Host,
}

/// Dense products and factorizations on one device. All work is queued on the device's stream.
#[derive(Debug)]
pub struct Blas {
    backend: BlasBackend,
    device: Device,
}

impl Blas {
    /// Loads the libraries and opens them for `device`.
    ///
    /// # Errors
    /// [`Error::Library`] if cuBLAS is not installed or does not work. cuSOLVER is loaded on first use.
    pub fn new(device: &Device) -> Result<Self> {
        let backend = match device.simulated_memory() {
            Some(_) => BlasBackend::Host,
            None => BlasBackend::Cuda(Box::new(CudaLibraries::new(device)?)),
        };
        Ok(Self { backend, device: device.clone() })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Queues `c` = `alpha` · `a` · `b` + `beta` · `c` in f32. With a `beta` of 0 the old content of
    /// `c` is not read.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn multiply(
        &self,
        size: GemmSize,
        alpha: f32,
        a: Operand<'_>,
        b: Operand<'_>,
        beta: f32,
        c: OperandMut<'_>,
    ) -> Result<()> {
        let GemmSize { m, n, k } = size;
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        // Bᵀ · Aᵀ is the transpose of the product.
        let (a, b) = (a.factor(m, k), b.factor(k, n));
        let c = c.column_major(MatrixSize { rows: m, cols: n });
        let (m, n, k) = (to_i32(n), to_i32(m), to_i32(k));
        self.gemm(DataType::F32, &GemmCall { m, n, k, alpha, a: b, b: a, beta, c })
    }

    /// Queues `y` = `x` · `w`ᵀ in bf16 with sums in f32: `x` is [m, k], `w` is [n, k] and `y` is
    /// [m, n].
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small.
    pub fn multiply_bf16(
        &self,
        size: GemmSize,
        x: &Buffer<u16>,
        w: &Buffer<u16>,
        y: &mut Buffer<u16>,
    ) -> Result<()> {
        let GemmSize { m, n, k } = size;
        let matrix = |buffer, rows, cols| column_major(buffer, 0, cols, MatrixSize { rows, cols });
        let a = GemmFactor { op: MatrixOp::Transpose, matrix: matrix(w, n, k) };
        let b = GemmFactor { op: MatrixOp::None, matrix: matrix(x, m, k) };
        let c = matrix(y, m, n);
        let (m, n, k) = (to_i32(n), to_i32(m), to_i32(k));
        self.gemm(DataType::Bf16, &GemmCall { m, n, k, alpha: 1.0, a, b, beta: 0.0, c })
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
        let x = column_major(x, 0, n, MatrixSize { rows: tokens, cols: n });
        let (h, k) = (square(h, n), to_i32(tokens));
        let n = to_i32(n);
        match &self.backend {
            // SAFETY: the matrices lie in live buffers with room for these sizes.
            BlasBackend::Cuda(library) => unsafe { library.syrk(&self.device, n, k, x, h) },
            BlasBackend::Host => {
                host::syrk(self.memory()?, n, k, x, h);
                Ok(())
            }
        }
    }

    /// Replaces the lower triangle of `matrix`, [n, n] symmetric and positive definite, by that of L
    /// with L Lᵀ = `matrix`. The upper triangle stays. Waits for the result, which is false if the
    /// matrix is not positive definite.
    ///
    /// # Errors
    /// [`Error::Library`] if cuSOLVER is not installed; [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If the buffer is too small.
    pub fn cholesky(&mut self, matrix: &mut Buffer<f64>, n: usize) -> Result<bool> {
        let a = square(matrix, n);
        let info = match &mut self.backend {
            // SAFETY: the matrix lies in a live buffer with room for this size.
            BlasBackend::Cuda(library) => unsafe { library.potrf(&self.device, to_i32(n), a)? },
            BlasBackend::Host => host::potrf(self.memory()?, to_i32(n), a),
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
        let (a, x) = (square(lower, n), square(x, n));
        match &self.backend {
            // SAFETY: both matrices lie in live buffers with room for this size.
            BlasBackend::Cuda(library) => unsafe { library.trsm(&self.device, to_i32(n), a, x) },
            BlasBackend::Host => {
                host::trsm(self.memory()?, to_i32(n), a, x);
                Ok(())
            }
        }
    }

    fn gemm(&self, data: DataType, call: &GemmCall) -> Result<()> {
        match &self.backend {
            // SAFETY: the caller has checked that the matrices lie in live buffers.
            BlasBackend::Cuda(library) => unsafe { library.gemm(&self.device, data, call) },
            BlasBackend::Host => {
                assert_eq!(data, DataType::F32, "products in bf16 are for measurements");
                host::gemm(self.memory()?, call);
                Ok(())
            }
        }
    }

    /// The simulated memory, after all queued work is done.
    fn memory(&self) -> Result<&SimulatedMemory> {
        let memory = self.device.simulated_memory().expect("a simulated device");
        memory.synchronize()?;
        Ok(memory)
    }
}

/// A square matrix that fills its buffer from the start.
fn square<T>(buffer: &Buffer<T>, n: usize) -> ColumnMajor {
    column_major(buffer, 0, n, MatrixSize { rows: n, cols: n })
}
