//! Allocates N of N:8 to the decoder layers.

use rayon::prelude::*;
use stb_runtime::{Checkpoint, Error, Result};

use crate::calibration::CalibrationText;
use crate::plan::{Plan, TensorMethod};
use crate::quantize::metric::{Metric, Scorer};
use crate::quantize::{Allocation, KeptByLayer};
use crate::recipe::Recipe;
use crate::sensitivity::{Diagonals, diagonals};

/// A weight is an outlier if its score is above this many times the mean of its decoder layer
/// (`Hyper_m` of the published code).
const OUTLYING: f64 = 6.0;
/// The difference of N between the layers with most and fewest outliers (`Lamda` of the published code).
const SPREAD: f64 = 2.0;

/// Gives each decoder layer of `plan` its own N if the recipe has such an allocation.
///
/// # Errors
/// As for [`diagonals`].
pub fn allocate(
    plan: &mut Plan,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
) -> Result<()> {
    let kept = recipe.linear.method().and_then(|method| method.quantizer().kept_by_layer());
    let Some(KeptByLayer { n, allocation, metric }) = kept else { return Ok(()) };
    let squares = |samples| diagonals(checkpoint, &recipe.calibration, source, samples);
    let counts = match allocation {
        Allocation::Uniform => return Ok(()),
        Allocation::Outlier => {
            let samples = recipe.calibration.samples.min(crate::sensitivity::SEQUENCES);
            let ratios = outlier_ratios(plan, checkpoint, metric, &squares(samples)?)?;
            exact_counts(&spread(&ratios), n)
        }
        Allocation::PublishedCode => {
            let samples = recipe.calibration.samples;
            published_counts(&outlier_ratios(plan, checkpoint, metric, &squares(samples)?)?, n)
        }
        Allocation::Paper => paper_counts(&layer_norms(plan, checkpoint)?, n),
        Allocation::Sine => {
            let layers = checkpoint.spec.layers as usize;
            let angle = |i: usize| (i as f64 + 0.5) / layers as f64 * std::f64::consts::TAU;
            exact_counts(&(0..layers).map(|i| angle(i).sin()).collect::<Vec<_>>(), n)
        }
    };
    for tensor in &mut plan.tensors {
        let layer = tensor.tensor.layer;
        if let (Some(i), TensorMethod::Linear(mut method)) = (layer, tensor.method) {
            if !method.quantizer_mut().keep_of_8(counts[i]) {
                return Err(Error::Internal { what: format!("N is {}", counts[i]) });
            }
            tensor.set(TensorMethod::Linear(method))?;
        }
    }
    Ok(())
}

/// The share of outliers among the weights of each decoder layer, scored by `metric`. `squares` are the sums of
/// squares of the dense model's inputs.
fn outlier_ratios(
    plan: &Plan,
    checkpoint: &Checkpoint,
    metric: Metric,
    squares: &Diagonals,
) -> Result<Vec<f64>> {
    let mut ratios = Vec::new();
    for (index, squares) in squares.iter().enumerate() {
        let mut parts = Vec::new();
        for tensor in &plan.tensors {
            let Some((_, linear)) = tensor.linear().filter(|(i, _)| *i == index) else { continue };
            let input = linear.input();
            let weights = checkpoint.weight(&tensor.tensor.name)?.decode();
            let norms: Vec<f32> = squares[input].iter().map(|s| s.sqrt()).collect();
            // There is no Hessian yet: the squared norm takes the place of the diagonal.
            let scorer = Scorer::new(metric, &weights, &norms, &squares[input]);
            parts.push((scorer, weights, norms.len()));
        }
        ratios.push(outlier_ratio(&parts));
    }
    Ok(ratios)
}

/// The Frobenius norm of all linear weights of each decoder layer.
fn layer_norms(plan: &Plan, checkpoint: &Checkpoint) -> Result<Vec<f64>> {
    let mut squares = vec![0.0; checkpoint.spec.layers as usize];
    for tensor in &plan.tensors {
        if let Some((i, _)) = tensor.matrix() {
            let weights = checkpoint.weight(&tensor.tensor.name)?.decode();
            squares[i] += weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        }
    }
    Ok(squares.into_iter().map(f64::sqrt).collect())
}

/// N of each decoder layer by the paper's formula: a larger share of the summed norm gets a larger N.
fn paper_counts(norms: &[f64], n: u8) -> Vec<u8> {
    let all: f64 = norms.iter().sum();
    let ratio = f64::from(n) / 8.0;
    let share = |norm: &f64| if all > 0.0 { norm / all } else { 0.0 };
    let count = |norm: &f64| 8.0 * (share(norm) + (1.0 - share(norm)) * ratio);
    norms.iter().map(|norm| count(norm).round().clamp(1.0, 8.0) as u8).collect()
}

/// N of each decoder layer as the published code allocates it; the mean is not always `n`.
fn published_counts(ratios: &[f64], n: u8) -> Vec<u8> {
    let offset = |shift: f64| match shift.round_ties_even() {
        1.0 => 2.0,
        other => other,
    };
    let shifts = spread(ratios).into_iter();
    shifts.map(|s| (f64::from(n) + offset(s)).clamp(1.0, 8.0) as u8).collect()
}

/// The ratios scaled to a range of [`SPREAD`] and shifted to a mean of zero.
fn spread(ratios: &[f64]) -> Vec<f64> {
    let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let high = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scale = |r: &f64| if high > low { (r - low) / (high - low) * SPREAD } else { 0.0 };
    let scaled: Vec<f64> = ratios.iter().map(scale).collect();
    let mean = scaled.iter().sum::<f64>() / scaled.len().max(1) as f64;
    scaled.into_iter().map(|s| s - mean).collect()
}

/// The share of outliers among the weights of a decoder layer; each part is a linear layer with its columns.
fn outlier_ratio(parts: &[(Scorer, Vec<f32>, usize)]) -> f64 {
    let scores = |(scorer, weights, cols): &(Scorer, Vec<f32>, usize)| -> Vec<f32> {
        let score = |(i, w): (usize, &f32)| scorer.score(i / cols, i % cols, *w);
        weights.par_iter().enumerate().map(score).collect()
    };
    let all: Vec<Vec<f32>> = parts.iter().map(scores).collect();
    let count: usize = all.iter().map(Vec::len).sum();
    let mean = all.iter().flatten().map(|s| f64::from(*s)).sum::<f64>() / count.max(1) as f64;
    let limit = OUTLYING * mean;
    let outlying = all.iter().flatten().filter(|s| f64::from(**s) > limit).count();
    outlying as f64 / count.max(1) as f64
}

/// Integers from 1 to 8 close to n + offset, with the exact mean `n`.
fn exact_counts(offsets: &[f64], n: u8) -> Vec<u8> {
    let targets: Vec<f64> = offsets.iter().map(|p| f64::from(n) + p).collect();
    let mut counts: Vec<u8> = targets.iter().map(|t| t.round().clamp(1.0, 8.0) as u8).collect();
    let target_sum = usize::from(n) * counts.len();
    // Change the layers with the largest rounding error by one until the sum is right.
    loop {
        let sum: usize = counts.iter().map(|c| usize::from(*c)).sum();
        let raise = match sum.cmp(&target_sum) {
            std::cmp::Ordering::Equal => return counts,
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Greater => false,
        };
        let movable = |i: &usize| if raise { counts[*i] < 8 } else { counts[*i] > 1 };
        let shortage = |i: usize| targets[i] - f64::from(counts[i]);
        let by_shortage = |a: &usize, b: &usize| shortage(*a).total_cmp(&shortage(*b));
        let layers = (0..counts.len()).filter(movable);
        let next = if raise { layers.max_by(by_shortage) } else { layers.min_by(by_shortage) };
        let Some(i) = next else { return counts };
        counts[i] = if raise { counts[i] + 1 } else { counts[i] - 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_exact_and_order_is_kept() {
        let ratios = [0.4, 0.05, 0.1, 0.2, 0.07, 0.3, 0.06];
        for n in 1..=8 {
            let counts = exact_counts(&spread(&ratios), n);
            assert_eq!(counts.iter().map(|c| usize::from(*c)).sum::<usize>(), 7 * usize::from(n));
            assert!(counts.iter().all(|c| (1..=8).contains(c)));
            assert!(counts[0] >= counts[3] && counts[3] >= counts[1], "{counts:?}");
        }
        assert_eq!(exact_counts(&spread(&[0.1, 0.1]), 4), [4, 4]);
        assert!(exact_counts(&spread(&ratios), 4)[0] > 4);
    }

    /// Values recorded from the reference implementation of the published code and the paper's formula.
    #[test]
    fn published_rules() {
        let ratios = [0.51975, 0.39714, 0.32444, 0.35590, 0.30165];
        assert_eq!(published_counts(&ratios, 4), [6, 4, 3, 4, 3]);
        assert_eq!(paper_counts(&[1.0; 5], 4), [5; 5]);
    }
}
