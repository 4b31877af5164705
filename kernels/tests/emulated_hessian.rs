//! Hessians, their factors and products of dense matrices as in a conversion, on an emulated device with
//! libraries that follow the definitions of BLAS and LAPACK.

mod common;

use common::machine::device_in_orders;
use stb_kernels::cuda::{GemmSize, LinearAlgebra, MatrixSize, Operand, OperandMut};

/// Values from −1 to 1 without a pattern.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405) + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn close(found: f32, expected: f64, what: &str) {
    assert!(
        (f64::from(found) - expected).abs() <= 1e-4 * (1.0 + expected.abs()),
        "{what}: {found} {expected}"
    );
}

/// Products of parts of matrices, with each operand plain and transposed, added to a part of a third matrix.
#[test]
fn products_of_parts_of_matrices() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let dense = LinearAlgebra::new(&device).unwrap();
    let (m, n, k) = (5, 7, 3);
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let (first, pad) = (11, 4);
        let [a_rows, a_cols] = if transpose_a { [k, m] } else { [m, k] };
        let [b_rows, b_cols] = if transpose_b { [n, k] } else { [k, n] };
        let a = numbers(first + a_rows * (a_cols + pad), 1);
        let b = numbers(first + b_rows * (b_cols + pad), 2);
        let before = numbers(first + m * (n + pad), 3);
        let (on_a, on_b) = (device.upload("a", &a).unwrap(), device.upload("b", &b).unwrap());
        let mut on_c = device.upload("c", &before).unwrap();
        let operand = |buffer, cols, transposed| {
            let operand = Operand::new(buffer, first, cols + pad);
            if transposed { operand.transposed() } else { operand }
        };
        let (left, right) =
            (operand(&on_a, a_cols, transpose_a), operand(&on_b, b_cols, transpose_b));
        let to = OperandMut::new(&mut on_c, first, n + pad);
        dense.blas().multiply(GemmSize { m, n, k }, -2.0, left, right, 1.0, to).unwrap();
        let mut c = vec![0.0; before.len()];
        on_c.read(&mut c).unwrap();
        let a = |i: usize, j: usize| f64::from(a[first + i * (a_cols + pad) + j]);
        let b = |i: usize, j: usize| f64::from(b[first + i * (b_cols + pad) + j]);
        for (at, (found, before)) in c.iter().zip(&before).enumerate() {
            let inside = at.checked_sub(first).map(|at| (at / (n + pad), at % (n + pad)));
            let Some((i, j)) = inside.filter(|(_, j)| *j < n) else {
                assert_eq!(found, before, "outside at {at}");
                continue;
            };
            let sum: f64 = (0..k)
                .map(|l| {
                    let left = if transpose_a { a(l, i) } else { a(i, l) };
                    left * if transpose_b { b(j, l) } else { b(l, j) }
                })
                .sum();
            close(*found, f64::from(*before) - 2.0 * sum, "product");
        }
    }
}

#[test]
fn hessians_and_their_factors() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let mut dense = LinearAlgebra::new(&device).unwrap();
    let (n, tokens) = (37, 90);
    let x = numbers(n * tokens, 4);
    let mut h = device.zeros("h", n * n).unwrap();
    // In two parts, like two batches.
    for part in x.chunks(n * 40) {
        let part_on = device.upload("x", part).unwrap();
        dense.blas().add_gram(&part_on, part.len() / n, n, &mut h).unwrap();
    }
    dense.finish_hessian(&mut h, n, 0.5).unwrap();
    let mut matrix = vec![0.0; n * n];
    h.read(&mut matrix).unwrap();
    for i in 0..n {
        for j in 0..n {
            let sum: f64 =
                (0..tokens).map(|t| f64::from(x[t * n + i]) * f64::from(x[t * n + j])).sum();
            close(matrix[i * n + j], 0.5 * sum, "Hessian");
        }
    }
    let factors = dense.factor(&matrix, n).unwrap().unwrap();
    let at = |m: &[f32], i: usize, j: usize| f64::from(m[i * n + j]);
    for i in 0..n {
        for j in 0..n {
            let h: f64 = (0..n).map(|k| at(&factors.m, i, k) * at(&factors.m, j, k)).sum();
            close(matrix[i * n + j], h, "M Mt");
            let one: f64 = (0..n).map(|k| at(&factors.m, i, k) * at(&factors.u, k, j)).sum();
            assert!((one - f64::from(i == j)).abs() < 1e-3, "{i} {j}: {one}");
            assert!(i <= j || (at(&factors.u, i, j) == 0.0 && at(&factors.m, i, j) == 0.0));
        }
    }
    matrix[5 * n + 5] = -1.0;
    assert!(dense.factor(&matrix, n).unwrap().is_none(), "not positive definite");
}

#[test]
fn parts_are_copied_and_subtracted() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let dense = LinearAlgebra::new(&device).unwrap();
    let (rows, cols, stride) = (6, 5, 9);
    let (from, minus) = (numbers(rows * stride, 5), numbers(rows * stride, 6));
    let (on_from, on_minus) =
        (device.upload("from", &from).unwrap(), device.upload("minus", &minus).unwrap());
    for subtract in [false, true] {
        let mut to = device.upload("to", &vec![7.0f32; 4 + rows * 6]).unwrap();
        let minus_on = subtract.then_some(&on_minus);
        let part = Operand::new(&on_from, 3, stride);
        let out = OperandMut::new(&mut to, 4, 6);
        dense.copy_submatrix(MatrixSize { rows, cols }, part, minus_on, out).unwrap();
        let mut out = vec![0.0; to.len()];
        to.read(&mut out).unwrap();
        for (i, found) in out.iter().enumerate() {
            let inside = i.checked_sub(4).map(|i| (i / 6, i % 6)).filter(|(_, c)| *c < cols);
            let expected = inside.map_or(7.0, |(r, c)| {
                let at = 3 + r * stride + c;
                from[at] - if subtract { minus[at] } else { 0.0 }
            });
            assert_eq!(*found, expected);
        }
    }
}

#[test]
fn sums_of_products_by_blocks_of_columns() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let dense = LinearAlgebra::new(&device).unwrap();
    for (rows, cols, span) in [(5, 130, 64), (3, 40, 100), (9, 7, 1)] {
        let (a, b) = (numbers(rows * (cols + 3), 7), numbers(rows * cols, 8));
        let (on_a, on_b) = (device.upload("a", &a).unwrap(), device.upload("b", &b).unwrap());
        let blocks = cols.div_ceil(span);
        let mut sums = device.zeros::<f64>("sums", rows * blocks).unwrap();
        let (left, right) = (Operand::new(&on_a, 0, cols + 3), Operand::new(&on_b, 0, cols));
        dense.block_dots(MatrixSize { rows, cols }, span, left, right, &mut sums).unwrap();
        let mut found = vec![0.0; rows * blocks];
        sums.read(&mut found).unwrap();
        for (i, found) in found.into_iter().enumerate() {
            let (row, block) = (i / blocks, i % blocks);
            let expected: f64 = (block * span..cols.min((block + 1) * span))
                .map(|c| f64::from(a[row * (cols + 3) + c]) * f64::from(b[row * cols + c]))
                .sum();
            assert!((found - expected).abs() < 1e-9, "{row} {block}: {found} {expected}");
        }
    }
}
