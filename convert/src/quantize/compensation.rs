//! Error compensation: spreads the error of a block of columns over the columns that are not quantized yet.

use rayon::prelude::*;
use stb_kernels::cuda::{Buffer, GemmSize, Operand, OperandMut};
use stb_kernels::{Isa, Panels};
use stb_runtime::Result;

use crate::compute::{Accelerator, Compute, download_columns, upload};
use crate::hessian::Factor;
use crate::products::{TASK_ROWS, product};

/// How the error of a block is spread over the later columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Exactly: `(W − Q) · U_bb⁻¹ · U`.
    Solve,
    /// With the diagonal of `U_bb` only (BiLLM, published code).
    Diagonal,
    /// No compensation.
    Off,
}

/// Spreads the errors of quantized blocks of columns over the columns that are not quantized yet.
pub(crate) struct Compensation<'a> {
    compute: Compute<'a>,
    factor: &'a Factor,
    mode: Propagation,
    device: Option<DeviceCompensation<'a>>,
}

/// The operands of compensation on the device.
struct DeviceCompensation<'a> {
    accelerator: &'a Accelerator,
    weights: Buffer<f32>,
    u: Buffer<f32>,
    m: Buffer<f32>,
}

impl<'a> Compensation<'a> {
    /// Prepares compensation of `weights`, [rows, cols], before any is quantized.
    pub(crate) fn new(
        compute: Compute<'a>,
        weights: &[f32],
        factor: &'a Factor,
        mode: Propagation,
    ) -> Result<Self> {
        let device = match compute.accelerator {
            Some(accelerator) if mode != Propagation::Off => {
                let mut layers = accelerator.layers();
                let dense = layers.dense();
                let [weights, u, m] = [weights, &factor.u, &factor.m].map(|v| upload(dense, v));
                Some(DeviceCompensation { accelerator, weights: weights?, u: u?, m: m? })
            }
            _ => None,
        };
        Ok(Self { compute, factor, mode, device })
    }

    /// Spreads `errors`, [rows, width], of the columns `from..from + width` over all later columns. In `weights`, at
    /// least the next `ahead` columns are up to date when this returns; on a device, only these.
    pub(crate) fn spread(
        &mut self,
        weights: &mut [f32],
        errors: &[f32],
        from: usize,
        width: usize,
        ahead: usize,
    ) -> Result<()> {
        let (cols, later) = (self.factor.size, from + width);
        let Some(device) = &mut self.device else {
            let (isa, factor) = (self.compute.isa, self.factor);
            propagate(isa, weights, factor, errors, from, width, self.mode);
            return Ok(());
        };
        if later >= cols {
            return Ok(());
        }
        let mut layers = device.accelerator.layers();
        let dense = layers.dense();
        let rows = errors.len() / width;
        let scaled = if self.mode == Propagation::Solve {
            let errors = upload(dense, errors)?;
            let mut scaled = dense.device().zeros("errors", rows * width)?;
            let left = Operand::new(&errors, 0, width);
            let right = Operand::new(&device.m, from * cols + from, cols);
            let size = GemmSize { m: rows, n: width, k: width };
            let to = OperandMut::new(&mut scaled, 0, width);
            dense.blas().multiply(size, 1.0, left, right, 0.0, to)?;
            scaled
        } else {
            let diagonal = |j: usize| self.factor.m[j * (cols + 1)];
            let entries = errors.iter().enumerate().map(|(i, e)| e * diagonal(from + i % width));
            upload(dense, &entries.collect::<Vec<f32>>())?
        };
        let left = Operand::new(&scaled, 0, width);
        let right = Operand::new(&device.u, from * cols + later, cols);
        let size = GemmSize { m: rows, n: cols - later, k: width };
        let to = OperandMut::new(&mut device.weights, later, cols);
        dense.blas().multiply(size, -1.0, left, right, 1.0, to)?;
        download_columns(dense, &device.weights, weights, cols, later, ahead.min(cols - later))
    }
}

/// Spreads the errors of columns `from..from + width` over all later columns:
/// `w[:, later] -= (errors · M_bb) · U[block, later]`, the exact minimizer of the layer's output
/// error for fixed earlier columns, or with diag(M_bb). `errors` is [rows, width], W − Q of the
/// block.
pub(crate) fn propagate(
    isa: Isa,
    weights: &mut [f32], // [rows, cols]
    factor: &Factor,
    errors: &[f32],
    from: usize,
    width: usize,
    mode: Propagation,
) {
    let cols = factor.size;
    let later = from + width;
    if later == cols || mode == Propagation::Off {
        return;
    }
    let (mut diagonal, mut right) = (Panels::default(), Panels::default());
    diagonal.pack_transposed(&factor.m[from * cols + from..], width, width, cols);
    let entries: Vec<f32> = (from..later).map(|j| factor.m[j * (cols + 1)]).collect();
    right.pack_transposed(&factor.u[from * cols + later..], cols - later, width, cols);
    weights
        .par_chunks_mut(TASK_ROWS * cols)
        .zip(errors.par_chunks(TASK_ROWS * width))
        .for_each_init(Default::default, |scratch: &mut [Vec<f32>; 3], (weights, errors)| {
            let [scaled, compact, change] = scratch;
            compact.clear();
            if mode == Propagation::Solve {
                let stride = product(isa, errors, width, &diagonal, scaled);
                for row in scaled.chunks_exact(stride) {
                    compact.extend_from_slice(&row[..width]);
                }
            } else {
                for row in errors.chunks_exact(width) {
                    compact.extend(row.iter().zip(&entries).map(|(e, m)| e * m));
                }
            }
            let stride = product(isa, compact, width, &right, change);
            for (row, change) in weights.chunks_exact_mut(cols).zip(change.chunks_exact(stride)) {
                for (w, c) in row[later..].iter_mut().zip(change) {
                    *w -= c;
                }
            }
        });
}
