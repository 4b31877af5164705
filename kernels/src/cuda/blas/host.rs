//! The library functions on the memory of a simulated device. They follow the definitions of BLAS and
//! LAPACK, column-major, so that tests also check how the functions are called.

use super::column_major::{ColumnMajor, GemmCall, GemmFactor, MatrixOp};
use crate::cuda::simulated::SimulatedMemory;

/// A copy of a column-major matrix.
struct HostMatrix<T> {
    values: Vec<T>,
    stride: usize,
}

impl<T: bytemuck::Pod> HostMatrix<T> {
    fn read(memory: &SimulatedMemory, at: ColumnMajor, rows: i32, cols: i32) -> Self {
        let stride = at.stride as usize;
        assert!(rows <= at.stride && cols > 0, "columns do not overlap");
        let mut values = vec![T::zeroed(); (cols as usize - 1) * stride + rows as usize];
        memory.read(at.address, bytemuck::cast_slice_mut(&mut values)).expect("nothing is queued");
        Self { values, stride }
    }

    fn write(&self, memory: &SimulatedMemory, at: ColumnMajor) {
        memory.write(at.address, bytemuck::cast_slice(&self.values)).expect("nothing is queued");
    }

    fn at(&mut self, row: i32, col: i32) -> &mut T {
        &mut self.values[row as usize + col as usize * self.stride]
    }

    fn get(&self, row: i32, col: i32) -> T {
        self.values[row as usize + col as usize * self.stride]
    }
}

/// The product that `call` describes.
pub(super) fn gemm(memory: &SimulatedMemory, call: &GemmCall) {
    let GemmCall { m, n, k, alpha, beta, .. } = *call;
    let stored = |op, rows, cols| if op == MatrixOp::None { (rows, cols) } else { (cols, rows) };
    let read = |factor: GemmFactor, rows, cols| {
        let (rows, cols) = stored(factor.op, rows, cols);
        HostMatrix::<f32>::read(memory, factor.matrix, rows, cols)
    };
    let (a, b) = (read(call.a, m, k), read(call.b, k, n));
    let mut c = HostMatrix::<f32>::read(memory, call.c, m, n);
    let get = |matrix: &HostMatrix<f32>, op, i, j| match op {
        MatrixOp::None => matrix.get(i, j),
        MatrixOp::Transpose => matrix.get(j, i),
    };
    for j in 0..n {
        for i in 0..m {
            let product =
                |l| f64::from(get(&a, call.a.op, i, l)) * f64::from(get(&b, call.b.op, l, j));
            let sum: f64 = (0..k).map(product).sum();
            let before = if beta == 0.0 { 0.0 } else { beta * c.get(i, j) };
            *c.at(i, j) = (f64::from(alpha) * sum) as f32 + before;
        }
    }
    c.write(memory, call.c);
}

/// The upper triangle of C [n, n] += A · Aᵀ, A [n, k].
pub(super) fn syrk(memory: &SimulatedMemory, n: i32, k: i32, a: ColumnMajor, c: ColumnMajor) {
    let a = HostMatrix::<f32>::read(memory, a, n, k);
    let mut product = HostMatrix::<f32>::read(memory, c, n, n);
    for j in 0..n {
        for i in 0..=j {
            let sum: f64 = (0..k).map(|l| f64::from(a.get(i, l)) * f64::from(a.get(j, l))).sum();
            *product.at(i, j) += sum as f32;
        }
    }
    product.write(memory, c);
}

/// Replaces the upper triangle of A [n, n] by that of U with Uᵀ U = A. Returns 0, or the order of the first
/// leading minor that is not positive.
pub(super) fn potrf(memory: &SimulatedMemory, n: i32, at: ColumnMajor) -> i32 {
    let mut a = HostMatrix::<f64>::read(memory, at, n, n);
    for j in 0..n {
        for i in 0..=j {
            let sum: f64 = (0..i).map(|l| a.get(l, i) * a.get(l, j)).sum();
            let rest = a.get(i, j) - sum;
            if i < j {
                *a.at(i, j) = rest / a.get(i, i);
            } else if rest > 0.0 {
                *a.at(i, j) = rest.sqrt();
            } else {
                return j + 1;
            }
        }
    }
    a.write(memory, at);
    0
}

/// B [n, n] = B · A⁻¹ with A [n, n] upper triangular.
pub(super) fn trsm(memory: &SimulatedMemory, n: i32, a: ColumnMajor, b: ColumnMajor) {
    let a = HostMatrix::<f64>::read(memory, a, n, n);
    let mut x = HostMatrix::<f64>::read(memory, b, n, n);
    for i in 0..n {
        for j in 0..n {
            let sum: f64 = (0..j).map(|l| x.get(i, l) * a.get(l, j)).sum();
            *x.at(i, j) = (x.get(i, j) - sum) / a.get(j, j);
        }
    }
    x.write(memory, b);
}
