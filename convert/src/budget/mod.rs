//! Chooses encodings for a size budget: the least estimated error within a number of bytes.
//!
//! Each tensor has a few candidate encodings, with exact bytes and an estimate of the effect on the output
//! distribution (`cost`).

mod candidate;
mod cost;

use candidate::Candidate;
pub use cost::memory;
use stb_format::{Meta, SECTION_ALIGN};
use stb_runtime::{Checkpoint, Error, Result};

use crate::calibration::CalibrationText;
use crate::plan::Plan;
use crate::recipe::Recipe;

/// The candidates of each tensor with their costs, measured once and used for any number of sizes.
#[derive(Clone, Debug)]
pub struct Costs {
    all: Vec<Vec<Candidate>>,
    /// The lower convex hull of each.
    hulls: Vec<Vec<Candidate>>,
}

/// The smallest and the largest size of a file, in true bits per parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SizeRange {
    /// With the smallest encoding of each tensor.
    pub smallest: f64,
    /// With the best encoding of each tensor.
    pub largest: f64,
}

/// Measured divergence over the estimate, in nats per token, for the first guess of a search: 1.5 for SmolLM2-135M at 2 bits.
const FIRST_RATIO: f64 = 1.5;

/// Sizes are multiples of this, in true bits per parameter: a size that is found can be asked for.
pub const SIZE_STEP: f64 = 0.001;

impl Costs {
    /// Measures the candidates of each tensor of `plan`.
    ///
    /// # Errors
    /// [`Error::Usage`] if the calibration text is too short; [`Error::Invalid`] for weights that are not finite;
    /// [`crate::interrupt::Interrupted`].
    pub fn measure(
        plan: &Plan,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        source: &CalibrationText,
    ) -> anyhow::Result<Self> {
        let all = cost::candidates(plan, checkpoint, recipe, source)?;
        let hulls = all.iter().cloned().map(lower_hull).collect();
        Ok(Self { all, hulls })
    }

    /// Replaces the methods in `plan` so that the file with `meta` has at most `bits` true bits per parameter.
    /// Returns the estimate of the error that remains, which falls with `bits`; only ratios of it mean something.
    ///
    /// # Errors
    /// [`Error::Usage`] if no combination is small enough.
    pub fn fit(&self, plan: &mut Plan, meta: &Meta, bits: f64) -> Result<f64> {
        let budget = Budget {
            bytes: (bits * plan.parameters() as f64 / 8.0).floor() as u64,
            meta: plan.file_bytes(meta) - plan.file_bytes(&Meta::new()),
        };
        // Start with the smallest encoding of each tensor; then take the steps that remove most error per byte while
        // they fit.
        let mut level = vec![0; self.hulls.len()];
        self.set_smallest(plan)?;
        let smallest = budget.file_bytes(plan);
        if smallest > budget.bytes {
            return Err(Error::usage(format!(
                "the smallest file possible has {:.3} true bits per parameter ({smallest} bytes), \
                 more than the {bits} asked for; tokenizer, norms and padding are part of it",
                smallest as f64 * 8.0 / plan.parameters() as f64
            )));
        }
        for (t, k) in self.steps() {
            // After a step that did not fit, later steps of the same tensor are skipped.
            if level[t] + 1 != k {
                continue;
            }
            let before = plan.tensors[t].method;
            plan.tensors[t].set(self.hulls[t][k].method)?;
            if budget.file_bytes(plan) > budget.bytes {
                plan.tensors[t].set(before)?;
            } else {
                level[t] = k;
            }
        }
        let mut chosen: Vec<Option<Candidate>> =
            self.hulls.iter().zip(level).map(|(hull, k)| hull.get(k).copied()).collect();
        self.fill(plan, &mut chosen, budget)?;
        Ok(chosen.iter().flatten().map(|c| c.error).sum())
    }

    /// The sizes between which [`Costs::fit`] has a choice, multiples of [`SIZE_STEP`].
    ///
    /// # Errors
    /// None in practice.
    pub fn range(&self, plan: &Plan, meta: &Meta) -> Result<SizeRange> {
        let mut plan = plan.clone();
        let bits = |plan: &Plan| {
            // The size is a part of the metadata, with one digit or several.
            let bytes = plan.file_bytes(meta) + 16;
            round_up(bytes as f64 * 8.0 / plan.parameters() as f64)
        };
        self.set_smallest(&mut plan)?;
        let smallest = bits(&plan);
        for (tensor, hull) in plan.tensors.iter_mut().zip(&self.hulls) {
            if let Some(largest) = hull.last() {
                tensor.set(largest.method)?;
            }
        }
        Ok(SizeRange { smallest, largest: bits(&plan) })
    }

    /// The smallest size whose estimated error is at most `error`, a multiple of [`SIZE_STEP`]; the largest size if
    /// there is none.
    ///
    /// # Errors
    /// None in practice.
    pub fn size_for(&self, plan: &Plan, meta: &Meta, error: f64) -> Result<f64> {
        let mut plan = plan.clone();
        let SizeRange { smallest: mut low, largest: mut high } = self.range(&plan, meta)?;
        if self.fit(&mut plan, meta, low)? <= error {
            return Ok(low);
        }
        while high - low > 1.5 * SIZE_STEP {
            let middle = round_up((low + high) / 2.0).min(high - SIZE_STEP);
            match self.fit(&mut plan, meta, middle)? <= error {
                true => high = middle,
                false => low = middle,
            }
        }
        Ok(round_up(high))
    }

    /// The size to begin a search for a KL divergence of `kl` nats per token with.
    ///
    /// # Errors
    /// None in practice.
    pub fn first_size(&self, plan: &Plan, meta: &Meta, kl: f64) -> Result<f64> {
        self.size_for(plan, meta, kl / FIRST_RATIO)
    }

    /// The smallest size at which the KL divergence is expected to be at most `kl` nats per token, where a file of
    /// the size and divergence `measured` exists: the estimate is scaled to this measurement.
    ///
    /// # Errors
    /// None in practice.
    pub fn scaled_size(
        &self,
        plan: &Plan,
        meta: &Meta,
        measured: (f64, f64),
        kl: f64,
    ) -> Result<f64> {
        let (bits, found) = measured;
        let estimate = self.fit(&mut plan.clone(), meta, bits)?;
        self.size_for(plan, meta, estimate * kl / found.clamp(1e-9, 1e9))
    }

    fn set_smallest(&self, plan: &mut Plan) -> Result<()> {
        for (tensor, hull) in plan.tensors.iter_mut().zip(&self.hulls) {
            if let Some(smallest) = hull.first() {
                tensor.set(smallest.method)?;
            }
        }
        Ok(())
    }

    /// The steps along the hulls, those that remove most error per byte first: tensor, and candidate of its hull.
    fn steps(&self) -> Vec<(usize, usize)> {
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (t, hull) in self.hulls.iter().enumerate() {
            for (k, pair) in hull.windows(2).enumerate() {
                let gain = (pair[0].error - pair[1].error) / (pair[1].bytes - pair[0].bytes) as f64;
                steps.push((gain, t, k + 1));
            }
        }
        steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        steps.into_iter().map(|(_, t, k)| (t, k)).collect()
    }

    /// Spends the rest of the budget: repeats the change of one tensor that removes most error and still fits.
    /// Considers all candidates, including those above the lower hull.
    fn fill(
        &self,
        plan: &mut Plan,
        chosen: &mut [Option<Candidate>],
        budget: Budget,
    ) -> Result<()> {
        loop {
            let left = budget.bytes.saturating_sub(budget.file_bytes(plan));
            let mut better: Vec<(f64, usize, Candidate)> = Vec::new();
            for (t, (candidates, chosen)) in self.all.iter().zip(chosen.iter()).enumerate() {
                let Some(now) = chosen else { continue };
                let gains = candidates.iter().filter(|c| c.error < now.error);
                // Padding between sections can absorb up to `SECTION_ALIGN` bytes.
                let fitting =
                    gains.filter(|c| c.bytes.saturating_sub(now.bytes) < left + SECTION_ALIGN);
                better.extend(fitting.map(|c| (now.error - c.error, t, *c)));
            }
            better.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut changed = false;
            for (_, t, candidate) in better {
                let before = plan.tensors[t].method;
                plan.tensors[t].set(candidate.method)?;
                if budget.file_bytes(plan) <= budget.bytes {
                    chosen[t] = Some(candidate);
                    changed = true;
                    break;
                }
                plan.tensors[t].set(before)?;
            }
            if !changed {
                return Ok(());
            }
        }
    }
}

/// The bytes that a file may have.
#[derive(Clone, Copy)]
struct Budget {
    bytes: u64,
    /// Bytes that the metadata add to a file without entries. They end the file, so that nothing is aligned after
    /// them.
    meta: u64,
}

impl Budget {
    fn file_bytes(self, plan: &Plan) -> u64 {
        plan.file_bytes(&Meta::new()) + self.meta
    }
}

/// The next multiple of [`SIZE_STEP`].
fn round_up(bits: f64) -> f64 {
    // Dividing by the inverse, an integer, gives the number that the decimal text of the size has.
    let steps = 1.0 / SIZE_STEP;
    (bits * steps - 1e-6).ceil() / steps.round()
}

/// The lower convex hull of the candidates in the plane of size and error, sorted by size.
fn lower_hull(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error)));
    let mut hull: Vec<Candidate> = Vec::new();
    for c in candidates {
        if hull.last().is_some_and(|last| c.error >= last.error || c.bytes == last.bytes) {
            continue;
        }
        let slope = |a: &Candidate, b: &Candidate| (a.error - b.error) / (b.bytes - a.bytes) as f64;
        while let [.., a, b] = hull.as_slice()
            && slope(a, b) <= slope(b, &c)
        {
            hull.pop();
        }
        hull.push(c);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::TensorMethod;
    use stb_format::encoding::Dense;

    #[test]
    fn hulls_are_convex() {
        let points = [(10, 1.0), (20, 0.9), (30, 0.2), (30, 0.3), (40, 0.25), (50, 0.1), (90, 0.0)];
        let method = TensorMethod::Keep(Dense::F32);
        let candidates = points.map(|(bytes, error)| Candidate { method, bytes, error }).to_vec();
        let hull: Vec<u64> = lower_hull(candidates).iter().map(|c| c.bytes).collect();
        assert_eq!(hull, [10, 30, 50, 90]);
    }
}
