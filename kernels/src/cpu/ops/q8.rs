//! Activations of one token, in f32 or quantized to 8 bits with one scale for each [`BLOCK`] columns, so that
//! an outlier costs precision in its block only.
//!
//! With a = max |x| of a block, x is stored as q = round(127·x/a), so |x − q·a/127| ≤ a/254, and a
//! product differs from the exact one by at most Σ_blocks a/254 · Σ|w|, apart from summation in
//! f32 over blocks. Within a block everything is exact integer arithmetic.

use crate::cpu::arch::bytes::{Aligned, Bytes, Line};
use crate::cpu::arch::simd::{Simd, lanes};

/// Columns that share the scale of q8 activations.
pub(crate) const BLOCK: usize = 128;

/// Activations are padded with zeros to a multiple of this many columns, so that kernels read whole
/// vectors.
pub(crate) const PAD: usize = 128;

/// Activations of one token, quantized and arranged as one encoding reads them. The encoding decides which
/// fields are used besides codes and scales.
#[derive(Default, Debug)]
pub(crate) struct TokenQ8 {
    /// The quantized activations.
    pub codes: Vec<i8>,
    /// a/127 of each block.
    pub scales: Vec<f32>,
    /// Codes, or sums of them, in the order in which a kernel reads them.
    pub tables: Vec<Line>,
    /// What is added to sums of products, for encodings with an offset.
    pub offsets: Vec<Aligned<[i32; 16]>>,
    /// `scales`, for each of 16 sums the one of its columns.
    pub lane_scales: Vec<Aligned<[f32; 16]>>,
}

impl TokenQ8 {
    /// Quantizes `x`, which is padded with zeros to whole blocks.
    #[inline(always)]
    pub(crate) fn quantize<S: Bytes>(&mut self, s: S, x: &[f32]) {
        self.scales.clear();
        self.codes.resize(x.len(), 0);
        for (block, codes) in x.chunks_exact(BLOCK).zip(self.codes.chunks_exact_mut(BLOCK)) {
            self.scales.push(quantize_block(s, block, codes));
        }
    }
}

/// Scratch for the activations of one token, prepared for one matrix.
#[derive(Default, Debug)]
pub struct GemvScratch {
    pub(crate) values: Vec<f32>,
    /// `values` times column factors, for encodings that quantize them and leave `values` as given.
    pub(crate) scaled: Vec<f32>,
    pub(crate) q8: TokenQ8,
    is_q8: bool,
}

/// Activations of one token ready for a matrix-vector product: padded, and quantized to 8 bits if requested and the
/// encoding has a kernel for it. The encoding applies its column factors to the quantized activations, or to all.
#[derive(Clone, Copy, Debug)]
pub struct GemvInput<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) q8: Option<&'a TokenQ8>,
}

impl GemvScratch {
    /// Stores `x` without rounding, for a matrix with `cols` columns.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn set(&mut self, x: &[f32], cols: usize) -> GemvInput<'_> {
        assert_eq!(x.len(), cols, "one activation per column");
        self.values.clear();
        self.values.extend_from_slice(x);
        self.values.resize(x.len().next_multiple_of(PAD), 0.0);
        self.is_q8 = false;
        self.input()
    }

    /// Declares that `q8` holds the activations.
    pub(crate) fn set_q8(&mut self) -> GemvInput<'_> {
        self.is_q8 = true;
        self.input()
    }

    /// The input prepared last.
    #[must_use]
    pub fn input(&self) -> GemvInput<'_> {
        GemvInput { values: &self.values, q8: self.is_q8.then_some(&self.q8) }
    }
}

impl<'a> GemvInput<'a> {
    /// The activations without rounding, padded with zeros.
    #[must_use]
    pub fn values(self) -> &'a [f32] {
        self.values
    }
}

/// Quantizes [`BLOCK`] activations to `codes` and returns their scale, NaN if one of them is not finite.
#[inline(always)]
pub(crate) fn quantize_block<S: Bytes>(s: S, block: &[f32], codes: &mut [i8]) -> f32 {
    let (mut max, mut poison) = (s.splat(0.0), s.splat(0.0));
    for at in (0..BLOCK).step_by(16) {
        let v = s.load(lanes(block, at));
        let magnitude = s.and(s.cast_i(v), s.splat_i(0x7fff_ffff));
        max = s.max(max, s.cast_f(magnitude));
        poison = s.mul_add(v, s.splat(0.0), poison);
    }
    // A value that is not finite has no code, so the scale, and with it the product, becomes NaN.
    if s.sum(poison).is_nan() {
        codes.fill(0);
        return f32::NAN;
    }
    let max = largest(s, max);
    // Blocks of zeros, and blocks so small that 127/max overflows, count as zero.
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
