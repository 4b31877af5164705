//! The calibration of a recipe: which text, how much of it, and what is done with its statistics.

use super::file::CalibrationFile;
use super::problem::{Problem, Resolved, word};
use crate::distill::DistillOptions;

/// Which calibration text, how much of it, and what is done with its statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// A text file, UTF-8; `None` for the text in the program.
    pub text: Option<String>,
    /// What separates its documents; each is trimmed and begins with the begin token. `None`: the text is one
    /// document.
    pub separator: Option<String>,
    /// How windows are drawn.
    pub draw: Draw,
    /// Sequences.
    pub samples: usize,
    /// Tokens per sequence; never more than the model's context.
    pub length: usize,
    /// Seed of the random windows.
    pub seed: u64,
    /// Share of the mean diagonal of the Hessian that is added to its diagonal.
    pub damping: f64,
    /// Whether statistics are taken anew behind every quantized linear layer.
    pub refreshed: bool,
    /// The ridge of targets from the dense model; `None` if the targets are what the layer's own weights compute.
    pub ridge: Option<f64>,
    /// How the scales and norms of each finished layer are distilled from the dense layer; `None` if they are not.
    pub distill_layers: Option<DistillOptions>,
    /// How the scales and norms of the whole model are distilled from the dense model; `None` if they are not.
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
    /// Whether the dense model runs along.
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

/// The ridge of targets from the dense model, if the recipe does not say.
const RIDGE: f64 = 0.1;
/// The largest relative step when layers are distilled, if the recipe does not say.
const LAYERS_RATE: f64 = 0.01;
/// The largest relative step when the model is distilled, if the recipe does not say.
/// `tests/bench/record/2026-11-26-fine-tuning.md` has what others gave.
const MODEL_RATE: f64 = 0.03;

/// An option that may not be what it is.
fn bad(option: &'static str, what: impl Into<String>) -> Problem {
    Problem::new("calibration", option, what)
}

impl CalibrationFile {
    /// The values; unknown words, values out of range and options that do not go together are refused.
    pub(super) fn resolve(&self) -> Resolved<Calibration> {
        let section = "calibration";
        let draws = &[("pcg", Draw::Pcg), ("python", Draw::Python)];
        let draw = word(section, "draw", &self.draw, draws)?;
        let refreshed =
            word(section, "inputs", &self.inputs, &[("layer", false), ("refreshed", true)])?;
        let names = ["distill-layers", "distill-layers-rate"];
        let distill_layers =
            distill(names, self.distill_layers, self.distill_layers_rate, LAYERS_RATE)?;
        let names = ["distill", "distill-rate"];
        let distill = distill(names, self.distill, self.distill_rate, MODEL_RATE)?;
        let ridge = self.resolve_ridge(refreshed)?;
        if self.samples == 0 || self.length < 2 {
            let option = if self.samples == 0 { "samples" } else { "length" };
            return Err(bad(option, "calibration needs samples of 2 tokens or more"));
        }
        if !(self.damping > 0.0 && self.damping < 10.0) {
            return Err(bad("damping", "damping must be above 0 and below 10"));
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

    fn resolve_ridge(&self, refreshed: bool) -> Resolved<Option<f64>> {
        let targets = &[("weights", false), ("dense", true)];
        let dense = word("calibration", "target", &self.target, targets)?;
        if dense && !refreshed {
            return Err(bad("target", "target = \"dense\" needs inputs = \"refreshed\""));
        }
        match self.ridge {
            Some(_) if !dense => Err(bad("ridge", "ridge needs target = \"dense\"")),
            Some(r) if !(0.0..=1000.0).contains(&r) => {
                Err(bad("ridge", "ridge must be from 0 to 1000"))
            }
            ridge => Ok(dense.then(|| ridge.unwrap_or(RIDGE))),
        }
    }
}

/// How often and how far parameters move; `names` are the options of the two, `usual` the step if not given.
fn distill(
    names: [&'static str; 2],
    epochs: Option<usize>,
    rate: Option<f64>,
    usual: f64,
) -> Resolved<Option<DistillOptions>> {
    let [what, what_rate] = names;
    let options = DistillOptions { epochs: epochs.unwrap_or(0), rate: rate.unwrap_or(usual) };
    if rate.is_some() && options.epochs == 0 {
        return Err(bad(what_rate, format!("{what_rate} needs {what}")));
    }
    if options.epochs > 1000 {
        return Err(bad(what, format!("{what} is at most 1000")));
    }
    if !(options.rate > 0.0 && options.rate <= 0.5) {
        return Err(bad(what_rate, format!("{what_rate} is above 0 and at most 0.5")));
    }
    Ok((options.epochs > 0).then_some(options))
}
