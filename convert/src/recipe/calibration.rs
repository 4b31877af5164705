//! The calibration options of a recipe, checked.

use super::file::CalibrationFile;
use super::problem::{Problem, Resolved, keyword};
use crate::distill::DistillOptions;

/// The calibration text, its windows, and the use of their statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// A text file, UTF-8, a `.jsonl` file, or `self` for a text that the model writes; `None` for the built-in text.
    pub text: Option<String>,
    /// The separator of documents, which are trimmed and get a begin token each. `None` if the text is one document.
    pub separator: Option<String>,
    /// How windows are drawn.
    pub draw: Draw,
    /// Number of sequences.
    pub samples: usize,
    /// Tokens per sequence; never more than the model's context.
    pub length: usize,
    /// Seed of the random windows.
    pub seed: u64,
    /// Share of the mean diagonal of the Hessian that is added to its diagonal.
    pub damping: f64,
    /// Whether the statistics of each linear layer are taken after all linear layers before it are quantized.
    pub refreshed: bool,
    /// The ridge of targets from the dense model; `None` if the target is the output of the layer's own weights.
    pub ridge: Option<f64>,
    /// Distillation of each finished layer from the dense layer.
    pub distill_layers: Option<DistillOptions>,
    /// Distillation of the whole model from the dense model.
    pub distill: Option<DistillOptions>,
}

impl Default for Calibration {
    fn default() -> Self {
        let CalibrationFile { samples, length, seed, damping, .. } = CalibrationFile::default();
        Self {
            text: None,
            separator: None,
            draw: Draw::Pcg,
            samples,
            length,
            seed,
            damping,
            refreshed: false,
            ridge: None,
            distill_layers: None,
            distill: None,
        }
    }
}

/// How calibration windows are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// A PCG generator.
    Pcg,
    /// Python's `random.randint` after `random.seed`: a Mersenne Twister.
    Python,
}

impl Calibration {
    /// Whether the residual streams of the dense model are computed, too.
    #[must_use]
    pub fn follows_dense(&self) -> bool {
        self.ridge.is_some() || self.distill_layers.is_some()
    }

    /// Whether anything is distilled.
    #[must_use]
    pub fn distills(&self) -> bool {
        self.distill_layers.is_some() || self.distill.is_some()
    }
}

/// The default ridge of targets from the dense model; `tests/bench/record/2026-11-30-real-model.md` compares others.
const RIDGE: f64 = 1.0;
/// The default learning rate of layer distillation.
const LAYERS_RATE: f64 = 0.01;
/// The default learning rate of model distillation; `tests/bench/record/2026-11-26-fine-tuning.md` compares others.
const MODEL_RATE: f64 = 0.03;

/// The problem of an option of this section.
fn problem(option: &'static str, what: impl Into<String>) -> Problem {
    Problem::new("calibration", option, what)
}

impl CalibrationFile {
    /// Checks the options. Fails for unknown words, values out of range and conflicting options.
    pub(super) fn resolve(&self) -> Resolved<Calibration> {
        let section = "calibration";
        let draws = &[("pcg", Draw::Pcg), ("python", Draw::Python)];
        let draw = keyword(section, "draw", &self.draw, draws)?;
        let refreshed =
            keyword(section, "inputs", &self.inputs, &[("layer", false), ("refreshed", true)])?;
        let names = ["distill-layers", "distill-layers-rate"];
        let distill_layers =
            distill(names, self.distill_layers, self.distill_layers_rate, LAYERS_RATE)?;
        let names = ["distill", "distill-rate"];
        let distill = distill(names, self.distill, self.distill_rate, MODEL_RATE)?;
        let ridge = self.resolve_ridge(refreshed)?;
        if self.samples == 0 || self.length < 2 {
            let option = if self.samples == 0 { "samples" } else { "length" };
            return Err(problem(option, "calibration needs samples of 2 tokens or more"));
        }
        if !(self.damping > 0.0 && self.damping < 10.0) {
            return Err(problem("damping", "damping must be above 0 and below 10"));
        }
        Ok(Calibration {
            text: self.text.clone(),
            separator: self.separator.clone(),
            draw,
            samples: self.samples,
            length: self.length,
            seed: self.seed,
            damping: self.damping,
            refreshed,
            ridge,
            distill_layers,
            distill,
        })
    }

    /// The ridge; `None` if targets are not from the dense model.
    fn resolve_ridge(&self, refreshed: bool) -> Resolved<Option<f64>> {
        let targets = &[("weights", false), ("dense", true)];
        let dense = keyword("calibration", "target", &self.target, targets)?;
        if dense && !refreshed {
            return Err(problem("target", "target = \"dense\" needs inputs = \"refreshed\""));
        }
        match self.ridge {
            Some(_) if !dense => Err(problem("ridge", "ridge needs target = \"dense\"")),
            Some(r) if !(0.0..=1000.0).contains(&r) => {
                Err(problem("ridge", "ridge must be from 0 to 1000"))
            }
            ridge => Ok(dense.then(|| ridge.unwrap_or(RIDGE))),
        }
    }
}

/// The options of a distillation; `None` without epochs. `names` are the options for epochs and learning rate, `default`
/// is the default rate.
fn distill(
    names: [&'static str; 2],
    epochs: Option<usize>,
    rate: Option<f64>,
    default: f64,
) -> Resolved<Option<DistillOptions>> {
    let [epochs_name, rate_name] = names;
    let options = DistillOptions { epochs: epochs.unwrap_or(0), rate: rate.unwrap_or(default) };
    if rate.is_some() && options.epochs == 0 {
        return Err(problem(rate_name, format!("{rate_name} needs {epochs_name}")));
    }
    if options.epochs > 1000 {
        return Err(problem(epochs_name, format!("{epochs_name} is at most 1000")));
    }
    if !(options.rate > 0.0 && options.rate <= 0.5) {
        return Err(problem(rate_name, format!("{rate_name} is above 0 and at most 0.5")));
    }
    Ok((options.epochs > 0).then_some(options))
}
