//! Sums over magnitudes in sorted order: the error of any threshold or scale in constant time.

/// Magnitudes of some weights of one row, ascending, with running sums of the quantities that
/// squared errors are made of; h is the cost weight of a column.
#[derive(Clone, Debug)]
pub struct Sorted {
    /// Pairs of magnitude and cost weight, ascending by magnitude.
    values: Vec<(f32, f32)>,
    /// Running sums, one entry more than values.
    sums: Vec<Sums>,
}

/// Sums over a range of magnitudes a with cost weights h.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// How many.
    pub n: f64,
    /// Σ a.
    pub a: f64,
    /// Σ h.
    pub h: f64,
    /// Σ h·a.
    pub ha: f64,
    /// Σ h·a².
    pub haa: f64,
}

impl Sums {
    fn add(self, a: f32, h: f32) -> Self {
        let (a, h) = (f64::from(a), f64::from(h));
        Self {
            n: self.n + 1.0,
            a: self.a + a,
            h: self.h + h,
            ha: self.ha + h * a,
            haa: self.haa + h * a * a,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            n: self.n - other.n,
            a: self.a - other.a,
            h: self.h - other.h,
            ha: self.ha - other.ha,
            haa: self.haa - other.haa,
        }
    }

    /// The mean magnitude: the scale of a binarised set (paper equation 1). Zero if empty.
    #[must_use]
    pub fn mean(self) -> f64 {
        if self.n > 0.0 { self.a / self.n } else { 0.0 }
    }

    /// Σ h (a − s)² for scale `s`.
    #[must_use]
    pub fn error(self, s: f64) -> f64 {
        (self.haa - 2.0 * s * self.ha + s * s * self.h).max(0.0)
    }
}

impl Default for Sorted {
    /// No magnitudes.
    fn default() -> Self {
        Self { values: Vec::new(), sums: vec![Sums::default()] }
    }
}

impl Sorted {
    /// Replaces the content.
    pub fn fill(&mut self, values: impl Iterator<Item = (f32, f32)>) {
        self.values.clear();
        self.values.extend(values);
        self.values.sort_unstable_by(|x, y| x.0.total_cmp(&y.0));
        self.sums.clear();
        self.sums.push(Sums::default());
        let mut sum = Sums::default();
        for (a, h) in &self.values {
            sum = sum.add(*a, *h);
            self.sums.push(sum);
        }
    }

    /// How many magnitudes are below `limit`.
    #[must_use]
    pub fn below(&self, limit: f32) -> usize {
        self.values.partition_point(|v| v.0 < limit)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Sums of the magnitudes with ranks `from..to`.
    #[must_use]
    pub fn range(&self, from: usize, to: usize) -> Sums {
        self.sums[to].minus(self.sums[from])
    }

    /// Sums of everything.
    #[must_use]
    pub fn all(&self) -> Sums {
        self.range(0, self.len())
    }

    /// Error of three regions split at `p1` and `p2`, each with its own mean as scale (paper
    /// algorithm 2, in constant time).
    #[must_use]
    pub fn trisection_error(&self, p1: f32, p2: f32) -> f64 {
        let (i, j) = (self.below(p1), self.below(p2));
        [(0, i), (i, j), (j, self.len())]
            .map(|(from, to)| self.range(from, to))
            .map(|s| s.error(s.mean()))
            .iter()
            .sum()
    }
}

/// Order-2 binarisation of the values that are in a set of weights but not in `without`: scale 1 is
/// the mean magnitude, scale 2 the mean magnitude of what is left (paper equations 5 and 6).
/// Returns Σ h·(error)².
#[must_use]
pub fn residual_error(set: &Sorted, without: &[(f32, f32)]) -> f64 {
    let removed = without.iter().fold(Sums::default(), |s, (a, h)| s.add(*a, *h));
    let sums = set.all().minus(removed);
    if sums.n < 0.5 {
        return 0.0;
    }
    let first = sums.mean();
    let split = set.below(first as f32);
    let (low, high) = (set.range(0, split), set.range(split, set.len()));
    // Σ |a − first| and Σ h |a − first| of the whole set, then without the removed ones.
    let mut spread = first * low.n - low.a + high.a - first * high.n;
    let mut weighted = first * low.h - low.ha + high.ha - first * high.h;
    for (a, h) in without {
        let r = (f64::from(*a) - first).abs();
        spread -= r;
        weighted -= f64::from(*h) * r;
    }
    let second = spread / sums.n;
    (sums.error(first) - 2.0 * second * weighted + second * second * sums.h).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize) -> Vec<(f32, f32)> {
        (0..n).map(|i| (((i * 37) % 53) as f32 / 10.0, 0.5 + ((i * 11) % 7) as f32)).collect()
    }

    #[test]
    fn regions_match_the_definition() {
        let values = sample(40);
        let mut sorted = Sorted::default();
        sorted.fill(values.iter().copied());
        for (p1, p2) in [(1.0, 2.0), (0.0, 9.0), (2.3, 4.6)] {
            let mut expected = 0.0;
            for region in [0.0..p1, p1..p2, p2..f32::INFINITY] {
                let part: Vec<_> = values.iter().filter(|v| region.contains(&v.0)).collect();
                let mean =
                    part.iter().map(|v| f64::from(v.0)).sum::<f64>() / part.len().max(1) as f64;
                expected += part
                    .iter()
                    .map(|(a, h)| f64::from(*h) * (f64::from(*a) - mean).powi(2))
                    .sum::<f64>();
            }
            let found = sorted.trisection_error(p1, p2);
            assert!((found - expected).abs() < 1e-9 * expected.max(1.0), "{found} {expected}");
        }
    }

    #[test]
    fn nothing_costs_nothing() {
        assert_eq!(residual_error(&Sorted::default(), &[]), 0.0);
        assert_eq!(Sorted::default().trisection_error(1.0, 2.0), 0.0);
    }

    #[test]
    fn residuals_match_the_definition() {
        let values = sample(30);
        let mut sorted = Sorted::default();
        sorted.fill(values.iter().copied());
        for k in [0, 1, 7, 29, 30] {
            let rest = &values[k..];
            let n = rest.len().max(1) as f64;
            let mean = rest.iter().map(|v| f64::from(v.0)).sum::<f64>() / n;
            let second = rest.iter().map(|v| (f64::from(v.0) - mean).abs()).sum::<f64>() / n;
            let expected: f64 = rest
                .iter()
                .map(|(a, h)| f64::from(*h) * ((f64::from(*a) - mean).abs() - second).powi(2))
                .sum();
            let found = residual_error(&sorted, &values[..k]);
            assert!((found - expected).abs() < 1e-6 * expected.max(1.0), "{k}: {found} {expected}");
        }
    }
}
