//! RoPE (Su et al., 2021): pairs of elements of each head are rotated by angles proportional to the
//! position.

use stb_format::{ModelSpec, RopePairing, RopeScaling};
use stb_kernels::Pool;

/// At most this many values are rotated on one thread.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 15;

/// The scaled frequency 1 / θ^(2i/head_dim) of each pair i, in radians per position, `[head_dim / 2]`.
pub(crate) fn inverse_frequencies(head_dim: usize, theta: f64, scaling: &RopeScaling) -> Vec<f32> {
    let pairs = head_dim / 2;
    let frequency = |i: usize| 1.0 / theta.powf(2.0 * i as f64 / head_dim as f64);
    let scale = |frequency: f64| match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = original_context as f64 * frequency / (2.0 * std::f64::consts::PI);
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let unscaled = smooth.clamp(0.0, 1.0);
            frequency * (unscaled + (1.0 - unscaled) / factor)
        }
    };
    (0..pairs).map(|i| scale(frequency(i)) as f32).collect()
}

/// The RoPE of a model: frequencies and pairing.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// Radians per position of each pair, `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// Whether the elements of a pair are neighbors; otherwise they are half a head apart.
    pub interleaved: bool,
}

impl Rope {
    /// The RoPE of a model with this `spec`.
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let head_dim = spec.head_dim as usize;
        Self {
            frequencies: inverse_frequencies(head_dim, spec.rope_theta, &spec.rope_scaling),
            interleaved: spec.rope_pairing == RopePairing::Interleaved,
        }
    }

    /// Computes the angles of `positions`.
    pub(crate) fn angles(&self, positions: impl Iterator<Item = usize>, out: &mut RopeAngles) {
        out.cos.clear();
        out.sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                // The angle is rounded to f32, as the reference implementations do.
                let angle = f64::from(position as f32 * frequency);
                out.cos.push(angle.cos() as f32);
                out.sin.push(angle.sin() as f32);
            }
        }
        out.pairs = self.frequencies.len();
        out.interleaved = self.interleaved;
    }
}

/// Cosine and sine of the rotation angle of each position and pair.
#[derive(Default, Debug)]
pub(crate) struct RopeAngles {
    /// [positions, pairs].
    cos: Vec<f32>,
    /// [positions, pairs].
    sin: Vec<f32>,
    /// Pairs per head: head_dim / 2.
    pairs: usize,
    interleaved: bool,
}

impl RopeAngles {
    /// The number of positions.
    pub(crate) fn tokens(&self) -> usize {
        self.cos.len() / self.pairs.max(1)
    }

    /// Inverts the rotation. The inverse is the transpose.
    pub(crate) fn invert(&mut self) {
        self.sin.iter_mut().for_each(|sin| *sin = -*sin);
    }

    /// Rotates the heads of `x`, [tokens, width], in place.
    pub(crate) fn rotate(&self, pool: &Pool, x: &mut [f32], width: usize) {
        pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(x, width, |first, x| {
            let at = first / width * self.pairs;
            let (cos, sin) = (&self.cos[at..at + self.pairs], &self.sin[at..at + self.pairs]);
            for head in x.chunks_exact_mut(2 * self.pairs) {
                if self.interleaved {
                    for ((pair, cos), sin) in
                        head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin)
                    {
                        let [u, v] = *pair;
                        *pair = [u * cos - v * sin, v * cos + u * sin];
                    }
                } else {
                    let (low, high) = head.split_at_mut(self.pairs);
                    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let (u, v) = (*a, *b);
                        *a = u * cos - v * sin;
                        *b = v * cos + u * sin;
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = inverse_frequencies(128, 500_000.0, &RopeScaling::None);
        let scaled = inverse_frequencies(128, 500_000.0, &scaling);
        // transformers' _compute_llama3_parameters for the same configuration.
        assert_eq!(plain[0], scaled[0]);
        assert!((scaled[63] / plain[63] - 0.125).abs() < 1e-6);
        for (i, (s, p)) in scaled.iter().zip(&plain).enumerate() {
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(*p);
            let expected = if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                0.125
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (1.0 - smooth) / 8.0 + smooth
            };
            assert!((f64::from(s / p) - expected).abs() < 1e-5, "{i}");
        }
    }
}
