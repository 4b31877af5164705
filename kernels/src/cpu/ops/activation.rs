//! The activation functions of an MLP, and the soft cap of attention scores.

use stb_format::Activation;

use super::vector::exp;
use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::Simd;
use crate::isa::Isa;

/// `gate[i] = act(gate[i]) · up[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn activate_mul(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    isa.run(GatedTask { activation, gate, up });
}

/// `x[i] = act(x[i])`.
pub fn activate(isa: Isa, activation: Activation, x: &mut [f32]) {
    isa.run(ActivateTask { activation, x });
}

/// `x[i] = cap · tanh(x[i] / cap)`.
pub fn soft_cap(isa: Isa, cap: f32, x: &mut [f32]) {
    isa.run(CapTask { cap, x });
}

struct GatedTask<'a> {
    activation: Activation,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Task for GatedTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { activation, gate, up } = self;
        match activation {
            Activation::Silu => {
                let one = s.splat(1.0);
                for_pairs(
                    s,
                    gate,
                    up,
                    #[inline(always)]
                    |s, gate, up| {
                        let minus = s.sub(s.splat(0.0), gate);
                        s.mul(s.div(gate, s.add(one, exp(s, minus))), up)
                    },
                );
            }
            Activation::Relu => for_pairs(
                s,
                gate,
                up,
                #[inline(always)]
                |s, gate, up| s.mul(s.max(gate, s.splat(0.0)), up),
            ),
            Activation::Gelu => for_pairs(
                s,
                gate,
                up,
                #[inline(always)]
                |s, gate, up| s.mul(gelu(s, gate), up),
            ),
            Activation::GeluTanh => for_pairs(
                s,
                gate,
                up,
                #[inline(always)]
                |s, gate, up| s.mul(gelu_tanh(s, gate), up),
            ),
        }
    }
}

struct ActivateTask<'a> {
    activation: Activation,
    x: &'a mut [f32],
}

impl Task for ActivateTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        match self.activation {
            Activation::Silu => for_each(
                s,
                self.x,
                #[inline(always)]
                |s, x| s.mul(x, sigmoid(s, x)),
            ),
            Activation::Relu => for_each(
                s,
                self.x,
                #[inline(always)]
                |s, x| s.max(x, s.splat(0.0)),
            ),
            Activation::Gelu => for_each(
                s,
                self.x,
                #[inline(always)]
                |s, x| gelu(s, x),
            ),
            Activation::GeluTanh => for_each(
                s,
                self.x,
                #[inline(always)]
                |s, x| gelu_tanh(s, x),
            ),
        }
    }
}

struct CapTask<'a> {
    cap: f32,
    x: &'a mut [f32],
}

impl Task for CapTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let (cap, twice_inverse) = (s.splat(self.cap), s.splat(2.0 / self.cap));
        for_each(
            s,
            self.x,
            #[inline(always)]
            |s, x| {
                // tanh(z) = 2 · sigmoid(2z) − 1
                let sigmoid = sigmoid(s, s.mul(x, twice_inverse));
                s.mul(s.sub(s.add(sigmoid, sigmoid), s.splat(1.0)), cap)
            },
        );
    }
}

/// 1 / (1 + exp(−x)).
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) = x · sigmoid(2 √(2/π) (x + 0.044715 x³)).
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let cube = s.mul(s.mul(x, x), x);
    let inner = s.mul_add(cube, s.splat(0.044_715), x);
    s.mul(x, sigmoid(s, s.mul(inner, s.splat(1.595_769_2))))
}

/// x · Φ(x), with erf to an absolute error of 1.5e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let z = s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let magnitude = s.max(z, s.sub(zero, z));
    let t = s.div(one, s.mul_add(magnitude, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.mul_add(p, t, s.splat(c));
    }
    // erfc(|z|), and x·Φ(x) = max(x, 0) − |x| · erfc(|z|) / 2.
    let erfc = s.mul(s.mul(p, t), exp(s, s.sub(zero, s.mul(z, z))));
    let half = s.mul(s.mul(magnitude, s.splat(std::f32::consts::SQRT_2)), s.splat(0.5));
    s.sub(s.max(x, zero), s.mul(half, erfc))
}

/// Applies `f` to vectors of both slices and writes to the first; tails are padded with zeros.
#[inline(always)]
fn for_pairs<S: Simd>(s: S, a: &mut [f32], b: &[f32], f: impl Fn(S, S::F, S::F) -> S::F) {
    let (a_vectors, a_tail) = a.as_chunks_mut::<16>();
    let (b_vectors, b_tail) = b.as_chunks::<16>();
    for (a, b) in a_vectors.iter_mut().zip(b_vectors) {
        let v = f(s, s.load(a), s.load(b));
        s.store(v, a);
    }
    let n = a_tail.len().min(b_tail.len());
    let (mut a, mut b) = ([0.0; 16], [0.0; 16]);
    a[..n].copy_from_slice(&a_tail[..n]);
    b[..n].copy_from_slice(&b_tail[..n]);
    let v = f(s, s.load(&a), s.load(&b));
    s.store(v, &mut a);
    a_tail[..n].copy_from_slice(&a[..n]);
}

/// Applies `f` to vectors of the slice; the tail is padded with zeros.
#[inline(always)]
fn for_each<S: Simd>(s: S, x: &mut [f32], f: impl Fn(S, S::F) -> S::F) {
    let (vectors, tail) = x.as_chunks_mut::<16>();
    for v in vectors {
        let y = f(s, s.load(v));
        s.store(y, v);
    }
    let mut last = [0.0; 16];
    last[..tail.len()].copy_from_slice(tail);
    let y = f(s, s.load(&last));
    s.store(y, &mut last);
    tail.copy_from_slice(&last[..tail.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Functions in f64 by their definitions; erf by its series.
    fn exact(activation: Activation, x: f64) -> f64 {
        let erf = |z: f64| {
            let (mut term, mut sum) = (z, z);
            for n in 1..200 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        };
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }

    #[test]
    fn activations_match_their_definitions_on_every_instruction_set() {
        let values: Vec<f32> = (-451..=451).map(|i| i as f32 / 100.0).collect();
        let up: Vec<f32> = values.iter().map(|x| x.sin() + 2.0).collect();
        for activation in
            [Activation::Silu, Activation::Relu, Activation::Gelu, Activation::GeluTanh]
        {
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let (mut plain, mut gated) = (values.clone(), values.clone());
                activate(isa, activation, &mut plain);
                activate_mul(isa, activation, &mut gated, &up);
                for ((x, up), (plain, gated)) in
                    values.iter().zip(&up).zip(plain.iter().zip(&gated))
                {
                    let y = exact(activation, f64::from(*x));
                    assert!(
                        (f64::from(*plain) - y).abs() < 1e-6,
                        "{activation:?} {x}: {plain} {y}"
                    );
                    let y = y * f64::from(*up);
                    assert!(
                        (f64::from(*gated) - y).abs() < 3e-6,
                        "{activation:?} {x}: {gated} {y}"
                    );
                }
                assert_eq!(
                    first.get_or_insert_with(|| plain.clone()),
                    &plain,
                    "{activation:?} {isa:?}"
                );
            }
        }
    }

    #[test]
    fn soft_cap_is_a_scaled_tanh() {
        for isa in Isa::available() {
            let mut x: Vec<f32> = (-99..=99).map(|i| i as f32).collect();
            let expected: Vec<f32> = x.iter().map(|x| 30.0 * (x / 30.0).tanh()).collect();
            soft_cap(isa, 30.0, &mut x);
            for (x, y) in x.iter().zip(&expected) {
                assert!((x - y).abs() < 1e-5, "{x} {y}");
            }
        }
    }
}
