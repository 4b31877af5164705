//! The error of binarization with means, for the searches. Running sums over the sorted values of a row give the error
//! of any range of values with a few binary searches.

/// Sums over a set of values x with cost weights h.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValueSums {
    /// The number of values.
    pub n: f64,
    /// Σ x.
    pub x: f64,
    /// Σ h.
    pub h: f64,
    /// Σ h·x.
    pub hx: f64,
    /// Σ h·x².
    pub hxx: f64,
}

impl ValueSums {
    fn add(self, x: f32, h: f32) -> Self {
        let (x, h) = (f64::from(x), f64::from(h));
        Self {
            n: self.n + 1.0,
            x: self.x + x,
            h: self.h + h,
            hx: self.hx + h * x,
            hxx: self.hxx + h * x * x,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            n: self.n + other.n,
            x: self.x + other.x,
            h: self.h + other.h,
            hx: self.hx + other.hx,
            hxx: self.hxx + other.hxx,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            n: self.n - other.n,
            x: self.x - other.x,
            h: self.h - other.h,
            hx: self.hx - other.hx,
            hxx: self.hxx - other.hxx,
        }
    }

    /// Σ (x − c).
    fn deviation(self, c: f64) -> f64 {
        self.x - c * self.n
    }

    /// Σ h (x − c)²: the error of approximating all values by `c`.
    fn error(self, c: f64) -> f64 {
        (self.hxx - 2.0 * c * self.hx + c * c * self.h).max(0.0)
    }
}

/// A set of values with sums over any range.
pub trait Members {
    /// The sums over the values in `low..high`.
    fn between(&self, low: f64, high: f64) -> ValueSums;
}

/// All values of a row, ascending, with running sums.
#[derive(Clone, Debug)]
pub struct Sorted {
    /// Pairs of value and cost weight, ascending by value.
    values: Vec<(f32, f32)>,
    /// Running sums, one entry more than `values`.
    sums: Vec<ValueSums>,
}

impl Default for Sorted {
    /// No values.
    fn default() -> Self {
        Self { values: Vec::new(), sums: vec![ValueSums::default()] }
    }
}

impl Sorted {
    /// Replaces the content.
    pub fn fill(&mut self, values: impl Iterator<Item = (f32, f32)>) {
        self.values.clear();
        self.values.extend(values);
        self.values.sort_unstable_by(|x, y| x.0.total_cmp(&y.0));
        self.sums.clear();
        self.sums.push(ValueSums::default());
        let mut sum = ValueSums::default();
        for (x, h) in &self.values {
            sum = sum.add(*x, *h);
            self.sums.push(sum);
        }
    }

    /// The number of values below `limit`.
    fn below(&self, limit: f64) -> usize {
        self.values.partition_point(|v| f64::from(v.0) < limit)
    }

    /// The number of values up to `limit`.
    fn up_to(&self, limit: f64) -> usize {
        self.values.partition_point(|v| f64::from(v.0) <= limit)
    }

    /// The sums over the values with ranks `from..to`.
    fn ranks(&self, from: usize, to: usize) -> ValueSums {
        if from < to { self.sums[to].minus(self.sums[from]) } else { ValueSums::default() }
    }

    /// The values whose magnitude is in `p1..p2`.
    #[must_use]
    pub fn band(&self, p1: f64, p2: f64) -> Band<'_> {
        let parts = if p1 > 0.0 {
            [(self.up_to(-p2), self.up_to(-p1)), (self.below(p1), self.below(p2))]
        } else {
            [(self.up_to(-p2), self.below(p2)), (0, 0)]
        };
        Band { sorted: self, parts }
    }

    /// The values without those in `chosen`.
    #[must_use]
    pub fn without<'a>(&'a self, chosen: &'a [(f32, f32)]) -> Without<'a> {
        Without { sorted: self, chosen }
    }
}

/// The values in two ranges of ranks; see [`Sorted::band`].
#[derive(Clone, Copy, Debug)]
pub struct Band<'a> {
    sorted: &'a Sorted,
    parts: [(usize, usize); 2],
}

impl Members for Band<'_> {
    fn between(&self, low: f64, high: f64) -> ValueSums {
        let (low, high) = (self.sorted.below(low), self.sorted.below(high));
        let part = |(from, to): (usize, usize)| self.sorted.ranks(from.max(low), to.min(high));
        part(self.parts[0]).plus(part(self.parts[1]))
    }
}

/// The values of a row without a few of them; see [`Sorted::without`].
#[derive(Clone, Copy, Debug)]
pub struct Without<'a> {
    sorted: &'a Sorted,
    chosen: &'a [(f32, f32)],
}

impl Members for Without<'_> {
    fn between(&self, low: f64, high: f64) -> ValueSums {
        let all = self.sorted.ranks(self.sorted.below(low), self.sorted.below(high));
        all.minus(self.chosen.between(low, high))
    }
}

impl Members for [(f32, f32)] {
    fn between(&self, low: f64, high: f64) -> ValueSums {
        let inside = self.iter().filter(|v| f64::from(v.0) >= low && f64::from(v.0) < high);
        inside.fold(ValueSums::default(), |sum, (x, h)| sum.add(*x, *h))
    }
}

/// Σ h (x − q)² of binarizing a set once: q = μ ± α with μ the mean of x and α the mean magnitude
/// of x − μ (paper equation 1).
#[must_use]
pub fn binary_error(set: &(impl Members + ?Sized)) -> f64 {
    match first_order(set) {
        Some(first) => first.low.error(first.levels[0]) + first.high.error(first.levels[1]),
        None => 0.0,
    }
}

/// The error of binarizing a set twice, the second time the residual of the first.
#[must_use]
pub fn residual_error(set: &(impl Members + ?Sized)) -> f64 {
    let Some(BinarizedOnce { middle, low, high, levels: [under, over] }) = first_order(set) else {
        return 0.0;
    };
    let n = low.n + high.n;
    let mean = (low.deviation(under) + high.deviation(over)) / n;
    // Each half splits where its residual changes sign.
    let low_split = set.between(f64::NEG_INFINITY, middle.min(under + mean));
    let high_split = set.between(middle, middle.max(over + mean));
    let quarters = [
        (low_split, under + mean, -1.0),
        (low.minus(low_split), under + mean, 1.0),
        (high_split, over + mean, -1.0),
        (high.minus(high_split), over + mean, 1.0),
    ];
    let scale = quarters.iter().map(|(s, c, sign)| sign * s.deviation(*c)).sum::<f64>() / n;
    quarters.iter().map(|(s, c, sign)| s.error(c + sign * scale)).sum()
}

/// A set binarized once.
struct BinarizedOnce {
    /// The mean, where signs change.
    middle: f64,
    /// The sums over values below the mean.
    low: ValueSums,
    /// The sums over the other values.
    high: ValueSums,
    /// The values after binarization: below the mean, above it.
    levels: [f64; 2],
}

fn first_order(set: &(impl Members + ?Sized)) -> Option<BinarizedOnce> {
    let all = set.between(f64::NEG_INFINITY, f64::INFINITY);
    if all.n < 0.5 {
        return None;
    }
    let middle = all.x / all.n;
    let low = set.between(f64::NEG_INFINITY, middle);
    let high = all.minus(low);
    let scale = (high.deviation(middle) - low.deviation(middle)) / all.n;
    Some(BinarizedOnce { middle, low, high, levels: [middle - scale, middle + scale] })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn sample(n: usize) -> Vec<(f32, f32)> {
        let value = |i: usize| ((i * 37) % 53) as f32 / 10.0 - 2.0;
        (0..n).map(|i| (value(i), 0.5 + ((i * 11) % 7) as f32)).collect()
    }

    /// Binarizes `order` times as defined, without shortcuts.
    pub fn binarized_error(values: &[(f32, f32)], order: usize, means: bool) -> f64 {
        let n = values.len().max(1) as f64;
        let mut rest: Vec<f64> = values.iter().map(|v| f64::from(v.0)).collect();
        for _ in 0..order {
            let mean = if means { rest.iter().sum::<f64>() / n } else { 0.0 };
            let scale = rest.iter().map(|x| (x - mean).abs()).sum::<f64>() / n;
            for x in &mut rest {
                *x -= if *x < mean { mean - scale } else { mean + scale };
            }
        }
        rest.iter().zip(values).map(|(x, v)| f64::from(v.1) * x * x).sum()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9 * expected.max(1.0), "{found} {expected}");
    }

    #[test]
    fn bands_match_the_definition() {
        let values = sample(40);
        let mut sorted = Sorted::default();
        sorted.fill(values.iter().copied());
        for (p1, p2) in [(1.0, 2.0), (0.0, 9.0), (0.0, 1.2), (2.3, 4.6), (8.0, 9.0)] {
            let inside = |v: &&(f32, f32)| (p1..p2).contains(&f64::from(v.0.abs()));
            let part: Vec<_> = values.iter().filter(inside).copied().collect();
            let band = sorted.band(p1, p2);
            close(binary_error(&band), binarized_error(&part, 1, true));
            close(residual_error(&band), binarized_error(&part, 2, true));
        }
    }

    #[test]
    fn empty_sets_have_no_error() {
        assert_eq!(residual_error(&Sorted::default().without(&[])), 0.0);
        assert_eq!(binary_error(&Sorted::default().band(1.0, 2.0)), 0.0);
    }

    #[test]
    fn left_out_values_do_not_count() {
        let values = sample(30);
        let mut sorted = Sorted::default();
        sorted.fill(values.iter().copied());
        for k in [0, 1, 7, 29, 30] {
            let (chosen, rest) = values.split_at(k);
            close(residual_error(&sorted.without(chosen)), binarized_error(rest, 2, true));
            close(residual_error(chosen), binarized_error(chosen, 2, true));
        }
    }
}
