//! The activation functions of an MLP and their derivatives.

use stb_format::Activation;

/// √(2/π).
const GELU_TANH_FACTOR: f32 = 0.797_884_6;
/// The factor of x³ in [`Activation::GeluTanh`].
const GELU_TANH_CUBE: f32 = 0.044_715;

/// act(x).
pub(super) fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => x.max(0.0),
        Activation::Gelu => x * normal_cdf(x),
        Activation::GeluTanh => x * sigmoid(gelu_tanh_argument(x)),
    }
}

/// The derivative of act at `x`.
pub(super) fn slope(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => {
            let s = sigmoid(x);
            s * (1.0 + x * (1.0 - s))
        }
        Activation::Relu => f32::from(x > 0.0),
        Activation::Gelu => normal_cdf(x) + x * normal_density(x),
        Activation::GeluTanh => {
            let s = sigmoid(gelu_tanh_argument(x));
            let inner = 2.0 * GELU_TANH_FACTOR * (1.0 + 3.0 * GELU_TANH_CUBE * x * x);
            s + x * s * (1.0 - s) * inner
        }
    }
}

/// The gradients of g and u, given the gradient `d` of act(g) · u.
pub(super) fn gated_gradients(activation: Activation, d: f32, g: f32, u: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let s = sigmoid(g);
            (d * u * s * (1.0 + g * (1.0 - s)), d * g * s)
        }
        _ => (d * u * slope(activation, g), d * activate(activation, g)),
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `gelu_tanh` is x · sigmoid of this: ½ (1 + tanh z) = sigmoid(2z).
fn gelu_tanh_argument(x: f32) -> f32 {
    2.0 * GELU_TANH_FACTOR * (x + GELU_TANH_CUBE * x * x * x)
}

/// The density of the normal distribution.
fn normal_density(x: f32) -> f32 {
    (-0.5 * x * x).exp() / std::f32::consts::TAU.sqrt()
}

/// The distribution function Φ of the normal distribution, with erf to an absolute error of 1.5e-7 (Abramowitz and
/// Stegun, 7.1.26).
fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let coefficients = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let polynomial = coefficients.into_iter().fold(0.0, |sum: f32, c| sum * t + c);
    let tail = 0.5 * polynomial * t * (-z * z).exp();
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use stb_kernels::{Isa, ops};

    use super::*;

    const ALL: [Activation; 4] =
        [Activation::Silu, Activation::Relu, Activation::Gelu, Activation::GeluTanh];

    #[test]
    fn values_are_those_of_the_kernels_and_slopes_match_finite_differences() {
        let isa = Isa::detect().unwrap();
        for activation in ALL {
            for i in -60..60 {
                let x = i as f32 / 8.0 + 0.03;
                let mut kernel = [x];
                ops::activate(isa, activation, &mut kernel);
                let value = activate(activation, x);
                assert!((value - kernel[0]).abs() < 2e-6, "{activation:?} {x}: {value} {kernel:?}");
                let step = 1.0 / 64.0;
                let found = (activate(activation, x + step) - activate(activation, x - step))
                    / (2.0 * step);
                let expected = slope(activation, x);
                assert!((found - expected).abs() < 2e-4, "{activation:?} {x}: {found} {expected}");
                let (d_gate, d_up) = gated_gradients(activation, 0.5, x, 3.0);
                assert!((d_gate - 1.5 * expected).abs() < 1e-5, "{activation:?} {x}");
                assert!((d_up - 0.5 * value).abs() < 1e-5, "{activation:?} {x}");
            }
        }
    }
}
