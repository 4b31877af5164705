//! What the libraries' functions do, on the memory of a simulated device: by the definitions of BLAS and
//! LAPACK, in columns, so that how they are called is tested too.

use super::super::simulated::Simulated;
use super::{Columns, Op};

/// `matrix[row, col]` of columns in memory that was read.
struct Matrix<T> {
    values: Vec<T>,
    stride: usize,
}

impl<T: bytemuck::Pod> Matrix<T> {
    fn read(memory: &Simulated, at: Columns, rows: i32, cols: i32) -> Self {
        let stride = at.stride as usize;
        assert!(rows <= at.stride && cols > 0, "columns do not overlap");
        let mut values = vec![T::zeroed(); (cols as usize - 1) * stride + rows as usize];
        memory.read(at.address, bytemuck::cast_slice_mut(&mut values)).expect("nothing is queued");
        Self { values, stride }
    }

    fn write(&self, memory: &Simulated, at: Columns) {
        memory.write(at.address, bytemuck::cast_slice(&self.values)).expect("nothing is queued");
    }

    fn at(&mut self, row: i32, col: i32) -> &mut T {
        &mut self.values[row as usize + col as usize * self.stride]
    }

    fn get(&self, row: i32, col: i32) -> T {
        self.values[row as usize + col as usize * self.stride]
    }
}

/// C [m, n] = alpha · op(A) · op(B) + beta · C.
pub(super) fn gemm(
    memory: &Simulated,
    ops: [Op; 2],
    [m, n, k]: [i32; 3],
    alpha: f32,
    a: Columns,
    b: Columns,
    beta: f32,
    c: Columns,
) {
    let stored = |op, rows, cols| if op == Op::None { (rows, cols) } else { (cols, rows) };
    let ((a_rows, a_cols), (b_rows, b_cols)) = (stored(ops[0], m, k), stored(ops[1], k, n));
    let a = Matrix::<f32>::read(memory, a, a_rows, a_cols);
    let b = Matrix::<f32>::read(memory, b, b_rows, b_cols);
    let mut to = Matrix::<f32>::read(memory, c, m, n);
    let get = |matrix: &Matrix<f32>, op, i, j| match op {
        Op::None => matrix.get(i, j),
        Op::Transpose => matrix.get(j, i),
    };
    for j in 0..n {
        for i in 0..m {
            let product = |l| f64::from(get(&a, ops[0], i, l)) * f64::from(get(&b, ops[1], l, j));
            let sum: f64 = (0..k).map(product).sum();
            let before = if beta == 0.0 { 0.0 } else { beta * to.get(i, j) };
            *to.at(i, j) = (f64::from(alpha) * sum) as f32 + before;
        }
    }
    to.write(memory, c);
}

/// The upper triangle of C [n, n] += A · Aᵀ, A [n, k].
pub(super) fn syrk(memory: &Simulated, n: i32, k: i32, a: Columns, c: Columns) {
    let a = Matrix::<f32>::read(memory, a, n, k);
    let mut to = Matrix::<f32>::read(memory, c, n, n);
    for j in 0..n {
        for i in 0..=j {
            let sum: f64 = (0..k).map(|l| f64::from(a.get(i, l)) * f64::from(a.get(j, l))).sum();
            *to.at(i, j) += sum as f32;
        }
    }
    to.write(memory, c);
}

/// The upper triangle of A [n, n] becomes that of U with Uᵀ U = A. 0, or the order of the first leading minor that
/// is not positive.
pub(super) fn potrf(memory: &Simulated, n: i32, at: Columns) -> i32 {
    let mut a = Matrix::<f64>::read(memory, at, n, n);
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
pub(super) fn trsm(memory: &Simulated, n: i32, a: Columns, b: Columns) {
    let a = Matrix::<f64>::read(memory, a, n, n);
    let mut x = Matrix::<f64>::read(memory, b, n, n);
    for i in 0..n {
        for j in 0..n {
            let sum: f64 = (0..j).map(|l| x.get(i, l) * a.get(l, j)).sum();
            *x.at(i, j) = (x.get(i, j) - sum) / a.get(j, j);
        }
    }
    x.write(memory, b);
}
