//! The flip experiment of the paper (§1, appendix B, algorithm 3, table 13): the perplexity of a binarized model when a
//! share of its signs is flipped, chosen at random or by importance, least important first.
//!
//! In each linear layer of the decoder a share of the weights that are neither pruned nor in a salient
//! column changes sign. The weights of a smaller share are a subset of those of a larger share.

use std::fmt::Write;
use std::ops::ControlFlow;

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use serde::Serialize;
use stb_format::arch::Linear;
use stb_format::encoding::MatrixView;
use stb_runtime::{
    Checkpoint, Engine, Error, Layer, PerplexityOptions, Result, Tokenizer, Weight, perplexity,
};

use crate::calibration::CalibrationText;
use crate::plot::{Chart, Point, Series, svg};
use crate::recipe::{Calibration, Recipe};
use crate::sensitivity::diagonals;

/// Options of the flip experiment.
#[derive(Clone, Debug)]
pub struct FlipOptions {
    /// Shares of the weights of each layer that may be flipped, each from 0 to 1.
    pub shares: Vec<f64>,
    /// Seeds of the random order; each is a curve.
    pub seeds: Vec<u64>,
    /// Whether salient columns are flipped too.
    pub salient: bool,
    /// How perplexity is measured.
    pub evaluation: PerplexityOptions,
}

/// The order in which weights are flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlipOrder {
    /// At random.
    Random {
        /// The seed.
        seed: u64,
    },
    /// By ascending |w|·‖x‖, with w of the dense checkpoint and ‖x‖ the norm of the weight's
    /// input in calibration.
    LeastImportant,
}

impl std::fmt::Display for FlipOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Random { seed } => write!(f, "random, seed {seed}"),
            Self::LeastImportant => write!(f, "least important first"),
        }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Flipped {
    /// The order of flips; `None` for the measurement without flips.
    pub order: Option<FlipOrder>,
    /// Share of the weights that may be flipped.
    pub share: f64,
    /// Weights whose sign changed.
    pub flipped: u64,
    /// exp of the mean loss.
    pub perplexity: f64,
    /// One standard error over windows.
    pub standard_error: f64,
}

/// A binarization in which every weight keeps its sign: the paper's structure without its mask.
///
/// # Errors
/// None in practice: the recipe is derived from a built-in one.
pub fn binarized() -> Result<Recipe> {
    Recipe::load("stbllm-4of8")?.changed(|file| {
        file.name = "stbllm-8of8".into();
        file.description = "The STBLLM structure with no weight pruned".into();
        file.body.n = Some(8);
        file.body.allocation = None;
    })
}

/// Flips signs in the model of `engine`, a conversion of `checkpoint`, and measures perplexity. Restores the model.
/// Decodes all linear layers: 8 bytes of memory per weight. Calls `progress` with the number of measurements done,
/// the number of all, and the latest.
///
/// # Errors
/// [`Error::Usage`] for shares out of range, and those of [`perplexity`]; [`Error::Invalid`] if model
/// and checkpoint do not belong together.
pub fn flip(
    engine: &mut Engine,
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    source: &CalibrationText,
    text: &str,
    options: &FlipOptions,
    progress: &dyn Fn(usize, usize, &Flipped),
) -> Result<Vec<Flipped>> {
    if !options.shares.iter().all(|s| (0.0..=1.0).contains(s)) {
        return Err(Error::usage("the share of flipped signs is between 0 and 1"));
    }
    let mut shares = options.shares.clone();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let tokenizer = engine.model.tokenizer()?;
    let mut matrices = flip_matrices(engine, checkpoint, calibration, source, options.salient)?;
    let mut orders = vec![FlipOrder::LeastImportant];
    orders.extend(options.seeds.iter().map(|seed| FlipOrder::Random { seed: *seed }));
    let all = 1 + orders.len() * shares.len();
    let original = engine.model.layers.clone();
    let first = measure(engine, &tokenizer, text, options, None, 0.0, 0)?;
    progress(1, all, &first);
    let mut found = vec![first];
    for order in orders {
        matrices.par_iter_mut().enumerate().for_each(|(i, m)| m.arrange(order, i as u64));
        for share in &shares {
            let mut flipped = 0;
            for matrix in &matrices {
                flipped += matrix.write_flipped(&mut engine.model.layers, *share)?;
            }
            let result = measure(engine, &tokenizer, text, options, Some(order), *share, flipped);
            let result = match result {
                Ok(result) => result,
                Err(e) => {
                    engine.model.layers = original;
                    return Err(e);
                }
            };
            found.push(result);
            progress(found.len(), all, &result);
        }
    }
    engine.model.layers = original;
    Ok(found)
}

fn measure(
    engine: &Engine,
    tokenizer: &Tokenizer,
    text: &str,
    options: &FlipOptions,
    order: Option<FlipOrder>,
    share: f64,
    flipped: u64,
) -> Result<Flipped> {
    let found = perplexity(engine, None, tokenizer, text, &options.evaluation, &|_, _| {
        ControlFlow::Continue(())
    })?;
    Ok(Flipped {
        order,
        share,
        flipped,
        perplexity: found.perplexity.value,
        standard_error: found.perplexity.standard_error,
    })
}

/// Calibration sequences for the norms of inputs.
const SEQUENCES: usize = 32;

/// A linear layer with the weights that may be flipped.
struct FlipMatrix {
    layer: usize,
    linear: Linear,
    rows: u64,
    cols: u64,
    /// Decoded, [rows, cols].
    values: Vec<f32>,
    /// Indices of the weights that may be flipped, in the order of the flips.
    positions: Vec<u32>,
    /// Importance of each weight, [rows, cols].
    importance: Vec<f32>,
}

/// All linear layers of the decoder, decoded.
fn flip_matrices(
    engine: &Engine,
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    source: &CalibrationText,
    salient: bool,
) -> Result<Vec<FlipMatrix>> {
    let squares = diagonals(checkpoint, calibration, source, SEQUENCES)?;
    let mut matrices = Vec::new();
    for (index, layer) in engine.model.layers.iter().enumerate() {
        for tensor in engine.model.spec.layer_tensors(index as u64) {
            let Some(linear) = tensor.linear() else { continue };
            let weight = layer.linear(linear);
            let dense = checkpoint.weight(&tensor.name)?;
            let norms = squares.get(index).map(|squares| &squares[linear.input()]);
            let norms = norms.filter(|norms| norms.len() == weight.cols());
            let (Some(norms), true) = (norms, dense.rows() == weight.rows()) else {
                return Err(Error::invalid("the model is not a conversion of the checkpoint"));
            };
            let (cols, values) = (weight.cols(), weight.decode());
            if u32::try_from(values.len()).is_err() {
                return Err(Error::unsupported("matrices of 2^32 weights cannot be flipped"));
            }
            let mut importance = dense.decode();
            for row in importance.chunks_exact_mut(cols) {
                for (w, square) in row.iter_mut().zip(norms) {
                    *w = w.abs() * square.sqrt();
                }
            }
            let skipped = match weight.view() {
                MatrixView::Stbllm(view) if !salient => view.unpack().salient,
                _ => vec![false; cols],
            };
            let may_flip = |i: &u32| values[*i as usize] != 0.0 && !skipped[*i as usize % cols];
            let positions = (0..values.len() as u32).filter(may_flip).collect();
            let (rows, cols) = (weight.rows() as u64, cols as u64);
            matrices.push(FlipMatrix {
                layer: index,
                linear,
                rows,
                cols,
                values,
                positions,
                importance,
            });
        }
    }
    Ok(matrices)
}

impl FlipMatrix {
    /// Sorts the weights into the order in which they are flipped. `stream` selects the random sequence.
    fn arrange(&mut self, order: FlipOrder, stream: u64) {
        // The result must not depend on the previous order.
        self.positions.sort_unstable();
        match order {
            FlipOrder::LeastImportant => {
                let key = |i: &u32| self.importance[*i as usize];
                self.positions.sort_by(|a, b| key(a).total_cmp(&key(b)));
            }
            FlipOrder::Random { seed } => {
                // Fisher-Yates; each matrix has its own random sequence.
                let mut random = Pcg64Mcg::seed_from_u64(seed ^ (stream + 1).wrapping_mul(GOLDEN));
                for i in (1..self.positions.len()).rev() {
                    let j = (random.next_u64() % (i as u64 + 1)) as usize;
                    self.positions.swap(i, j);
                }
            }
        }
    }

    /// Replaces this linear layer in `layers` by one with the first `share` of the weights flipped. Returns the
    /// number of flipped weights.
    fn write_flipped(&self, layers: &mut [Layer], share: f64) -> Result<u64> {
        let count = (self.positions.len() as f64 * share) as usize;
        let mut values = self.values.clone();
        for position in &self.positions[..count] {
            values[*position as usize] *= -1.0;
        }
        *layers[self.layer].linear_mut(self.linear) =
            Weight::from_floats(values, self.rows, self.cols)?;
        Ok(count as u64)
    }
}

/// 2⁶⁴ over the golden ratio: spreads small integers over all bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The mean over seeds of the random orders at each share: share, mean perplexity, half the range.
fn random_mean(found: &[Flipped]) -> Vec<(f64, f64, f64)> {
    let random = |f: &&Flipped| matches!(f.order, Some(FlipOrder::Random { .. }));
    let mut shares: Vec<f64> = found.iter().filter(random).map(|f| f.share).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let mean = |share: f64| {
        let at = found.iter().filter(random).filter(|f| f.share == share).map(|f| f.perplexity);
        let (low, high) = at.clone().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        // The mean of the losses, so that one bad seed does not dominate.
        let loss = at.clone().map(f64::ln).sum::<f64>() / at.count() as f64;
        (share, loss.exp(), (high - low) / 2.0)
    };
    shares.into_iter().map(mean).collect()
}

/// A Markdown table: flipped share, perplexity for random and for least important signs.
#[must_use]
pub fn markdown(title: &str, found: &[Flipped]) -> String {
    let mut out = format!(
        "# {title}\n\n| flipped share % | random: perplexity (mean over seeds) | ± half range | least \
         important first: perplexity | ± se |\n|---|---|---|---|---|\n"
    );
    if let Some(first) = found.iter().find(|f| f.order.is_none()) {
        let (p, e) = (first.perplexity, first.standard_error);
        let _ = writeln!(out, "| 0 | {p:.3} | | {p:.3} | {e:.3} |");
    }
    for (share, mean, range) in random_mean(found) {
        let least = |f: &&Flipped| f.order == Some(FlipOrder::LeastImportant) && f.share == share;
        let least = found.iter().find(least);
        let least = least
            .map_or(" | ".to_owned(), |f| format!("{:.3} | {:.3}", f.perplexity, f.standard_error));
        let _ = writeln!(out, "| {} | {mean:.3} | {range:.3} | {least} |", percent(share));
    }
    out
}

/// All measurements as CSV.
#[must_use]
pub fn csv(found: &[Flipped]) -> String {
    let mut out = String::from("order,seed,share,flipped,perplexity,standard_error\n");
    for f in found {
        let (order, seed) = match f.order {
            None => ("none", String::new()),
            Some(FlipOrder::Random { seed }) => ("random", seed.to_string()),
            Some(FlipOrder::LeastImportant) => ("least-important", String::new()),
        };
        let (p, e) = (f.perplexity, f.standard_error);
        let _ = writeln!(out, "{order},{seed},{},{},{p},{e}", f.share, f.flipped);
    }
    out
}

/// An SVG chart of perplexity against flipped share.
#[must_use]
pub fn plot(title: &str, found: &[Flipped]) -> String {
    let start = found.iter().find(|f| f.order.is_none()).map(|f| Point {
        x: 0.0,
        y: f.perplexity,
        error: 0.0,
        label: String::new(),
    });
    let point = |x: f64, y: f64, error: f64| Point { x: 100.0 * x, y, error, label: String::new() };
    let mut random: Vec<Point> = start.iter().cloned().collect();
    random.extend(random_mean(found).into_iter().map(|(x, y, error)| point(x, y, error)));
    let mut least: Vec<Point> = start.into_iter().collect();
    least.extend(
        found
            .iter()
            .filter(|f| f.order == Some(FlipOrder::LeastImportant))
            .map(|f| point(f.share, f.perplexity, f.standard_error)),
    );
    let chart = Chart {
        title: title.to_owned(),
        x_label:
            "flipped signs, % of the weights of each layer that are neither pruned nor salient"
                .into(),
        y_label: "perplexity".into(),
        log_x: false,
        log_y: true,
        series: vec![
            Series { name: "at random (bar: range over seeds)".into(), points: random, line: true },
            Series {
                name: "least important first (bar: standard error)".into(),
                points: least,
                line: true,
            },
        ],
    };
    svg(&[chart])
}

/// A share as a percentage without superfluous digits.
#[must_use]
pub fn percent(share: f64) -> String {
    let text = format!("{:.4}", share * 100.0);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> FlipMatrix {
        let values: Vec<f32> = (0..64).map(|i| if i % 7 == 0 { 0.0 } else { 1.0 }).collect();
        let positions = (0..64).filter(|i| values[*i as usize] != 0.0).collect();
        let importance = (0..64).map(|i| ((i * 37) % 64) as f32).collect();
        FlipMatrix { layer: 0, linear: Linear::Up, rows: 8, cols: 8, values, positions, importance }
    }

    #[test]
    fn orders_are_permutations_that_do_not_depend_on_the_one_before() {
        let (mut a, mut b) = (matrix(), matrix());
        let all = a.positions.clone();
        a.arrange(FlipOrder::Random { seed: 1 }, 3);
        b.arrange(FlipOrder::Random { seed: 2 }, 3);
        assert_ne!(a.positions, b.positions);
        b.arrange(FlipOrder::Random { seed: 1 }, 3);
        assert_eq!(a.positions, b.positions);
        assert_ne!(a.positions, all);
        a.arrange(FlipOrder::LeastImportant, 3);
        let importance = |i: &u32| a.importance[*i as usize];
        assert!(a.positions.windows(2).all(|p| importance(&p[0]) < importance(&p[1])));
        a.positions.sort_unstable();
        assert_eq!(a.positions, all);
    }

    #[test]
    fn random_curves_are_averaged() {
        let at = |seed, share, perplexity| Flipped {
            order: Some(FlipOrder::Random { seed }),
            share,
            flipped: 1,
            perplexity,
            standard_error: 0.1,
        };
        let found = [at(0, 0.1, 10.0), at(0, 0.2, 20.0), at(1, 0.1, 40.0), at(1, 0.2, 20.0)];
        let mean = random_mean(&found);
        assert_eq!(mean.len(), 2);
        assert!((mean[0].1 - 20.0).abs() < 1e-9 && mean[0].2 == 15.0);
        assert!((mean[1].1 - 20.0).abs() < 1e-9 && mean[1].2 == 0.0);
        assert!(markdown("t", &found).contains("| 10 | 20.000 | 15.000 |"));
        assert_eq!(csv(&found).lines().count(), 5);
        assert!(plot("t", &found).contains("polyline"));
        assert_eq!(percent(0.015), "1.5");
    }
}
