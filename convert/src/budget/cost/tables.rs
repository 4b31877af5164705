//! The costs of the embeddings and the lm_head.

use stb_kernels::Isa;
use stb_runtime::Weight;

use super::{keep_candidate, sample_rows};
use crate::backward::{RowWeights, TableStatistics};
use crate::budget::candidate::Candidate;
use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::mixed_rows::MixedRowsOptions;
use crate::quantize::{Method, decode};
use crate::tables::{RowLoss, RowWithout, TableHessian, TableUse, squared_norm};

/// Rows that are quantized, evenly spaced.
const SAMPLED_ROWS: usize = 1024;
/// The smallest number of rows with more bits. Larger numbers are multiples by 2, up to a quarter of all rows.
const FEWEST_LISTED: usize = 64;
/// The fewest bits of listed rows.
const LISTED_BITS: u8 = 3;
/// The factor for large errors of embeddings is 1 + this · ρ², where ρ is the squared error relative to the squared
/// weights: the expectation holds for small errors. `tests/bench/record/2026-11-30-column-factors.md` compares expected and
/// measured losses of tables with ρ from 0.02 to 0.51.
const LARGE_ERRORS: f64 = 18.0;
/// The largest exponent of an error of a logit: what is larger is hopeless in any case.
const LARGEST_EXPONENT: f64 = 30.0;

/// What the costs of tables follow from.
pub(super) struct TableCosts<'a> {
    pub isa: Isa,
    pub statistics: &'a TableStatistics,
    pub tied: bool,
    pub damping: f64,
}

/// A method with the loss that it leaves, in numbers of rows: those of [`RowLosses::counts`].
struct MeasuredMethod {
    method: Method,
    /// Of the first rows, for each count.
    sums: Vec<RowLoss>,
}

impl MeasuredMethod {
    /// The loss if all rows are quantized like this.
    fn loss(&self) -> f64 {
        self.sums.last().map_or(0.0, |all| divergence(*all))
    }
}

/// The expected KL divergence from the sums of two kinds of errors. Errors of many rare rows of the lm_head raise the sum
/// over the vocabulary by a share that adds up; the divergence is the logarithm of it.
fn divergence(loss: RowLoss) -> f64 {
    loss.head.ln_1p() + loss.embedding
}

impl TableCosts<'_> {
    /// The candidates of a table.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Invalid`] for a Hessian that is not positive definite; [`crate::interrupt::Interrupted`].
    pub(super) fn candidates(
        &self,
        tensor: &TensorPlan,
        weight: &Weight,
    ) -> anyhow::Result<Vec<Candidate>> {
        let usage = TableUse::new(tensor.tensor.role, self.tied);
        let hessian = TableHessian::new(self.statistics, usage, self.damping)?;
        let rows = hessian.rows_without(self.isa, &weight.view())?;
        let losses = RowLosses::new(hessian.halves(), &rows);
        let measured = self.measure(&hessian, weight, &losses)?;
        let mut found = Vec::new();
        for measured in &measured {
            let method = TensorMethod::Linear(measured.method);
            found.push(Candidate::new(tensor, method, measured.loss())?);
        }
        let (_, listed) = losses.counts.split_last().unwrap_or((&0, &[]));
        for (at, count) in listed.iter().enumerate() {
            for (fine, coarse) in pairs(&measured) {
                let (Method::Int(options), Some(rows)) = (fine.method, coarse.method.coarse())
                else {
                    continue;
                };
                let Some(mixed) = MixedRowsOptions::new(*count as u32, options, rows) else {
                    continue;
                };
                let Some(all) = coarse.sums.last() else { continue };
                let loss = divergence(fine.sums[at] + (*all - coarse.sums[at]));
                let method = TensorMethod::Linear(Method::MixedRows(mixed));
                found.push(Candidate::new(tensor, method, loss)?);
            }
        }
        found.extend(keep_candidate(tensor, weight)?);
        Ok(found)
    }

    /// Quantizes sampled rows with each method.
    fn measure(
        &self,
        hessian: &TableHessian<'_>,
        weight: &Weight,
        losses: &RowLosses,
    ) -> anyhow::Result<Vec<MeasuredMethod>> {
        let cols = weight.cols();
        let (rows, values) = sample_rows(weight, SAMPLED_ROWS);
        // A table of zeros has no errors.
        let weights = squared_norm(&values).max(f64::MIN_POSITIVE);
        let measure = |method: Method| -> anyhow::Result<MeasuredMethod> {
            let packed = hessian.quantize(self.isa.into(), &values, method.for_estimates())?;
            let stored = decode(&packed, rows.len(), cols);
            let errors: Vec<f32> = values.iter().zip(&stored).map(|(w, q)| w - q).collect();
            let left: RowLoss = hessian.row_squares(self.isa, &errors).into_iter().sum();
            let error = squared_norm(&errors) / weights;
            let left = RowLoss {
                head: left.head / weights,
                embedding: left.embedding / weights * (1.0 + LARGE_ERRORS * error * error),
            };
            Ok(MeasuredMethod { method, sums: losses.sums(left) })
        };
        let col_factors =
            Method::wants_col_factors(weight.rows(), |m| measure(m).map(|m| m.loss()))?;
        Method::candidates(cols, col_factors).map(measure).collect()
    }
}

/// The rows of a table, ordered by what they matter in a half of the tokens.
struct RowLosses {
    /// Numbers of rows that may be listed, ascending, and that of all rows.
    counts: Vec<usize>,
    /// The rows that matter most in one half of the tokens come first, with their weights in the other half: rows chosen by
    /// the tokens that weigh them would seem to matter more than they do in other text. Then the same with the halves
    /// exchanged.
    halves: [Vec<RankedRow>; 2],
}

/// A row with its weights in a half of the tokens.
struct RankedRow {
    /// Its sum of squared weights: errors are proportional to it, since every row has a scale of its own.
    norm: f64,
    /// See [`RowWeights`].
    logit: f64,
    /// See [`RowWeights`].
    share: f64,
}

impl RowLosses {
    fn new(halves: &[RowWeights; 2], rows: &[RowWithout]) -> Self {
        let doubled = std::iter::successors(Some(FEWEST_LISTED), |count| Some(2 * count));
        let mut counts: Vec<usize> = doubled.take_while(|count| count * 4 <= rows.len()).collect();
        counts.push(rows.len());
        let ranked = |by: &RowWeights, of: &RowWeights| {
            let loss = |row: usize| by.loss(row, rows[row].squares).sum();
            let mut order: Vec<usize> = (0..rows.len()).collect();
            order.sort_by(|a, b| loss(*b).total_cmp(&loss(*a)).then(a.cmp(b)));
            let row = |row: usize| RankedRow {
                norm: rows[row].norm,
                logit: f64::from(of.logits[row]),
                share: f64::from(of.shares[row]),
            };
            order.into_iter().map(row).collect()
        };
        let [first, second] = halves;
        Self { counts, halves: [ranked(first, second), ranked(second, first)] }
    }

    /// The losses of the first rows, for each count, if their errors have the mean squares `left` per squared weight. A
    /// logit with an error δ of variance v counts e^δ times in the sum over the vocabulary, on average e^(v/2): for large v
    /// more than 1 + v/2.
    fn sums(&self, left: RowLoss) -> Vec<RowLoss> {
        let mut sums = vec![RowLoss::default(); self.counts.len()];
        for rows in &self.halves {
            let (mut sum, mut done) = (RowLoss::default(), 0);
            for (count, total) in self.counts.iter().zip(&mut sums) {
                for row in &rows[done..*count] {
                    let exponent = (left.head * row.norm).min(LARGEST_EXPONENT);
                    sum = sum
                        + RowLoss {
                            head: row.logit * exponent.exp_m1(),
                            embedding: row.share * left.embedding * row.norm,
                        };
                }
                done = *count;
                *total = *total + sum * 0.5;
            }
        }
        sums
    }
}

/// The pairs of a method for listed rows and one for all rows that leaves more of the loss.
fn pairs(measured: &[MeasuredMethod]) -> impl Iterator<Item = (&MeasuredMethod, &MeasuredMethod)> {
    let fine = measured
        .iter()
        .filter(|m| matches!(m.method, Method::Int(options) if options.spec.bits() >= LISTED_BITS));
    fine.flat_map(move |fine| {
        let coarser = measured.iter().filter(|coarse| coarse.loss() > fine.loss());
        coarser.map(move |coarse| (fine, coarse))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last row but one matters most in the first half of the tokens, the last in the second: neither half knows the best
    /// row of the other.
    #[test]
    fn rows_are_weighed_by_other_tokens_than_those_that_rank_them() {
        let count = 4 * FEWEST_LISTED;
        let half = |best: usize| {
            let of = |row| if row == best { 0.5 } else { 0.5 / count as f32 };
            let weights: Vec<f32> = (0..count).map(of).collect();
            RowWeights { logits: weights.clone(), shares: weights }
        };
        let squares = RowLoss { head: 1.0, embedding: 1.0 };
        let row = |_| RowWithout { squares, norm: 2.0 };
        let rows: Vec<RowWithout> = (0..count).map(row).collect();
        let losses = RowLosses::new(&[half(count - 2), half(count - 1)], &rows);
        assert_eq!(losses.counts, [FEWEST_LISTED, count]);
        let [listed, all] = losses.sums(RowLoss { head: 1e-4, embedding: 0.25 })[..] else {
            panic!("two counts")
        };
        // Half of the loss is that of the best row, which is not among the first ones.
        assert!((all.embedding - 0.5 * (1.0 - 0.5 / count as f64)).abs() < 1e-5, "{all:?}");
        assert!(listed.embedding < 0.2 * all.embedding, "{listed:?} of {all:?}");
        // Small errors of logits count as their mean squares, large ones more.
        assert!((all.head / (2e-4 * all.embedding / 0.5) - 1.0).abs() < 1e-3, "{all:?}");
        let large = losses.sums(RowLoss { head: 2.0, embedding: 0.0 });
        let growth = large[1].head / all.head / (4f64.exp_m1() / 2e-4);
        assert!((growth - 1.0).abs() < 1e-3, "{large:?}");
    }
}
