//! Probabilities from logits. Sums are in f64: rounding of a hundred thousand f32 terms would hide
//! differences of 1e-5 nats.

use crate::error::{Error, Result};

/// The output distribution of a model for one token.
pub(super) struct Distribution<'a> {
    logits: &'a [f32],
    log_sum: f64,
    best: usize,
}

impl<'a> Distribution<'a> {
    /// The softmax of `logits`, [vocab].
    ///
    /// # Errors
    /// [`Error::Invalid`] if a logit is not finite.
    pub fn new(logits: &'a [f32]) -> Result<Self> {
        let mut best = 0;
        for (i, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = i;
            }
        }
        let largest = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
        let log_sum = largest + sum.ln();
        if !logits.iter().all(|l| l.is_finite()) {
            return Err(Error::invalid(
                "the model computes logits that are not finite; its weights may be damaged",
            ));
        }
        Ok(Self { logits, log_sum, best })
    }

    /// ln p(token).
    pub fn log_probability(&self, token: u32) -> f64 {
        f64::from(self.logits[token as usize]) - self.log_sum
    }

    /// The most likely token; ties go to the lower id.
    pub fn best(&self) -> usize {
        self.best
    }

    /// KL(self ‖ other) = Σ p·(ln p − ln q), in nats.
    pub fn divergence(&self, other: &Self) -> f64 {
        let mut sum = 0.0;
        for (a, b) in self.logits.iter().zip(other.logits) {
            let log_p = f64::from(*a) - self.log_sum;
            let log_q = f64::from(*b) - other.log_sum;
            sum += log_p.exp() * (log_p - log_q);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_matches_its_definition() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), shifted by constants.
        let ln = |x: f32| x.ln();
        let p = [ln(0.5) + 90.0, ln(0.25) + 90.0, ln(0.25) + 90.0];
        let q = [ln(0.25) - 30.0, ln(0.25) - 30.0, ln(0.5) - 30.0];
        let (p, q) = (Distribution::new(&p).unwrap(), Distribution::new(&q).unwrap());
        // ½ ln 2 − ¼ ln 2
        assert!((p.divergence(&q) - 0.25 * std::f64::consts::LN_2).abs() < 1e-5);
        assert_eq!(p.divergence(&p), 0.0);
        assert_eq!((p.best(), q.best()), (0, 2));
        assert!((p.log_probability(1) - 0.25f64.ln()).abs() < 1e-5);
    }

    /// Nearly equal distributions, for which f32 sums would give noise and even negative values.
    #[test]
    fn small_divergences_survive() {
        let vocab = 100_000;
        let p: Vec<f32> = (0..vocab).map(|i| (i % 977) as f32 / 977.0).collect();
        let mut q = p.clone();
        q[500] += 1e-2;
        let (p, q) = (Distribution::new(&p).unwrap(), Distribution::new(&q).unwrap());
        let share = p.log_probability(500).exp();
        // KL of a shift δ of one logit is p(1−p)δ²/2 to second order.
        let expected = share * (1.0 - share) * 1e-4 / 2.0;
        assert!((p.divergence(&q) / expected - 1.0).abs() < 0.01, "{}", p.divergence(&q));
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        for bad in [f32::NAN, f32::INFINITY] {
            for place in 0..3 {
                let mut logits = [1.0, 2.0, 3.0];
                logits[place] = bad;
                assert!(Distribution::new(&logits).is_err(), "{bad} at {place}");
            }
        }
        assert!(Distribution::new(&[f32::NEG_INFINITY; 2]).is_err());
    }
}
