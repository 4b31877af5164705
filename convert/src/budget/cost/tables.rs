//! The costs of the embeddings and the lm_head.

use stb_kernels::Isa;
use stb_runtime::Weight;

use super::{keep_candidate, sample_rows};
use crate::backward::TableStatistics;
use crate::budget::candidate::Candidate;
use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::mixed_rows::MixedRowsOptions;
use crate::quantize::{Method, decode};
use crate::tables::{TableHessian, TableUse};

/// Rows that are quantized, evenly spaced.
const SAMPLED_ROWS: usize = 1024;
/// The smallest number of rows with more bits. Larger numbers are multiples by 2, up to a quarter of all rows.
const FEWEST_LISTED: usize = 64;
/// The fewest bits of listed rows.
const LISTED_BITS: u8 = 3;

/// What the costs of tables follow from.
pub(super) struct TableCosts<'a> {
    pub isa: Isa,
    pub statistics: &'a TableStatistics,
    pub tied: bool,
    pub damping: f64,
}

/// A method with the loss that it leaves, relative to that without the table.
#[derive(Clone, Copy)]
struct Measured {
    method: Method,
    loss: f64,
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
        // The loss without the k rows that matter most, for each k.
        losses.sort_by(|a, b| b.total_cmp(a));
        let all: f64 = losses.iter().sum();
        let mut found = Vec::new();
        for Measured { method, loss } in &measured {
            found.push(Candidate::new(tensor, TensorMethod::Linear(*method), loss * all)?);
        }
        let mut count = FEWEST_LISTED;
        while count * 4 <= losses.len() {
            let listed: f64 = losses[..count].iter().sum();
            for (fine, coarse) in pairs(&measured) {
                let Method::Int(options) = fine.method else { continue };
                let mixed = MixedRowsOptions::new(count as u32, options, coarse.method);
                let Some(mixed) = mixed else { continue };
                let method = TensorMethod::Linear(Method::MixedRows(mixed));
                let loss = fine.loss * listed + coarse.loss * (all - listed);
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
        losses: &[f64],
    ) -> anyhow::Result<Vec<Measured>> {
        let cols = weight.cols();
        let (rows, values) = sample_rows(weight, SAMPLED_ROWS);
        let without: f64 = rows.iter().map(|row| losses[*row]).sum();
        let mut measured = Vec::new();
        for method in Method::candidates(cols) {
            let packed = hessian.quantize(self.isa.into(), &values, method)?;
            let stored = decode(&packed, rows.len(), cols);
            let errors: Vec<f32> = values.iter().zip(&stored).map(|(w, q)| w - q).collect();
            let left = hessian.row_losses(self.isa, rows.iter().copied(), &errors);
            let left: f64 = left.iter().sum();
            measured
                .push(Measured { method, loss: if without > 0.0 { left / without } else { 0.0 } });
        }
        Ok(measured)
    }
}

/// The pairs of a method for listed rows and one for all rows that leaves a larger loss.
fn pairs(measured: &[Measured]) -> impl Iterator<Item = (Measured, Measured)> {
    let fine = measured
        .iter()
        .filter(|m| matches!(m.method, Method::Int(options) if options.spec.bits() >= LISTED_BITS));
    fine.flat_map(|fine| {
        let coarser = measured.iter().filter(|coarse| coarse.loss > fine.loss);
        coarser.map(|coarse| (*fine, *coarse))
    })
}
