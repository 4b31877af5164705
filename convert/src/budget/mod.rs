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

/// Replaces the methods in `plan` so that the file with `meta` has at most `bits` true bits per
/// parameter.
///
/// # Errors
/// [`Error::Usage`] if no combination is small enough, or the calibration text is too short; [`Error::Invalid`]
/// for weights that are not finite; [`crate::interrupt::Interrupted`].
pub fn fit(
    plan: &mut Plan,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
    meta: &Meta,
    bits: f64,
) -> anyhow::Result<()> {
    let budget = (bits * plan.parameters() as f64 / 8.0).floor() as u64;
    let all = cost::candidates(plan, checkpoint, recipe, source)?;
    let hulls: Vec<Vec<Candidate>> = all.iter().cloned().map(lower_hull).collect();
    // Start with the smallest encoding of each tensor; then take the steps that remove most error per byte while
    // they fit.
    let mut level = vec![0; hulls.len()];
    for (tensor, hull) in plan.tensors.iter_mut().zip(&hulls) {
        if let Some(smallest) = hull.first() {
            tensor.set(smallest.method)?;
        }
    }
    let smallest = plan.file_bytes(meta);
    if smallest > budget {
        return Err(Error::usage(format!(
            "the smallest file possible has {:.3} true bits per parameter ({smallest} bytes), \
             more than the {bits} asked for; tokenizer, norms and padding are part of it",
            smallest as f64 * 8.0 / plan.parameters() as f64
        ))
        .into());
    }
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (t, hull) in hulls.iter().enumerate() {
        for (k, pair) in hull.windows(2).enumerate() {
            let gain = (pair[0].error - pair[1].error) / (pair[1].bytes - pair[0].bytes) as f64;
            steps.push((gain, t, k + 1));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, t, k) in steps {
        // After a step that did not fit, later steps of the same tensor are skipped.
        if level[t] + 1 != k {
            continue;
        }
        let before = plan.tensors[t].method;
        plan.tensors[t].set(hulls[t][k].method)?;
        if plan.file_bytes(meta) > budget {
            plan.tensors[t].set(before)?;
        } else {
            level[t] = k;
        }
    }
    let chosen = hulls.iter().zip(level).map(|(hull, k)| hull.get(k).copied()).collect();
    Ok(fill(plan, &all, chosen, meta, budget)?)
}

/// Spends the rest of the budget: repeats the change of one tensor that removes most error and still fits.
/// Considers all candidates, including those above the lower hull.
fn fill(
    plan: &mut Plan,
    all: &[Vec<Candidate>],
    mut chosen: Vec<Option<Candidate>>,
    meta: &Meta,
    budget: u64,
) -> Result<()> {
    loop {
        let left = budget.saturating_sub(plan.file_bytes(meta));
        let mut better: Vec<(f64, usize, Candidate)> = Vec::new();
        for (t, (candidates, chosen)) in all.iter().zip(&chosen).enumerate() {
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
            if plan.file_bytes(meta) <= budget {
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
