//! Large matrix products of a conversion, computed on the CPU or on a GPU.
//!
//! Matrices are copied to the GPU for one operation or one tensor. Codes, masks and scales are chosen on the CPU in
//! either case, by the same code.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use stb_kernels::cuda::{Buffer, Device, GemmSize, LinearAlgebra, MatrixSize, Operand, OperandMut};
use stb_kernels::{Isa, Panels};
use stb_runtime::{DeviceLayers, Model, Result};

use crate::hessian::{self, Factor, Hessian};
use crate::products::product_of;

/// A GPU that computes for conversions of one model.
pub struct Accelerator {
    layers: Mutex<DeviceLayers>,
    name: String,
}

impl fmt::Debug for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Accelerator({})", self.name)
    }
}

impl Accelerator {
    /// Prepares `device` for the decoder layers of `model`.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`] if the vendor's libraries are missing or a shape has no kernel.
    pub fn new(device: &Device, model: &Model) -> Result<Self> {
        let layers = Mutex::new(DeviceLayers::new(device, model)?);
        Ok(Self { layers, name: device.info().name.clone() })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The decoder layers and matrices on the device.
    pub(crate) fn layers(&self) -> MutexGuard<'_, DeviceLayers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The processor that computes large products.
#[derive(Clone, Copy, Debug)]
pub struct Compute<'a> {
    /// The instruction set of the CPU.
    pub isa: Isa,
    /// The GPU; `None` if the CPU computes all products.
    pub(crate) accelerator: Option<&'a Accelerator>,
}

impl From<Isa> for Compute<'_> {
    fn from(isa: Isa) -> Self {
        Self { isa, accelerator: None }
    }
}

/// The right-hand matrix of a product with inner dimension k.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Right<'a> {
    /// The matrix itself, [k, n].
    Plain(&'a [f32]),
    /// Its transpose, [n, k].
    Transposed(&'a [f32]),
}

impl Compute<'_> {
    /// `a` · `b`, [rows, n]; `a` is [rows, k].
    pub(crate) fn product(&self, a: &[f32], k: usize, b: Right<'_>, n: usize) -> Result<Vec<f32>> {
        let Some(accelerator) = self.accelerator else {
            let mut panels = Panels::default();
            match b {
                Right::Plain(b) => panels.pack_transposed(b, n, k, n),
                Right::Transposed(b) => panels.pack(b, k),
            }
            return Ok(product_of(self.isa, a, k, &panels, n));
        };
        let mut layers = accelerator.layers();
        let dense = layers.dense();
        let rows = a.len() / k;
        let left = upload(dense, a)?;
        let (Right::Plain(values) | Right::Transposed(values)) = b;
        let right = upload(dense, values)?;
        let right = match b {
            Right::Plain(_) => Operand::new(&right, 0, n),
            Right::Transposed(_) => Operand::new(&right, 0, k).transposed(),
        };
        let mut out = dense.device().zeros("a product", rows * n)?;
        let left = Operand::new(&left, 0, k);
        let to = OperandMut::new(&mut out, 0, n);
        dense.blas().multiply(GemmSize { m: rows, n, k }, 1.0, left, right, 0.0, to)?;
        download(&out, rows * n)
    }

    /// Factors a damped Hessian.
    ///
    /// # Errors
    /// As for [`Factor::new`]; [`stb_runtime::Error::Device`].
    pub(crate) fn factor(&self, hessian: &Hessian) -> Result<Factor> {
        let Some(accelerator) = self.accelerator else { return Factor::new(hessian) };
        let size = hessian.size;
        let factors = accelerator.layers().dense().factor(hessian.matrix(), size)?;
        let factors = factors.ok_or_else(hessian::not_positive_definite)?;
        Ok(Factor { size, u: factors.u, m: factors.m })
    }

    /// `a` · H⁻¹, [rows, in].
    pub(crate) fn times_inverse(&self, factor: &Factor, a: &[f32]) -> Result<Vec<f32>> {
        let (n, u) = (factor.size, &factor.u);
        let half = self.product(a, n, Right::Transposed(u), n)?;
        self.product(&half, n, Right::Plain(u), n)
    }

    /// (W H Wᵀ)_ii of each row of `weights`, [rows, in].
    pub(crate) fn output_errors(&self, weights: &[f32], hessian: &Hessian) -> Result<Vec<f64>> {
        let cols = hessian.size;
        let Some(accelerator) = self.accelerator else {
            return Ok(hessian::output_errors(self.isa, weights, hessian));
        };
        let mut layers = accelerator.layers();
        let dense = layers.dense();
        let rows = weights.len() / cols;
        let (w, h) = (upload(dense, weights)?, upload(dense, hessian.matrix())?);
        let mut product = dense.device().zeros("a product", rows * cols)?;
        let (left, right) = (Operand::new(&w, 0, cols), Operand::new(&h, 0, cols));
        let size = GemmSize { m: rows, n: cols, k: cols };
        let to = OperandMut::new(&mut product, 0, cols);
        dense.blas().multiply(size, 1.0, left, right, 0.0, to)?;
        let mut sums = dense.device().zeros::<f64>("sums", rows)?;
        let product = Operand::new(&product, 0, cols);
        dense.block_dots(MatrixSize { rows, cols }, cols, left, product, &mut sums)?;
        let mut out = vec![0.0; rows];
        sums.read(&mut out)?;
        Ok(out)
    }
}

/// Copies a matrix to the device.
pub(crate) fn upload(dense: &LinearAlgebra, values: &[f32]) -> Result<Buffer<f32>> {
    Ok(dense.device().upload("a matrix", values)?)
}

/// Copies the first `count` values of `buffer` from the device.
pub(crate) fn download(buffer: &Buffer<f32>, count: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; count];
    buffer.read(&mut out)?;
    Ok(out)
}

/// Copies columns `from..from + width` of `matrix`, [rows, cols] on the device, to the same columns of `host`.
pub(crate) fn download_columns(
    dense: &LinearAlgebra,
    matrix: &Buffer<f32>,
    host: &mut [f32],
    cols: usize,
    from: usize,
    width: usize,
) -> Result<()> {
    let rows = host.len() / cols;
    if width == 0 || rows == 0 {
        return Ok(());
    }
    let mut part = dense.device().zeros("columns of a matrix", rows * width)?;
    let size = MatrixSize { rows, cols: width };
    let to = OperandMut::new(&mut part, 0, width);
    dense.copy_submatrix(size, Operand::new(matrix, from, cols), None, to)?;
    let part = download(&part, rows * width)?;
    host.par_chunks_exact_mut(cols)
        .zip(part.par_chunks_exact(width))
        .for_each(|(row, part)| row[from..from + width].copy_from_slice(part));
    Ok(())
}
