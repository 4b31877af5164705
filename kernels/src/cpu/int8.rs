//! Products with activations rounded to 8 bits: one scale for each [`BLOCK`] columns, so that an
//! outlier costs precision only beside it.
//!
//! With a = max |x| of a block, x is stored as q = round(127·x/a), so |x − q·a/127| ≤ a/254, and a
//! product differs from the exact one by at most Σ_blocks a/254 · Σ|w|, apart from summation in
//! f32 over blocks. Within a block everything is exact integer arithmetic.

use stb_format::encoding::MatrixView;

use super::bytes::{Aligned, Line};
use super::int_group::{Arranged, arrange};
use super::{Bytes, Simd, lanes};

/// Columns that share the scale of activations.
pub(crate) const BLOCK: usize = 128;

/// Activations of one token, rounded, arranged for one kind of matrix.
#[derive(Default, Debug)]
pub(crate) struct Rounded {
    /// a/127 of each block.
    pub scales: Vec<f32>,
    /// What the kernel reads beside the codes; see [`super::nm8`],
    /// [`super::int_group`] and [`super::stbllm8`].
    pub tables: Vec<Line>,
    /// Sums of activations, for encodings with an offset.
    pub sums: Vec<Aligned<[i32; 16]>>,
    /// `scales` repeated for each 32 columns, for integer groups.
    pub unit_scales: Vec<Aligned<[f32; 16]>>,
    codes: Vec<i8>,
}

/// Whether there is a kernel for rounded activations.
pub(crate) fn supports(matrix: &MatrixView<'_>) -> bool {
    match matrix {
        // One scale of activations belongs to one scale of weights; no blocks (0) are fine.
        MatrixView::Nm(m) => m.spec.block().is_multiple_of(BLOCK),
        MatrixView::IntGroup(_) => true,
        MatrixView::Stbllm(m) => m.spec.block().is_multiple_of(BLOCK),
        MatrixView::Dense(_) => false,
    }
}

impl Rounded {
    /// Rounds `x`, which is padded with zeros to whole blocks, and arranges it for `matrix`.
    #[inline(always)]
    pub(crate) fn set<S: Bytes>(&mut self, s: S, matrix: &MatrixView<'_>, x: &[f32]) {
        self.round(s, x);
        match matrix {
            MatrixView::Nm(m) => super::nm8::tables(m.spec, &self.codes, &mut self.tables),
            MatrixView::IntGroup(m) => {
                let (tables, sums) = (&mut self.tables, &mut self.sums);
                let mut to = Arranged { tables, sums, unit_scales: &mut self.unit_scales };
                arrange(m.spec, &self.codes, &self.scales, &mut to);
            }
            MatrixView::Stbllm(_) => super::stbllm8::arrange(&self.codes, &mut self.tables),
            MatrixView::Dense(_) => {}
        }
    }

    #[inline(always)]
    fn round<S: Bytes>(&mut self, s: S, x: &[f32]) {
        self.scales.clear();
        self.codes.resize(x.len(), 0);
        for (block, codes) in x.chunks_exact(BLOCK).zip(self.codes.chunks_exact_mut(BLOCK)) {
            self.scales.push(round_block(s, block, codes));
        }
    }
}

/// Rounds [`BLOCK`] activations to `codes` and returns their scale, NaN if one of them is not finite.
#[inline(always)]
pub(crate) fn round_block<S: Bytes>(s: S, block: &[f32], codes: &mut [i8]) -> f32 {
    let (mut max, mut poison) = (s.splat(0.0), s.splat(0.0));
    for at in (0..BLOCK).step_by(16) {
        let v = s.load(lanes(block, at));
        let magnitude = s.and(s.cast_i(v), s.splat_i(0x7fff_ffff));
        max = s.max(max, s.cast_f(magnitude));
        poison = s.mul_add(v, s.splat(0.0), poison);
    }
    // What is not finite has no code: it makes the scale, and so the product, NaN.
    if s.sum(poison).is_nan() {
        codes.fill(0);
        return f32::NAN;
    }
    let max = largest(s, max);
    // Blocks of zeros, and such tiny ones that 127/max overflows, count as zero.
    let inverse = if 127.0 / max < f32::MAX { 127.0 / max } else { 0.0 };
    for (codes, at) in codes.as_chunks_mut().0.iter_mut().zip((0..BLOCK).step_by(16)) {
        // Within ±127: |x| ≤ max, and the product is rounded once more at most.
        let scaled = s.round(s.mul(s.load(lanes(block, at)), s.splat(inverse)));
        s.store_low_bytes(s.to_i32(scaled), codes);
    }
    max / 127.0
}

#[inline(always)]
fn largest<S: Simd>(s: S, v: S::F) -> f32 {
    let mut all = [0.0f32; 16];
    s.store(v, &mut all);
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            all[i] = if all[i + half] > all[i] { all[i + half] } else { all[i] };
        }
        half /= 2;
    }
    all[0]
}
