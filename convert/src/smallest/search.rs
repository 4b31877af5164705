//! The search for a size: which one to try next, given the divergences of those tried.

/// The result is at most this share above the smallest size that would do.
const RESOLUTION: f64 = 0.05;
/// A file whose divergence is above this share of the limit is not made smaller: the divergence halves within about
/// half a bit, so that the size is within the resolution.
const CLOSE: f64 = 0.85;
/// The share of the limit that a step aims at, so that small errors of the estimate still lead below the limit.
const AIM: f64 = 0.93;
/// Conversions, unless none of these is within the limit.
const CONVERSIONS: usize = 5;
/// The least change of size of a step while all files are on one side of the limit.
const LEAST_STEP: f64 = 0.03;
/// A file whose divergence is at most this multiple of the limit is nearly large enough.
const NEAR: f64 = 1.5;
/// Divergences below this are rounding.
const FLOOR: f64 = 1e-9;

/// A size that has been tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tried {
    /// True bits per parameter that were asked for.
    pub(super) bits: f64,
    /// The divergence measured, in nats per token; infinite if predictions were not finite.
    pub(super) kl: f64,
}

impl Tried {
    fn log(self) -> f64 {
        self.kl.clamp(FLOOR, 1e9).ln()
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Next {
    /// Convert to this size.
    Try(f64),
    /// The file of this size is the result.
    Done(f64),
    /// Even the largest file has this divergence, which exceeds the limit.
    Impossible(f64),
}

/// A search.
pub(super) struct Search<'a> {
    /// The largest divergence allowed, in nats per token.
    pub(super) limit: f64,
    pub(super) smallest: f64,
    pub(super) largest: f64,
    /// The size at which the cost model expects the divergence of the second argument, given a size that was tried.
    pub(super) estimate: &'a dyn Fn(Tried, f64) -> anyhow::Result<f64>,
}

impl Search<'_> {
    /// The next step after `tried`, which is not empty.
    pub(super) fn next(&self, tried: &[Tried]) -> anyhow::Result<Next> {
        let good = |t: &&Tried| t.kl <= self.limit;
        let best = tried.iter().filter(good).min_by(|a, b| a.bits.total_cmp(&b.bits)).copied();
        let below = |t: &&Tried| !good(t) && best.is_none_or(|best| t.bits < best.bits);
        let worst = tried.iter().filter(below).max_by(|a, b| a.bits.total_cmp(&b.bits)).copied();
        if let Some(best) = best {
            let near = worst.is_some_and(|w| best.bits - w.bits <= RESOLUTION * best.bits);
            let close = best.kl >= CLOSE * self.limit || best.bits <= self.smallest;
            if near || close || tried.len() >= CONVERSIONS {
                return Ok(Next::Done(best.bits));
            }
        } else if let Some(worst) = worst.filter(|w| w.bits >= self.largest) {
            return Ok(Next::Impossible(worst.kl));
        }
        let guess = self.guess(tried)?;
        let bits = match (best, worst) {
            (Some(best), Some(worst)) => {
                let margin = 0.1 * (best.bits - worst.bits);
                guess.clamp(worst.bits + margin, best.bits - margin)
            }
            (Some(best), None) => guess.min(best.bits * (1.0 - LEAST_STEP)),
            (None, Some(worst)) => {
                // Each miss makes the next step larger, so that the largest file is reached; close to the limit, only
                // after more conversions than there should be.
                let free = if worst.kl <= NEAR * self.limit { CONVERSIONS } else { 0 };
                let step = LEAST_STEP * (1 << tried.len().saturating_sub(free).min(8)) as f64;
                guess.max(worst.bits * (1.0 + step / 2.0))
            }
            (None, None) => guess,
        };
        let bits = ((bits * 1000.0).round() / 1000.0).clamp(self.smallest, self.largest);
        match (best, tried.iter().any(|t| t.bits == bits)) {
            (Some(best), true) => Ok(Next::Done(best.bits)),
            (None, true) => Ok(Next::Try(self.largest)),
            (_, false) => Ok(Next::Try(bits)),
        }
    }

    /// The size at which the divergence is expected to be a little below the limit: from the cost model after the
    /// first conversion, then from a line through the logarithms of the two divergences next to the limit.
    fn guess(&self, tried: &[Tried]) -> anyhow::Result<f64> {
        let aim = (AIM * self.limit).max(FLOOR).ln();
        let mut nearest = tried.to_vec();
        nearest.sort_by(|a, b| (a.log() - aim).abs().total_cmp(&(b.log() - aim).abs()));
        if let [a, b, ..] = nearest[..] {
            let slope = (b.log() - a.log()) / (b.bits - a.bits);
            // A bit more per weight divides the divergence by about four.
            if (-8.0..-0.3).contains(&slope) {
                return Ok(a.bits + (aim - a.log()) / slope);
            }
        }
        (self.estimate)(nearest[0], AIM * self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches where the divergence is `truth` and the cost model expects exp(−slope · bits). Returns the result and
    /// the sizes that were tried.
    fn search(
        limit: f64,
        truth: impl Fn(f64) -> f64,
        slope: f64,
        first: f64,
    ) -> (Next, Vec<Tried>) {
        let estimate = |t: Tried, kl: f64| Ok((t.bits - (kl / t.kl).ln() / slope).clamp(1.0, 16.0));
        let search = Search { limit, smallest: 1.0, largest: 16.0, estimate: &estimate };
        let mut tried = vec![Tried { bits: first, kl: truth(first) }];
        loop {
            match search.next(&tried).unwrap() {
                Next::Try(bits) => tried.push(Tried { bits, kl: truth(bits) }),
                end => return (end, tried),
            }
            assert!(tried.len() < 16, "{tried:?}");
        }
    }

    #[test]
    fn the_smallest_size_is_found_within_the_resolution() {
        // Curves like those of real models, and straight lines; a cost model that is right, or off by half.
        let curve = |bits: f64| 18.0 * (-1.35 * bits).exp() + 2.0 * (-0.9 * bits).exp();
        for limit in [0.01, 0.1, 0.3, 1.0] {
            for (slope, first) in [(1.3, 3.0), (0.7, 6.0), (2.0, 2.0), (1.3, 12.0), (1.3, 1.0)] {
                let (end, tried) = search(limit, curve, slope, first);
                let Next::Done(bits) = end else { panic!("{end:?}") };
                assert!(curve(bits) <= limit);
                let exact = (1000..16_000).map(|b| f64::from(b) / 1000.0);
                let exact = exact.into_iter().find(|b| curve(*b) <= limit).unwrap();
                assert!(bits <= exact * 1.06, "{limit} {slope} {first}: {bits}, {exact}");
                assert!(tried.len() <= 5, "{limit} {slope} {first}: {tried:?}");
            }
        }
    }

    #[test]
    fn what_no_file_reaches_is_said_with_the_divergence_of_the_largest() {
        let (end, tried) = search(0.01, |bits| 0.02 + (-bits).exp(), 1.3, 4.0);
        assert_eq!(end, Next::Impossible(0.02 + (-16.0f64).exp()));
        assert_eq!(tried.last().unwrap().bits, 16.0);
    }

    #[test]
    fn the_smallest_file_may_be_enough() {
        let (end, _) = search(5.0, |bits| 3.0 * (-bits).exp(), 1.3, 2.0);
        assert_eq!(end, Next::Done(1.0));
    }

    #[test]
    fn a_file_without_finite_predictions_is_one_that_is_too_small() {
        let truth = |bits: f64| if bits < 3.0 { f64::INFINITY } else { 4.0 * (-bits).exp() };
        let (end, _) = search(0.1, truth, 1.3, 2.0);
        assert!(matches!(end, Next::Done(bits) if truth(bits) <= 0.1), "{end:?}");
    }
}
