//! The costs of the embeddings and the lm_head.

use stb_kernels::Isa;
use stb_runtime::Weight;

use super::{keep_candidate, sample_rows};
use crate::backward::TableStatistics;
use crate::budget::candidate::Candidate;
use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::mixed_rows::MixedRowsOptions;
use crate::quantize::{Method, decode};
use crate::tables::{RowLoss, TableHessian, TableUse};

/// Rows that are quantized, evenly spaced.
const SAMPLED_ROWS: usize = 1024;
/// The smallest number of rows with more bits. Larger numbers are multiples by 2, up to a quarter of all rows.
const FEWEST_LISTED: usize = 64;
/// The fewest bits of listed rows.
const LISTED_BITS: u8 = 3;
/// The factor for large errors of embeddings is 1 + this · ρ², where ρ is the squared error relative to the squared
/// weights: the expectation holds for small errors. SmolLM2-135M loses 0.9 times the expectation with ρ = 0.02, 1.1 times
/// with 0.09 and 3.8 times with 0.51 (`tests/bench/record/2026-11-30-mixed-rows.md`). The lm_head needs no factor: it loses
/// 7 to 13 % less than expected in all three.
const LARGE_ERRORS: f64 = 10.8;

/// What the costs of tables follow from.
pub(super) struct TableCosts<'a> {
    pub isa: Isa,
    pub statistics: &'a TableStatistics,
    pub tied: bool,
    pub damping: f64,
}

/// A method with the loss that it leaves.
#[derive(Clone, Copy)]
struct MeasuredMethod {
    method: Method,
    /// Relative to the loss of a row that is zero.
    relative: RowLoss,
}

impl MeasuredMethod {
    /// The loss of rows that lose `without` if they are zero.
    fn loss(&self, without: RowLoss) -> f64 {
        without.head * self.relative.head + without.embedding * self.relative.embedding
    }
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
        let mut losses = hessian.losses_without(self.isa, &weight.view())?;
        let measured = self.measure(&hessian, weight, &losses)?;
        losses.sort_by(|a, b| b.sum().total_cmp(&a.sum()));
        let all: RowLoss = losses.iter().copied().sum();
        let mut found = Vec::new();
        for measured in &measured {
            let method = TensorMethod::Linear(measured.method);
            found.push(Candidate::new(tensor, method, measured.loss(all))?);
        }
        let mut count = FEWEST_LISTED;
        while count * 4 <= losses.len() {
            let listed: RowLoss = losses[..count].iter().copied().sum();
            let rest: RowLoss = losses[count..].iter().copied().sum();
            for (fine, coarse) in pairs(&measured, all) {
                let (Method::Int(options), Some(rows)) = (fine.method, coarse.method.coarse())
                else {
                    continue;
                };
                let Some(mixed) = MixedRowsOptions::new(count as u32, options, rows) else {
                    continue;
                };
                let method = TensorMethod::Linear(Method::MixedRows(mixed));
                let loss = fine.loss(listed) + coarse.loss(rest);
                found.push(Candidate::new(tensor, method, loss)?);
            }
            count *= 2;
        }
        found.extend(keep_candidate(tensor, weight)?);
        Ok(found)
    }

    /// Quantizes sampled rows with each method. `losses` are those of all rows if they were zero.
    fn measure(
        &self,
        hessian: &TableHessian<'_>,
        weight: &Weight,
        losses: &[RowLoss],
    ) -> anyhow::Result<Vec<MeasuredMethod>> {
        let cols = weight.cols();
        let (rows, values) = sample_rows(weight, SAMPLED_ROWS);
        let without: RowLoss = rows.iter().map(|row| losses[*row]).sum();
        let squares = |values: &[f32]| values.iter().map(|v| f64::from(v * v)).sum::<f64>();
        let ratio = |left: f64, all: f64| if all > 0.0 { left / all } else { 0.0 };
        let mut measured = Vec::new();
        for method in Method::candidates(cols) {
            let packed = hessian.quantize(self.isa.into(), &values, method.for_estimates())?;
            let stored = decode(&packed, rows.len(), cols);
            let errors: Vec<f32> = values.iter().zip(&stored).map(|(w, q)| w - q).collect();
            let left = hessian.row_losses(self.isa, rows.iter().copied(), &errors);
            let left: RowLoss = left.into_iter().sum();
            let error = ratio(squares(&errors), squares(&values));
            let relative = RowLoss {
                head: ratio(left.head, without.head),
                embedding: ratio(left.embedding, without.embedding)
                    * (1.0 + LARGE_ERRORS * error * error),
            };
            measured.push(MeasuredMethod { method, relative });
        }
        Ok(measured)
    }
}

/// The pairs of a method for listed rows and one for all rows that leaves more of the loss `all`.
fn pairs(
    measured: &[MeasuredMethod],
    all: RowLoss,
) -> impl Iterator<Item = (MeasuredMethod, MeasuredMethod)> {
    let fine = measured
        .iter()
        .filter(|m| matches!(m.method, Method::Int(options) if options.spec.bits() >= LISTED_BITS));
    fine.flat_map(move |fine| {
        let coarser = measured.iter().filter(move |coarse| coarse.loss(all) > fine.loss(all));
        coarser.map(|coarse| (*fine, *coarse))
    })
}
