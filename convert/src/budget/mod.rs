//! Choosing encodings for a size: the least estimated error for a number of bytes.
//!
//! Each tensor has a few candidate encodings. Their errors are estimated without compensation, on
//! the second moments (diagonal only) of a few calibration sequences that run through the dense
//! model; what the quantisers reach later is lower, in about the same proportion. Bytes are exact.

use stb_format::encoding::{IntGroup, Nm};
use stb_format::{Meta, SECTION_ALIGN};
use stb_runtime::{Checkpoint, Error, Result};

use crate::calibration::Source;
use crate::plan::{Method, Plan, Treatment, input_of};
use crate::quantise::{int_group, nm};
use crate::recipe::Recipe;
use crate::sensitivity::{Diagonals, SEQUENCES, diagonals};

/// Rows of a matrix that the estimate looks at, spread evenly.
const ROWS: usize = 128;
/// Columns per scale of the joint codes.
const BLOCK: u16 = 128;
/// How much more an error counts that no compensation will lower, that of embeddings and head. Of 1, 3,
/// 6 and 12, 6 gave the lowest perplexity, or one within its error of it, for files of 1.5, 2 and 3
/// bits of a model with 3.7 M parameters.
const UNCOMPENSATED: f64 = 6.0;

/// A way to store a tensor.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    treatment: Treatment,
    bytes: u64,
    /// Relative squared error of the output.
    error: f64,
}

/// Replaces the treatments in `plan` so that the file with `meta` has at most `bits` true bits per
/// parameter.
///
/// # Errors
/// [`Error::Usage`] if no combination is small enough, or the calibration text is too short.
pub fn fit(
    plan: &mut Plan,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &Source,
    meta: &Meta,
    bits: f64,
) -> Result<()> {
    let budget = (bits * plan.parameters() as f64 / 8.0).floor() as u64;
    let samples = recipe.calibration.samples.min(SEQUENCES);
    let moments = diagonals(checkpoint, &recipe.calibration, source, samples)?;
    let mut all: Vec<Vec<Candidate>> = Vec::new();
    for tensor in &plan.tensors {
        all.push(candidates(plan, tensor.name.as_str(), checkpoint, &moments)?);
    }
    let hulls: Vec<Vec<Candidate>> = all.iter().cloned().map(lower_hull).collect();
    // Everything at its smallest, then the steps that remove most error per byte, while they fit.
    let mut level = vec![0; hulls.len()];
    for (tensor, hull) in plan.tensors.iter_mut().zip(&hulls) {
        if let Some(smallest) = hull.first() {
            tensor.set(smallest.treatment)?;
        }
    }
    let smallest = plan.file_bytes(meta);
    if smallest > budget {
        return Err(Error::usage(format!(
            "the smallest file this model can be has {:.3} true bits per parameter ({smallest} bytes), \
             more than the {bits} asked for; tokenizer, norms and padding are part of it",
            smallest as f64 * 8.0 / plan.parameters() as f64
        )));
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
        // A step that did not fit bars the later ones of its tensor.
        if level[t] + 1 != k {
            continue;
        }
        let before = plan.tensors[t].treatment;
        plan.tensors[t].set(hulls[t][k].treatment)?;
        if plan.file_bytes(meta) > budget {
            plan.tensors[t].set(before)?;
        } else {
            level[t] = k;
        }
    }
    let chosen = hulls.iter().zip(level).map(|(hull, k)| hull.get(k).copied()).collect();
    fill(plan, &all, chosen, meta, budget)
}

/// Spends what is left of the budget: the change of one tensor that removes most error and still fits,
/// again and again. Here a candidate may be one that mixtures of others would beat: there is no room for those.
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
            // Padding between sections may hide up to a page of a change.
            let fitting =
                gains.filter(|c| c.bytes.saturating_sub(now.bytes) < left + SECTION_ALIGN);
            better.extend(fitting.map(|c| (now.error - c.error, t, *c)));
        }
        better.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut changed = false;
        for (_, t, candidate) in better {
            let before = plan.tensors[t].treatment;
            plan.tensors[t].set(candidate.treatment)?;
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

/// The ways to store a tensor, with bytes and errors; vectors stay as they are.
fn candidates(
    plan: &Plan,
    name: &str,
    checkpoint: &Checkpoint,
    moments: &Diagonals,
) -> Result<Vec<Candidate>> {
    let tensor = plan.tensors.iter().find(|t| t.name == name);
    let tensor = tensor.ok_or_else(|| Error::Internal { what: format!("no plan for {name}") })?;
    if tensor.shape.len() != 2 {
        return Ok(Vec::new());
    }
    let weight = checkpoint.weight(name)?;
    let (rows, cols) = (weight.rows(), weight.cols());
    let view = weight.view();
    let step = rows.div_ceil(ROWS).max(1);
    let mut sample = vec![0.0; rows.div_ceil(step) * cols];
    for (i, row) in sample.chunks_exact_mut(cols).enumerate() {
        view.decode_row(i * step, row);
    }
    let mut priced = Vec::new();
    let mut add = |treatment: Treatment, error: f64| -> Result<()> {
        let mut copy = tensor.clone();
        copy.set(treatment)?;
        let compensated = matches!(treatment, Treatment::Linear(_));
        let factor = if compensated { 1.0 } else { UNCOMPENSATED };
        let error = error * weight_of(tensor.elements()) * factor;
        priced.push(Candidate { treatment, bytes: copy.bytes, error });
        Ok(())
    };
    let inputs = tensor.layer().and_then(|(i, part)| Some(&moments[i][input_of(part)?]));
    let flat = vec![1.0; cols];
    let importance = inputs.unwrap_or(&flat);
    let ints = [(2, 64), (3, 128), (3, 64), (4, 128), (4, 32), (8, 128), (8, 32)];
    for spec in ints.into_iter().filter_map(|(bits, group)| IntGroup::new(bits, group)) {
        let error = int_group::plain_error(&sample, cols, importance, spec);
        let treatment = match inputs {
            Some(_) => Treatment::Linear(Method::Int(int_group::Options::full(spec))),
            None => Treatment::Round(spec),
        };
        add(treatment, error)?;
    }
    if inputs.is_some() {
        let codes = [(1, 8), (1, 4), (2, 8), (2, 4)];
        for spec in codes.into_iter().filter_map(|(n, m)| Nm::new(n, m, 4, BLOCK, false)) {
            let error = nm::plain_error(&sample, cols, importance, spec);
            add(
                Treatment::Linear(Method::Nm(nm::Options { spec, sweeps: 4, refit: true })),
                error,
            )?;
        }
    }
    if let stb_format::Encoding::Dense(kind) = *weight.encoding() {
        add(Treatment::Keep(kind), 0.0)?;
    }
    Ok(priced)
}

/// How much the relative error of a tensor counts: between one vote per tensor and one per weight.
/// Of the powers 0, ½, ¾ and 1 of the size, ½ gave the lowest mean log-perplexity for files of 1.5,
/// 1.78 and 2.1 bits of a model with 3.7 M parameters (TinyStories).
fn weight_of(elements: u64) -> f64 {
    (elements as f64).sqrt()
}

/// The candidates that no mixture of others beats, by size.
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
    use stb_format::encoding::Dense;

    #[test]
    fn hulls_fall_ever_more_slowly() {
        let points = [(10, 1.0), (20, 0.9), (30, 0.2), (30, 0.3), (40, 0.25), (50, 0.1), (90, 0.0)];
        let treatment = Treatment::Keep(Dense::F32);
        let candidates =
            points.map(|(bytes, error)| Candidate { treatment, bytes, error }).to_vec();
        let hull: Vec<u64> = lower_hull(candidates).iter().map(|c| c.bytes).collect();
        assert_eq!(hull, [10, 30, 50, 90]);
    }
}
