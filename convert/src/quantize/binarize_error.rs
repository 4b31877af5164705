//! The error of binarization without means, for the searches. Signs do not matter then, so sums run over magnitudes.
//! Four rows are summed at a time, one per lane. Everything here is inlined into a function that is compiled for an
//! instruction set; the order of additions is the same for all instruction sets.

use std::array::from_fn;
use std::ops::{Add, AddAssign, Mul, Sub};

use super::search_error::SearchError;

/// Rows at a time.
const LANES: usize = 4;

/// One value per row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Lanes([f64; LANES]);

impl Add for Lanes {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] + other.0[i]))
    }
}

impl Sub for Lanes {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] - other.0[i]))
    }
}

impl Mul for Lanes {
    type Output = Self;

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] * other.0[i]))
    }
}

impl Lanes {
    /// The quotient; zero where the divisor is zero.
    #[inline(always)]
    fn divided_by(self, other: Self) -> Self {
        Self(from_fn(|i| if other.0[i] > 0.0 { self.0[i] / other.0[i] } else { 0.0 }))
    }

    /// The values where `x` is below `limit`, zero elsewhere.
    #[inline(always)]
    fn where_below(self, x: Self, limit: Self) -> Self {
        Self(from_fn(|i| if x.0[i] < limit.0[i] { self.0[i] } else { 0.0 }))
    }

    #[inline(always)]
    fn sum(self) -> f64 {
        self.0.iter().sum()
    }
}

/// Sums over a set of magnitudes m with cost weights h, per lane.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct LaneSums {
    /// The number of magnitudes.
    n: Lanes,
    /// Σ m.
    m: Lanes,
    /// Σ h.
    h: Lanes,
    /// Σ h·m.
    hm: Lanes,
}

impl AddAssign for LaneSums {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        self.n = self.n + other.n;
        self.m = self.m + other.m;
        self.h = self.h + other.h;
        self.hm = self.hm + other.hm;
    }
}

impl Sub for LaneSums {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self {
            n: self.n - other.n,
            m: self.m - other.m,
            h: self.h - other.h,
            hm: self.hm - other.hm,
        }
    }
}

impl LaneSums {
    /// Sets the sums of a lane to those of a single magnitude.
    #[inline(always)]
    fn set(&mut self, lane: usize, m: f64, h: f64) {
        self.n.0[lane] = 1.0;
        self.m.0[lane] = m;
        self.h.0[lane] = h;
        self.hm.0[lane] = h * m;
    }

    #[inline(always)]
    fn where_below(self, m: Lanes, limit: Lanes) -> Self {
        Self {
            n: self.n.where_below(m, limit),
            m: self.m.where_below(m, limit),
            h: self.h.where_below(m, limit),
            hm: self.hm.where_below(m, limit),
        }
    }

    /// α, the mean magnitude (paper equation 1).
    #[inline(always)]
    fn scale(self) -> Lanes {
        self.m.divided_by(self.n)
    }

    /// Σ h m² − Σ h (m − c)²: the gain of approximating all magnitudes by `c`.
    #[inline(always)]
    fn gain(self, c: Lanes) -> Lanes {
        c * (self.hm + self.hm - c * self.h)
    }

    /// The gain of binarizing once.
    #[inline(always)]
    fn gain_once(self) -> Lanes {
        self.gain(self.scale())
    }

    /// The gain of binarizing twice. `low` are the sums over magnitudes below [`LaneSums::scale`], whose residuals
    /// have the opposite sign of the weight; the residuals of the others have its sign.
    #[inline(always)]
    fn gain_twice(self, low: Self) -> Lanes {
        let (scale, high) = (self.scale(), self - low);
        let deviation = (high.m - scale * high.n) + (scale * low.n - low.m);
        let second = deviation.divided_by(self.n);
        low.gain(scale - second) + high.gain(scale + second)
    }
}

/// How values are derived from weights and weighted.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    /// The kind of error.
    pub error: SearchError,
    /// 1/d² of each column.
    pub importance: &'a [f32],
}

/// Weights and mask of a row.
pub type MaskedRow<'a> = (&'a [f32], &'a [bool]);

/// Up to [`LANES`] rows, column by column; pruned weights are zero.
#[derive(Default)]
struct RowGroup {
    m: Vec<Lanes>,
    terms: Vec<LaneSums>,
    /// The sums over all columns.
    total: LaneSums,
    /// Σ h m² of all columns.
    squares: Lanes,
}

impl RowGroup {
    /// Fills the group with the given columns of `rows`, in this order.
    #[inline(always)]
    fn fill(&mut self, rows: &[MaskedRow<'_>], columns: &[usize], values: &Values<'_>) {
        self.m.clear();
        self.terms.clear();
        (self.total, self.squares) = Default::default();
        for c in columns {
            let (mut m, mut terms) = (Lanes::default(), LaneSums::default());
            for (lane, (weights, mask)) in rows.iter().enumerate() {
                if mask[*c] {
                    let (x, h) = values.error.value(weights[*c], values.importance[*c]);
                    m.0[lane] = f64::from(x.abs());
                    terms.set(lane, m.0[lane], f64::from(h));
                }
            }
            self.m.push(m);
            self.terms.push(terms);
            self.total += terms;
            self.squares = self.squares + terms.hm * m;
        }
    }
}

/// The magnitudes of one row, ascending, with running sums.
#[derive(Default)]
struct Ascending {
    values: Vec<(f64, f64)>,
    /// Running n, Σ m, Σ h, Σ h·m; one entry more than `values`.
    sums: Vec<[f64; 4]>,
    /// The position of the last call of `below`: limits change little between calls.
    at: usize,
}

impl Ascending {
    #[inline(always)]
    fn fill(&mut self, group: &RowGroup, lane: usize) {
        self.values.clear();
        let kept = group.terms.iter().zip(&group.m).filter(|(terms, _)| terms.n.0[lane] > 0.0);
        self.values.extend(kept.map(|(terms, m)| (m.0[lane], terms.h.0[lane])));
        self.values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        self.sums.clear();
        self.sums.push([0.0; 4]);
        let mut sum = [0.0; 4];
        for (m, h) in &self.values {
            let term = [1.0, *m, *h, h * m];
            sum = from_fn(|k| sum[k] + term[k]);
            self.sums.push(sum);
        }
        self.at = self.values.len();
    }

    /// The sums over magnitudes below `limit`.
    #[inline(always)]
    fn below(&mut self, limit: f64) -> [f64; 4] {
        while self.at > 0 && self.values[self.at - 1].0 >= limit {
            self.at -= 1;
        }
        while self.at < self.values.len() && self.values[self.at].0 < limit {
            self.at += 1;
        }
        self.sums[self.at]
    }
}

/// Adds to `errors[k]` the error in these rows of binarizing twice both the first k + 1 columns of `ranked` and, as a
/// separate set, all other columns. Cost per row: a sort of its columns and O(errors.len()² / LANES).
#[inline(always)]
pub fn add_salient_errors<'a>(
    rows: impl Iterator<Item = MaskedRow<'a>>,
    ranked: &[usize],
    values: &Values<'_>,
    errors: &mut [f64],
) {
    let mut group = RowGroup::default();
    let mut ascending: [Ascending; LANES] = Default::default();
    let mut found = vec![Lanes::default(); errors.len()];
    for_each_group(
        rows,
        #[inline(always)]
        |rows| {
            group.fill(rows, ranked, values);
            for (lane, ascending) in ascending.iter_mut().enumerate() {
                ascending.fill(&group, lane);
            }
            let mut chosen = LaneSums::default();
            for (k, found) in found.iter_mut().enumerate() {
                chosen += group.terms[k];
                let others = group.total - chosen;
                let (limit, limit_of_others) = (chosen.scale(), others.scale());
                let (mut low, mut low_not_others) = (LaneSums::default(), LaneSums::default());
                for (m, terms) in group.m[..=k].iter().zip(&group.terms) {
                    low += terms.where_below(*m, limit);
                    low_not_others += terms.where_below(*m, limit_of_others);
                }
                let mut low_of_all = LaneSums::default();
                for (lane, ascending) in ascending.iter_mut().enumerate() {
                    let [n, m, h, hm] = ascending.below(limit_of_others.0[lane]);
                    low_of_all.n.0[lane] = n;
                    low_of_all.m.0[lane] = m;
                    low_of_all.h.0[lane] = h;
                    low_of_all.hm.0[lane] = hm;
                }
                let gain = chosen.gain_twice(low);
                let gain = gain + others.gain_twice(low_of_all - low_not_others);
                *found = *found + (group.squares - gain);
            }
        },
    );
    errors.iter_mut().zip(found).for_each(|(error, found)| *error += found.sum());
}

/// Candidates for thresholds between regions.
#[derive(Debug)]
pub struct ThresholdGrid {
    /// All thresholds, ascending.
    edges: Vec<f64>,
    /// For each candidate, the indices of its lowest and its highest threshold in `edges`.
    candidates: Vec<[usize; 2]>,
}

impl ThresholdGrid {
    /// A grid from the thresholds (one or two, ascending) of each candidate.
    #[must_use]
    pub fn new(candidates: &[Vec<f64>]) -> Self {
        let mut edges = candidates.concat();
        edges.sort_unstable_by(f64::total_cmp);
        edges.dedup();
        let index = |p: f64| edges.partition_point(|e| *e < p);
        let pair = |c: &Vec<f64>| [index(c[0]), index(c[c.len() - 1])];
        Self { candidates: candidates.iter().map(pair).collect(), edges }
    }
}

/// Adds to the error of each candidate the error of binarizing its regions in these rows. Cost per row: a binary
/// search for each column, and a pass over edges and candidates divided by LANES.
#[inline(always)]
pub fn add_threshold_errors<'a>(
    rows: impl Iterator<Item = MaskedRow<'a>>,
    columns: &[usize],
    values: &Values<'_>,
    grid: &ThresholdGrid,
    errors: &mut [f64],
) {
    let mut group = RowGroup::default();
    let mut below = vec![LaneSums::default(); grid.edges.len() + 1];
    let mut found = vec![Lanes::default(); errors.len()];
    for_each_group(
        rows,
        #[inline(always)]
        |rows| {
            group.fill(rows, columns, values);
            // Sums between two edges first, then running sums below each edge.
            below.fill(LaneSums::default());
            for (m, terms) in group.m.iter().zip(&group.terms) {
                for lane in 0..LANES {
                    let at = grid.edges.partition_point(|edge| *edge <= m.0[lane]);
                    let sums = &mut below[at];
                    sums.n.0[lane] += terms.n.0[lane];
                    sums.m.0[lane] += terms.m.0[lane];
                    sums.h.0[lane] += terms.h.0[lane];
                    sums.hm.0[lane] += terms.hm.0[lane];
                }
            }
            let mut sum = LaneSums::default();
            for below in &mut below {
                sum += *below;
                *below = sum;
            }
            // Candidates are ordered by their lower threshold: many share the lowest region.
            let mut lowest = (usize::MAX, Lanes::default());
            for (found, [low, high]) in found.iter_mut().zip(&grid.candidates) {
                if lowest.0 != *low {
                    lowest = (*low, below[*low].gain_once());
                }
                let gains = lowest.1 + (below[*high] - below[*low]).gain_once();
                let gains = gains + (group.total - below[*high]).gain_once();
                *found = *found + (group.squares - gains);
            }
        },
    );
    errors.iter_mut().zip(found).for_each(|(error, found)| *error += found.sum());
}

/// Calls `f` with [`LANES`] rows at a time, the last time perhaps fewer.
#[inline(always)]
fn for_each_group<'a>(
    mut rows: impl Iterator<Item = MaskedRow<'a>>,
    mut f: impl FnMut(&[MaskedRow<'a>]),
) {
    let mut group: [MaskedRow<'a>; LANES] = [(&[], &[]); LANES];
    loop {
        let mut count = 0;
        while count < LANES {
            let Some(row) = rows.next() else { break };
            group[count] = row;
            count += 1;
        }
        if count == 0 {
            return;
        }
        f(&group[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::binarize_error_means::tests::binarized_error;
    use super::*;

    const COLS: usize = 24;

    /// Seven rows: one group and a part of one; the last without any kept weight.
    fn sample() -> (Vec<f32>, Vec<bool>, Vec<f32>) {
        let weight = |i: usize| ((i * 37 + i / 5) % 53) as f32 / 10.0 - 2.5;
        let weights = (0..7 * COLS).map(weight).collect();
        let mask = (0..7 * COLS).map(|i| i % 3 != 0 && i < 6 * COLS).collect();
        let importance = (0..COLS).map(|c| 0.5 + ((c * 11) % 7) as f32).collect();
        (weights, mask, importance)
    }

    /// Σ over rows of the errors of binarizing the columns of each set `order` times.
    fn expected(order: usize, sets: &[&dyn Fn(usize, f32) -> bool]) -> f64 {
        let (weights, mask, importance) = sample();
        let rows = weights.chunks_exact(COLS).zip(mask.chunks_exact(COLS));
        let row_error = |(weights, mask): MaskedRow<'_>| -> f64 {
            let set_error = |set: &&dyn Fn(usize, f32) -> bool| {
                let members = (0..COLS).filter(|c| mask[*c] && set(*c, weights[*c]));
                let pairs: Vec<_> = members.map(|c| (weights[c], importance[c])).collect();
                binarized_error(&pairs, order, false)
            };
            sets.iter().map(set_error).sum()
        };
        rows.map(row_error).sum()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9 * expected.max(1.0), "{found} {expected}");
    }

    #[test]
    fn salient_errors_match_the_definition() {
        let (weights, mask, importance) = sample();
        let ranked: Vec<usize> = (0..COLS).map(|i| i * 7 % COLS).collect();
        let mut errors = vec![1.0; COLS];
        let rows = weights.chunks_exact(COLS).zip(mask.chunks_exact(COLS));
        let values = Values { error: SearchError::Weighted, importance: &importance };
        add_salient_errors(rows, &ranked, &values, &mut errors);
        for (k, error) in errors.iter().enumerate() {
            let chosen = |c: usize, _: f32| ranked[..=k].contains(&c);
            close(*error, 1.0 + expected(2, &[&chosen, &|c, w| !chosen(c, w)]));
        }
    }

    #[test]
    fn threshold_errors_match_the_definition() {
        let (weights, mask, importance) = sample();
        let candidates =
            [vec![0.3, 1.1], vec![0.7, 0.7], vec![1.2, 2.2], vec![1.3], vec![8.0, 9.0]];
        let columns: Vec<usize> = (0..COLS).filter(|c| !c.is_multiple_of(5)).collect();
        let mut errors = vec![1.0; candidates.len()];
        let rows = weights.chunks_exact(COLS).zip(mask.chunks_exact(COLS));
        let grid = ThresholdGrid::new(&candidates);
        let values = Values { error: SearchError::Weighted, importance: &importance };
        add_threshold_errors(rows, &columns, &values, &grid, &mut errors);
        for (candidate, error) in candidates.iter().zip(errors) {
            let (p1, p2) = (candidate[0], candidate[candidate.len() - 1]);
            let band = |from: f64, to: f64| {
                move |c: usize, w: f32| {
                    !c.is_multiple_of(5) && (from..to).contains(&f64::from(w.abs()))
                }
            };
            let sets = [band(0.0, p1), band(p1, p2), band(p2, f64::INFINITY)];
            close(error, 1.0 + expected(1, &[&sets[0], &sets[1], &sets[2]]));
        }
    }
}
