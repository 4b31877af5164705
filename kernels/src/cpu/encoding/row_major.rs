//! Exact kernels of encodings that store rows one after another. An encoding yields the weights of a row in
//! vectors, which products and unpacking use.

use std::ops::Range;

use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::{Simd, lanes};
use crate::cpu::packed::UnpackBlock;
use crate::isa::Isa;

/// Columns that are decoded at once: four vectors, enough to hide the latency of additions.
pub(super) const STEP: usize = 64;

/// A matrix that can produce the weights of a row.
pub(super) trait RowMajor: Sync {
    fn cols(&self) -> usize;

    /// Calls `sink` with the first column and the weights of each [`STEP`] columns of `cols`
    /// (which starts at a multiple) in row `row`. Weights past the last column are unspecified.
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        sink: impl FnMut(usize, [S::F; 4]),
    );
}

/// See [`PackedMatrix::gemv`](crate::PackedMatrix::gemv); `x` is padded with zeros.
pub(super) fn gemv(isa: Isa, matrix: &impl RowMajor, x: &[f32], first: usize, y: &mut [f32]) {
    isa.run(RowMajorGemv { matrix, x, first, y });
}

struct RowMajorGemv<'a, M> {
    matrix: &'a M,
    x: &'a [f32],
    first: usize,
    y: &'a mut [f32],
}

impl<M: RowMajor> Task for RowMajorGemv<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        rows_product(s, self.matrix, self.x, self.first, self.y);
    }
}

/// See [`PackedMatrix::unpack`](crate::PackedMatrix::unpack).
pub(super) fn unpack(isa: Isa, matrix: &impl RowMajor, block: UnpackBlock, to: &mut [f32]) {
    isa.run(RowMajorUnpack { matrix, block, to });
}

struct RowMajorUnpack<'a, M> {
    matrix: &'a M,
    block: UnpackBlock,
    to: &'a mut [f32],
}

impl<M: RowMajor> Task for RowMajorUnpack<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, block, to } = self;
        let stored = (matrix.cols() - block.first_col).min(block.cols);
        for (r, to) in to.chunks_mut(block.cols).take(block.rows).enumerate() {
            unpack_row(s, matrix, block.first_row + r, block.first_col, &mut to[..stored]);
        }
    }
}

/// See [`gemv`].
#[inline(always)]
fn rows_product<S: Simd>(s: S, m: &impl RowMajor, x: &[f32], first: usize, y: &mut [f32]) {
    for (r, y) in y.iter_mut().enumerate() {
        let mut acc = [s.splat(0.0); 4];
        m.each(
            s,
            first + r,
            0..m.cols(),
            #[inline(always)]
            |col, w| {
                for k in 0..4 {
                    acc[k] = s.mul_add(w[k], s.load(lanes(x, col + 16 * k)), acc[k]);
                }
            },
        );
        *y = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    }
}

/// Writes columns `from..from + to.len()` of row `row` to `to`. `from` is a multiple of [`STEP`].
#[inline(always)]
fn unpack_row<S: Simd>(s: S, m: &impl RowMajor, row: usize, from: usize, to: &mut [f32]) {
    m.each(
        s,
        row,
        from..from + to.len(),
        #[inline(always)]
        |col, w| {
            let mut line = [0.0; STEP];
            let (parts, _) = line.as_chunks_mut::<16>();
            for (part, w) in parts.iter_mut().zip(w) {
                s.store(w, part);
            }
            let to = &mut to[col - from..];
            let n = to.len().min(STEP);
            to[..n].copy_from_slice(&line[..n]);
        },
    );
}

/// `N` bytes of `v` from `at`, in place; if fewer are left, these are copied to `spare` and padded with
/// zeros.
#[inline(always)]
pub(super) fn bytes<'a, const N: usize>(
    v: &'a [u8],
    at: usize,
    spare: &'a mut [u8; N],
) -> &'a [u8; N] {
    let rest = v.get(at..).unwrap_or_default();
    if let Some(chunk) = rest.first_chunk() {
        return chunk;
    }
    spare[..rest.len()].copy_from_slice(rest);
    spare
}
