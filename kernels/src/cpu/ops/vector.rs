//! The operations of a decoder layer between its matrix products.

use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::Simd;
use crate::isa::Isa;

/// Σ a`[i]`·b`[i]`.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    isa.run(DotTask { a, b })
}

struct DotTask<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Task for DotTask<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) -> f32 {
        dot_lanes(s, self.a, self.b)
    }
}

#[inline(always)]
fn dot_lanes<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    if a.len() < 16 {
        // For narrow heads setting up vectors would cost more than the product.
        return a.iter().zip(b).fold(0.0, |sum, (a, b)| a * b + sum);
    }
    let mut acc = [s.splat(0.0); 2];
    let (a_vectors, a_tail) = a.as_chunks::<16>();
    let (b_vectors, b_tail) = b.as_chunks::<16>();
    for (k, (a, b)) in a_vectors.iter().zip(b_vectors).enumerate() {
        acc[k & 1] = s.mul_add(s.load(a), s.load(b), acc[k & 1]);
    }
    let (mut a, mut b) = ([0.0; 16], [0.0; 16]);
    a[..a_tail.len()].copy_from_slice(a_tail);
    b[..b_tail.len()].copy_from_slice(b_tail);
    let tail = s.mul_add(s.load(&a), s.load(&b), acc[1]);
    s.sum(s.add(acc[0], tail))
}

/// RMSNorm: `out[i] = x[i] · weight[i] / sqrt(mean(x²) + eps)`.
///
/// # Panics
/// If the lengths differ.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let scale = 1.0 / (dot(isa, x, x) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = (x * scale) * w;
    }
}

/// RMSNorm with 1 + w: `out[i] = x[i] · (1 + weight[i]) / sqrt(mean(x²) + eps)`.
///
/// # Panics
/// If the lengths differ.
pub fn rms_norm_plus_one(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let scale = 1.0 / (dot(isa, x, x) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = (x * scale) * (1.0 + w);
    }
}

/// LayerNorm: `out[i] = (x[i] − mean(x)) · weight[i] / sqrt(var(x) + eps) + bias[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn layer_norm(isa: Isa, x: &[f32], [weight, bias]: [&[f32]; 2], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == bias.len() && x.len() == out.len());
    let n = x.len() as f32;
    // Lanes are added in one order on every instruction set.
    let mean = x.iter().sum::<f32>() / n;
    for (o, x) in out.iter_mut().zip(x) {
        *o = x - mean;
    }
    let scale = 1.0 / (dot(isa, out, out) / n + eps).sqrt();
    for ((o, w), b) in out.iter_mut().zip(weight).zip(bias) {
        *o = (*o * scale) * w + b;
    }
}

/// exp with a relative error below 2e-7, the same bits on every instruction set: the argument is
/// split into a power of two and a remainder for a polynomial (Cody and Waite).
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Outside this range the result would overflow or become subnormal.
    let x = s.min(s.max(x, s.splat(-87.3)), s.splat(88.3));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, so that n·ln 2 is exact enough.
    let r = s.mul_add(n, s.splat(-0.693_359_4), x);
    let r = s.mul_add(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.mul_add(p, r, s.splat(c));
    }
    let p = s.add(s.mul_add(p, s.mul(r, r), r), s.splat(1.0));
    let power = s.shl(s.add_i(s.to_i32(n), s.splat_i(127)), 23);
    s.mul(p, s.cast_f(power))
}

/// exp(x) for x ≤ 0, and zero below e⁻⁸⁰: divided by a sum it could become subnormal, and each product
/// with a subnormal number takes a hundred cycles. NaN stays NaN.
#[inline(always)]
fn softmax_weight<S: Simd>(s: S, x: S::F) -> S::F {
    let magnitude = s.and(s.cast_i(x), s.splat_i(0x7fff_ffff));
    let large = s.gt_i(s.splat_i(80f32.to_bits()), magnitude);
    let nan = s.and(s.gt_i(magnitude, s.splat_i(0x7f80_0000)), s.splat_i(f32::NAN.to_bits()));
    s.cast_f(s.or(s.and(s.cast_i(exp(s, x)), large), nan))
}

/// Softmax in place: exp(x − max) divided by the sum. Shares below e⁻⁸⁰ of the largest are zero.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    isa.run(SoftmaxTask { x });
}

/// ln Σ exp(x`[i]`).
#[must_use]
pub fn log_sum_exp(isa: Isa, x: &[f32]) -> f32 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max + isa.run(ExpSumTask { x, max }).ln()
}

struct SoftmaxTask<'a> {
    x: &'a mut [f32],
}

impl Task for SoftmaxTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let (vectors, tail) = self.x.as_chunks_mut::<16>();
        // Padding of minus infinity adds nothing to the sum.
        let mut last = [f32::NEG_INFINITY; 16];
        last[..tail.len()].copy_from_slice(tail);
        let mut max = s.load(&last);
        for v in &*vectors {
            max = s.max(max, s.load(v));
        }
        let mut lanes = [0.0; 16];
        s.store(max, &mut lanes);
        let max = s.splat(lanes.into_iter().fold(f32::NEG_INFINITY, f32::max));
        let mut acc = s.splat(0.0);
        for v in &mut *vectors {
            let e = softmax_weight(s, s.sub(s.load(v), max));
            s.store(e, v);
            acc = s.add(acc, e);
        }
        let e = softmax_weight(s, s.sub(s.load(&last), max));
        let scale = s.splat(1.0 / s.sum(s.add(acc, e)));
        for v in vectors {
            s.store(s.mul(s.load(v), scale), v);
        }
        s.store(s.mul(e, scale), &mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Σ exp(x − max).
struct ExpSumTask<'a> {
    x: &'a [f32],
    max: f32,
}

impl Task for ExpSumTask<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) -> f32 {
        let max = s.splat(self.max);
        let mut acc = s.splat(0.0);
        let (vectors, tail) = self.x.as_chunks::<16>();
        for v in vectors {
            acc = s.add(acc, exp(s, s.sub(s.load(v), max)));
        }
        s.sum(s.add(acc, s.load(&exp_tail(s, tail, self.max))))
    }
}

/// exp(x − max) of the last elements, zero after them.
#[inline(always)]
fn exp_tail<S: Simd>(s: S, tail: &[f32], max: f32) -> [f32; 16] {
    let mut last = [0.0; 16];
    last[..tail.len()].copy_from_slice(tail);
    let e = exp(s, s.sub(s.load(&last), s.splat(max)));
    s.store(e, &mut last);
    last[tail.len()..].fill(0.0);
    last
}
