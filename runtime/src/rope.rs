//! RoPE (Su et al., 2021): pairs of elements of each head are rotated by angles proportional to the
//! position (spec, metadata §2.2).

use stb_format::arch::RopeTable;
use stb_format::{ModelSpec, RopePairing, RopeScaling};
use stb_kernels::Pool;

/// At most this many values are rotated on one thread.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 15;

/// The frequencies of a table of RoPE.
#[derive(Clone, Debug)]
pub(crate) struct Frequencies {
    /// Radians per position of each pair, `[rope_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// `longrope`: the trained context, and the frequencies of longer contexts.
    long: Option<(usize, Vec<f32>)>,
    /// `dynamic`: the frequencies after the trained context depend on the position.
    dynamic: Option<DynamicBase>,
    /// The factor of cosine and sine: 1 except for `yarn` and `longrope`.
    magnitude: f32,
}

/// The growth of the base θ beyond the trained context.
#[derive(Clone, Copy, Debug)]
struct DynamicBase {
    theta: f64,
    factor: f64,
    original_context: usize,
}

impl DynamicBase {
    /// The frequencies of the token at `position`; `None` within the trained context.
    fn frequencies(self, position: usize, pairs: usize) -> Option<Vec<f32>> {
        let length = position + 1;
        if length <= self.original_context {
            return None;
        }
        let dim = 2.0 * pairs as f64;
        let part = length as f64 / self.original_context as f64;
        let growth = self.factor * part - (self.factor - 1.0);
        let theta = self.theta * growth.powf(dim / (dim - 2.0));
        Some(plain(theta, pairs).map(|f| f as f32).collect())
    }
}

/// θ^(−2i/R) for each of `pairs` = R/2 pairs i.
fn plain(theta: f64, pairs: usize) -> impl Iterator<Item = f64> {
    (0..pairs).map(move |i| 1.0 / theta.powf(2.0 * i as f64 / (2 * pairs) as f64))
}

impl Frequencies {
    /// The frequencies of `pairs` pairs with base `theta`.
    pub(crate) fn new(pairs: usize, theta: f64, scaling: &RopeScaling) -> Self {
        let each = |scale: &dyn Fn(usize, f64) -> f64| -> Vec<f32> {
            plain(theta, pairs).enumerate().map(|(i, f)| scale(i, f) as f32).collect()
        };
        let new = |frequencies| Self { frequencies, long: None, dynamic: None, magnitude: 1.0 };
        match scaling {
            RopeScaling::None => new(each(&|_, f| f)),
            RopeScaling::Linear { factor } => new(each(&|_, f| f / factor)),
            RopeScaling::Dynamic { factor, original_context } => {
                let original_context = *original_context as usize;
                let dynamic = Some(DynamicBase { theta, factor: *factor, original_context });
                Self { dynamic, ..new(each(&|_, f| f)) }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                new(each(&|_, frequency| {
                    let turns = turns(frequency, *original_context);
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let unscaled = smooth.clamp(0.0, 1.0);
                    frequency * (unscaled + (1.0 - unscaled) / factor)
                }))
            }
            RopeScaling::Yarn { factor, attention_factor, .. } => {
                let ramp = YarnRamp::new(pairs, theta, scaling);
                let frequencies = each(&|i, frequency| {
                    let unscaled = 1.0 - ramp.at(i);
                    frequency * unscaled + frequency / factor * (1.0 - unscaled)
                });
                Self { magnitude: *attention_factor as f32, ..new(frequencies) }
            }
            RopeScaling::LongRope {
                short_factors,
                long_factors,
                attention_factor,
                original_context,
            } => {
                let long = each(&|i, frequency| frequency / long_factors[i]);
                Self {
                    long: Some((*original_context as usize, long)),
                    magnitude: *attention_factor as f32,
                    ..new(each(&|i, frequency| frequency / short_factors[i]))
                }
            }
        }
    }

    /// The frequencies of a token at `position` of a sequence of at most `context` tokens.
    fn at(&self, position: usize, context: usize) -> std::borrow::Cow<'_, [f32]> {
        if let Some((original, long)) = &self.long
            && context > *original
        {
            return long.into();
        }
        let dynamic = self.dynamic.and_then(|d| d.frequencies(position, self.frequencies.len()));
        dynamic.map_or_else(|| (&self.frequencies[..]).into(), Into::into)
    }
}

/// Turns of a pair in `context` tokens.
fn turns(frequency: f64, context: u64) -> f64 {
    context as f64 * frequency / (2.0 * std::f64::consts::PI)
}

/// The ramp of YaRN: 0 for pairs whose frequency is unchanged, 1 for those whose frequency is divided.
struct YarnRamp {
    low: f64,
    high: f64,
}

impl YarnRamp {
    /// The ramp for a `yarn` scaling.
    fn new(pairs: usize, theta: f64, scaling: &RopeScaling) -> Self {
        let RopeScaling::Yarn { beta_fast, beta_slow, truncate, original_context, .. } = scaling
        else {
            return Self { low: 0.0, high: 0.0 };
        };
        let dim = 2.0 * pairs as f64;
        // The pair that makes `turns` turns in the trained context.
        let pair = |turns: f64| {
            let context = *original_context as f64;
            dim * (context / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
        if *truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        Self { low, high: if low == high { high + 0.001 } else { high } }
    }

    fn at(&self, pair: usize) -> f64 {
        ((pair as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// The RoPE of a model: frequencies and pairing.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// The frequencies of [`RopeTable::Global`].
    pub global: Frequencies,
    /// The frequencies of [`RopeTable::Local`].
    local: Option<Frequencies>,
    /// Whether the elements of a pair are neighbors; otherwise they are half the rotated width apart.
    pub interleaved: bool,
    head_dim: usize,
}

impl Rope {
    /// The RoPE of a model with this `spec`.
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let pairs = spec.rope_dim() as usize / 2;
        let local = spec.local_rope_theta;
        Self {
            global: Frequencies::new(pairs, spec.rope_theta, &spec.rope_scaling),
            local: local.map(|theta| Frequencies::new(pairs, theta, &RopeScaling::None)),
            interleaved: spec.rope_pairing == RopePairing::Interleaved,
            head_dim: spec.head_dim as usize,
        }
    }

    /// Computes the angles of tokens: each has a position and the longest context of its sequence.
    pub(crate) fn angles(
        &self,
        tokens: impl Iterator<Item = (usize, usize)> + Clone,
        out: &mut RopeAngles,
    ) {
        self.table_angles(&self.global, tokens.clone(), &mut out.global);
        if let Some(local) = &self.local {
            self.table_angles(local, tokens, &mut out.local);
        }
    }

    fn table_angles(
        &self,
        table: &Frequencies,
        tokens: impl Iterator<Item = (usize, usize)>,
        out: &mut TableAngles,
    ) {
        out.cos.clear();
        out.sin.clear();
        for (position, context) in tokens {
            for frequency in table.at(position, context).iter() {
                // The angle is rounded to f32, as the reference implementations do.
                let angle = f64::from(position as f32 * frequency);
                out.cos.push(angle.cos() as f32 * table.magnitude);
                out.sin.push(angle.sin() as f32 * table.magnitude);
            }
        }
        out.pairs = table.frequencies.len();
        out.interleaved = self.interleaved;
        out.head_dim = self.head_dim;
    }
}

/// Cosine and sine of the rotation angle of each token and pair, for both tables.
#[derive(Default, Debug)]
pub(crate) struct RopeAngles {
    global: TableAngles,
    local: TableAngles,
}

impl RopeAngles {
    /// The angles of `table`.
    pub(crate) fn table(&self, table: RopeTable) -> &TableAngles {
        match table {
            RopeTable::Global => &self.global,
            RopeTable::Local => &self.local,
        }
    }

    /// Transposes the rotations.
    pub(crate) fn transpose(&mut self) {
        for table in [&mut self.global, &mut self.local] {
            table.sin.iter_mut().for_each(|sin| *sin = -*sin);
        }
    }
}

/// Cosine and sine of the rotation angle of each token and pair.
#[derive(Default, Debug)]
pub(crate) struct TableAngles {
    /// [tokens, pairs].
    cos: Vec<f32>,
    /// [tokens, pairs].
    sin: Vec<f32>,
    /// Pairs per head: rope_dim / 2.
    pairs: usize,
    head_dim: usize,
    interleaved: bool,
}

impl TableAngles {
    /// Rotates the heads of `x`, [tokens, width], in place.
    pub(crate) fn rotate(&self, pool: &Pool, x: &mut [f32], width: usize) {
        pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(x, width, |first, x| {
            let at = first / width * self.pairs;
            let (cos, sin) = (&self.cos[at..at + self.pairs], &self.sin[at..at + self.pairs]);
            for head in x.chunks_exact_mut(self.head_dim) {
                let head = &mut head[..2 * self.pairs];
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
        let plain = Frequencies::new(64, 500_000.0, &RopeScaling::None).frequencies;
        let scaled = Frequencies::new(64, 500_000.0, &scaling).frequencies;
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
