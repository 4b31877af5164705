//! Fits quantized weights to the layer's output: scales in closed form, and the residual while codes change.

use rayon::prelude::*;
use stb_kernels::Panels;
use stb_kernels::cuda::{Buffer, GemmSize, MatrixSize, Operand, OperandMut};
use stb_runtime::Result;

use super::quantizer::Input;
use crate::compute::{Accelerator, download, download_columns, upload};
use crate::products::{TASK_ROWS, product, product_of};

/// A linear layer with its Hessian, on the device if there is one.
pub(super) struct Fitting<'a> {
    input: &'a Input<'a>,
    device: Option<DeviceHessian<'a>>,
}

/// The Hessian on the device.
pub(super) struct DeviceHessian<'a> {
    accelerator: &'a Accelerator,
    h: Buffer<f32>,
}

/// (W − Q) · H, [rows, cols], while Q changes block by block of columns.
pub(super) struct OutputResidual<'a> {
    fitting: &'a Fitting<'a>,
    /// Valid from the current block of columns on; on a device, in that block only.
    pub values: Vec<f32>,
    device: Option<Buffer<f32>>,
}

/// W − Q, [rows, cols], on the device.
pub(super) struct DeviceError<'a> {
    on: &'a DeviceHessian<'a>,
    values: Buffer<f32>,
    rows: usize,
    cols: usize,
}

impl<'a> Fitting<'a> {
    /// Copies the Hessian to the device, if there is one.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`].
    pub(super) fn new(input: &'a Input<'a>) -> Result<Self> {
        let device = match input.compute.accelerator {
            Some(accelerator) => {
                let h = upload(accelerator.layers().dense(), input.hessian.matrix())?;
                Some(DeviceHessian { accelerator, h })
            }
            None => None,
        };
        Ok(Self { input, device })
    }

    /// `weights` · H, [rows, cols].
    pub(super) fn times_hessian(&self, weights: &[f32]) -> Result<Vec<f32>> {
        let (input, cols) = (self.input, self.input.cols);
        let Some(on) = &self.device else {
            let mut panels = Panels::default();
            panels.pack(input.hessian.matrix(), cols);
            return Ok(product_of(input.compute.isa, weights, cols, &panels, cols));
        };
        let mut layers = on.accelerator.layers();
        let dense = layers.dense();
        let weights = upload(dense, weights)?;
        let mut out = dense.device().zeros("a product", weights.len())?;
        let (left, right) = (Operand::new(&weights, 0, cols), Operand::new(&on.h, 0, cols));
        let size = GemmSize { m: input.rows, n: cols, k: cols };
        dense.blas().multiply(size, 1.0, left, right, 0.0, OperandMut::new(&mut out, 0, cols))?;
        download(&out, weights.len())
    }

    /// The residual (W − Q) · H; `target` is W·H and `weights` Q, both [rows, cols]. The blocks of
    /// [`OutputResidual::update`] have up to `block` columns.
    pub(super) fn residual(
        &self,
        weights: &[f32],
        target: &[f32],
        block: usize,
    ) -> Result<OutputResidual<'_>> {
        let (input, cols) = (self.input, self.input.cols);
        let Some(on) = &self.device else {
            let mut values = self.times_hessian(weights)?;
            values.par_iter_mut().zip(target).for_each(|(r, t)| *r = t - *r);
            return Ok(OutputResidual { fitting: self, values, device: None });
        };
        let mut layers = on.accelerator.layers();
        let dense = layers.dense();
        let (weights, mut residual) = (upload(dense, weights)?, upload(dense, target)?);
        let (left, right) = (Operand::new(&weights, 0, cols), Operand::new(&on.h, 0, cols));
        let size = GemmSize { m: input.rows, n: cols, k: cols };
        dense.blas().multiply(
            size,
            -1.0,
            left,
            right,
            1.0,
            OperandMut::new(&mut residual, 0, cols),
        )?;
        let mut values = vec![0.0; target.len()];
        download_columns(dense, &residual, &mut values, cols, 0, block.min(cols))?;
        Ok(OutputResidual { fitting: self, values, device: Some(residual) })
    }

    /// The Hessian on the device, if there is one.
    pub(super) fn on_device(&self) -> Option<&DeviceHessian<'a>> {
        self.device.as_ref()
    }

    /// Replaces `scales`, [rows, blocks], by those that minimize the output error of `units`, [rows, cols], times one
    /// scale per `span` columns of a row. Solves (Tᵀ H T) α = Tᵀ H w for each row, where T has the units of block b in
    /// column b. `target` is W·H. A row with a singular system keeps its scales.
    pub(super) fn best_scales(
        &self,
        units: &[f32],
        span: usize,
        target: &[f32],
        scales: &mut [f32],
    ) -> Result<()> {
        let cols = self.input.cols;
        let blocks = cols.div_ceil(span);
        let mut systems = match &self.device {
            None => self.systems(units, span),
            Some(on) => self.systems_on_device(on, units, span)?,
        };
        scales
            .par_chunks_exact_mut(blocks)
            .zip(systems.par_chunks_exact_mut(blocks * blocks))
            .zip(units.par_chunks_exact(cols))
            .zip(target.par_chunks_exact(cols))
            .for_each(|(((scales, system), units), target)| {
                let parts = units.chunks(span).zip(target.chunks(span));
                let mut right: Vec<f64> = parts.map(|(s, t)| dot(s, t)).collect();
                if solve(system, &mut right) {
                    for (scale, value) in scales.iter_mut().zip(right) {
                        *scale = value as f32;
                    }
                }
            });
        Ok(())
    }

    /// Tᵀ H T of each row: [rows, blocks, blocks], the lower triangle.
    fn systems(&self, units: &[f32], span: usize) -> Vec<f64> {
        let (input, cols) = (self.input, self.input.cols);
        let blocks = cols.div_ceil(span);
        let mut systems = vec![0f64; input.rows * blocks * blocks];
        let mut panels = Panels::default();
        for b in 0..blocks {
            let (start, end) = (b * span, cols.min((b + 1) * span));
            let width = end - start;
            let rows_of_h = &input.hessian.matrix()[start * cols..end * cols];
            // Only columns up to the end of the block: the system is symmetric.
            panels.pack_transposed(rows_of_h, end, width, cols);
            let (isa, panels) = (input.compute.isa, &panels);
            systems
                .par_chunks_mut(TASK_ROWS * blocks * blocks)
                .zip(units.par_chunks(TASK_ROWS * cols))
                .for_each_init(
                    Default::default,
                    |scratch: &mut [Vec<f32>; 2], (systems, units)| {
                        let [part, out] = scratch;
                        part.clear();
                        units
                            .chunks_exact(cols)
                            .for_each(|s| part.extend_from_slice(&s[start..end]));
                        let stride = product(isa, part, width, panels, out);
                        let rows = systems.chunks_exact_mut(blocks * blocks);
                        for ((system, units), out) in
                            rows.zip(units.chunks_exact(cols)).zip(out.chunks_exact(stride))
                        {
                            let earlier = units[..end].chunks(span).zip(out[..end].chunks(span));
                            for (k, (s, p)) in earlier.enumerate() {
                                system[b * blocks + k] = dot(s, p);
                            }
                        }
                    },
                );
        }
        systems
    }

    fn systems_on_device(
        &self,
        on: &DeviceHessian<'_>,
        units: &[f32],
        span: usize,
    ) -> Result<Vec<f64>> {
        let (rows, cols) = (self.input.rows, self.input.cols);
        let blocks = cols.div_ceil(span);
        let mut layers = on.accelerator.layers();
        let dense = layers.dense();
        let units = upload(dense, units)?;
        let mut product = dense.device().zeros("a product", rows * cols)?;
        let mut sums = dense.device().zeros::<f64>("sums", rows * blocks)?;
        let mut host = vec![0.0; rows * blocks];
        let mut systems = vec![0f64; rows * blocks * blocks];
        for b in 0..blocks {
            let (start, end) = (b * span, cols.min((b + 1) * span));
            let size = GemmSize { m: rows, n: end, k: end - start };
            let left = Operand::new(&units, start, cols);
            let right = Operand::new(&on.h, start * cols, cols);
            dense.blas().multiply(
                size,
                1.0,
                left,
                right,
                0.0,
                OperandMut::new(&mut product, 0, end),
            )?;
            let size = MatrixSize { rows, cols: end };
            let (left, right) = (Operand::new(&units, 0, cols), Operand::new(&product, 0, end));
            dense.block_dots(size, span, left, right, &mut sums)?;
            let host = &mut host[..rows * (b + 1)];
            sums.read(host)?;
            systems
                .par_chunks_exact_mut(blocks * blocks)
                .zip(host.par_chunks_exact(b + 1))
                .for_each(|(system, sums)| {
                    system[b * blocks..][..=b].copy_from_slice(sums);
                });
        }
        Ok(systems)
    }
}

impl OutputResidual<'_> {
    /// Subtracts the effect of `changes`, [rows, width], of the weights of the block of columns at `from` from all later
    /// columns. The caller has updated the block itself; earlier columns become invalid.
    pub(super) fn update(&mut self, changes: &[f32], from: usize) -> Result<()> {
        let (input, cols) = (self.fitting.input, self.fitting.input.cols);
        let width = changes.len() / input.rows.max(1);
        let later = from + width;
        if later >= cols {
            return Ok(());
        }
        if let (Some(on), Some(residual)) = (&self.fitting.device, &mut self.device) {
            let mut layers = on.accelerator.layers();
            let dense = layers.dense();
            let changes = upload(dense, changes)?;
            let left = Operand::new(&changes, 0, width);
            let right = Operand::new(&on.h, from * cols + later, cols);
            let size = GemmSize { m: input.rows, n: cols - later, k: width };
            dense.blas().multiply(
                size,
                -1.0,
                left,
                right,
                1.0,
                OperandMut::new(residual, later, cols),
            )?;
            let next = width.min(cols - later);
            return download_columns(dense, residual, &mut self.values, cols, later, next);
        }
        let isa = input.compute.isa;
        let mut panels = Panels::default();
        let rows_of_h = &input.hessian.matrix()[from * cols + later..];
        panels.pack_transposed(rows_of_h, cols - later, width, cols);
        self.values
            .par_chunks_mut(TASK_ROWS * cols)
            .zip(changes.par_chunks(TASK_ROWS * width))
            .for_each_init(Vec::new, |scratch, (residual, changes)| {
                let stride = product(isa, changes, width, &panels, scratch);
                let rows = residual.chunks_exact_mut(cols).zip(scratch.chunks_exact(stride));
                for (residual, product) in rows {
                    for (r, p) in residual[later..].iter_mut().zip(product) {
                        *r -= p;
                    }
                }
            });
        Ok(())
    }
}

impl<'a> DeviceError<'a> {
    /// Copies `values`, [rows, cols], to the device.
    pub(super) fn new(on: &'a DeviceHessian<'a>, values: &[f32], cols: usize) -> Result<Self> {
        let rows = values.len() / cols;
        let values = upload(on.accelerator.layers().dense(), values)?;
        Ok(Self { on, values, rows, cols })
    }

    /// The product (W − Q) · H[:, columns] for the columns `from..from + width`, [rows, width].
    pub(super) fn times_columns(&self, from: usize, width: usize) -> Result<Vec<f32>> {
        let mut layers = self.on.accelerator.layers();
        let dense = layers.dense();
        let mut out = dense.device().zeros("a product", self.rows * width)?;
        let left = Operand::new(&self.values, 0, self.cols);
        let right = Operand::new(&self.on.h, from, self.cols);
        let size = GemmSize { m: self.rows, n: width, k: self.cols };
        dense.blas().multiply(size, 1.0, left, right, 0.0, OperandMut::new(&mut out, 0, width))?;
        download(&out, self.rows * width)
    }

    /// Replaces the columns `from..from + width` by `values`, [rows, width].
    pub(super) fn replace(&mut self, values: &[f32], from: usize, width: usize) -> Result<()> {
        let mut layers = self.on.accelerator.layers();
        let dense = layers.dense();
        let values = upload(dense, values)?;
        let size = MatrixSize { rows: self.rows, cols: width };
        let to = OperandMut::new(&mut self.values, from, self.cols);
        Ok(dense.copy_submatrix(size, Operand::new(&values, 0, width), None, to)?)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Solves a symmetric positive definite system, given by its lower triangle, by Cholesky factorization; false if it is
/// singular. Slight damping handles blocks with nearly the same units.
pub(super) fn solve(system: &mut [f64], right: &mut [f64]) -> bool {
    let n = right.len();
    let trace: f64 = (0..n).map(|i| system[i * n + i]).sum();
    if trace.is_nan() || trace <= 0.0 {
        return false;
    }
    for i in 0..n {
        system[i * n + i] += 1e-9 * trace / n as f64 + f64::MIN_POSITIVE;
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| system[i * n + k] * system[j * n + k]).sum();
            let rest = system[i * n + j] - sum;
            if i == j {
                if rest <= 0.0 {
                    return false;
                }
                system[i * n + i] = rest.sqrt();
            } else {
                system[i * n + j] = rest / system[j * n + j];
            }
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| system[i * n + k] * right[k]).sum();
        right[i] = (right[i] - sum) / system[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| system[k * n + i] * right[k]).sum();
        right[i] = (right[i] - sum) / system[i * n + i];
    }
    true
}
