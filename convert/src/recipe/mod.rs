//! Recipes: what is done to which tensor, as TOML.

mod body;

use serde::{Deserialize, Serialize};
use stb_format::encoding::IntGroup;
use stb_runtime::{Error, Result};

use crate::tune;

pub use body::Body;

/// A whole recipe, as in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// One line about it.
    #[serde(default)]
    pub description: String,
    /// The calibration text.
    #[serde(default)]
    pub calibration: Calibration,
    /// The linear layers of the decoder.
    pub body: Body,
    /// Token embeddings; also the head if they are tied.
    #[serde(default)]
    pub embeddings: Table,
    /// The head, if it is a matrix of its own.
    #[serde(default)]
    pub head: Table,
}

/// Which calibration text, how much of it, and what is done with its statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Calibration {
    /// A text file, UTF-8; the text in the program if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What separates its documents; each is trimmed and begins with the begin token. Without it
    /// the text is one document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// How windows are drawn: `pcg`, or `python` for those of `random.seed` and `random.randint`,
    /// which GPTQ and its descendants use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draw: Option<String>,
    /// Sequences.
    pub samples: usize,
    /// Tokens per sequence; never more than the model's context.
    pub length: usize,
    /// Seed of the random windows.
    pub seed: u64,
    /// Share of the mean diagonal that is added to the diagonal of the second moments.
    pub damping: f64,
    /// What o, gate, up and down are calibrated with: inputs behind the linear layers before them as
    /// they were (`layer`, published code) or as they have been quantized (`refreshed`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    /// What a linear layer is to compute from its inputs: what its own weights would (`weights`), or
    /// what the dense model has there, errors of the layers before included (`dense`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// With targets from the dense model: how much the regression that finds them is held back, relative
    /// to the second moment of each input; a large one gives the layer's own weights back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
    /// Passes over the calibration sequences in which scales and norms of a finished layer are tuned to
    /// the dense model's output of that layer; none if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning: Option<usize>,
    /// The largest relative step of tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning_rate: Option<f64>,
    /// Passes over the calibration sequences in which scales and norms of the whole model are tuned to
    /// what the dense model says; none if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fine_tuning: Option<usize>,
    /// The largest relative step of fine-tuning of a model that is one nat per token or more away from the
    /// dense one; it falls with the root of that distance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fine_tuning_rate: Option<f64>,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            text: None,
            separator: None,
            draw: None,
            samples: 128,
            length: 256,
            seed: 0,
            damping: 0.01,
            inputs: None,
            target: None,
            ridge: None,
            tuning: None,
            tuning_rate: None,
            fine_tuning: None,
            fine_tuning_rate: None,
        }
    }
}

/// How embeddings or head are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Table {
    /// 1, 2, 3, 4 or 8; 0 keeps the numbers of the source.
    pub bits: u8,
    /// Columns per scale.
    pub group: u16,
}

impl Default for Table {
    fn default() -> Self {
        Self { bits: 4, group: 32 }
    }
}

macro_rules! presets {
    ($($name:literal)*) => {
        /// Names and texts of the recipes that ship with the program.
        pub const PRESETS: &[(&str, &str)] = &[
            $(($name, include_str!(concat!("../../recipes/", $name, ".toml")))),*
        ];
    };
}

presets! {
    "stbllm-4of8" "stbllm-5of8" "stbllm-6of8" "stbllm-si-4of8"
    "nm-1of8" "nm-1of4" "nm-2of8" "nm-2of4"
    "sign" "int2" "int3" "int4" "int8" "source"
    "stbllm-paper-4of8" "stbllm-published-strict" "stbllm-published-code"
    "billm" "billm-6of8" "billm-5of8" "billm-4of8" "pb-llm"
    "gptq-8bit" "gptq-4bit" "gptq-3bit" "gptq-2bit"
    "rtn-8bit" "rtn-4bit" "rtn-3bit" "rtn-2bit"
}

/// The recipe used when none is asked for.
pub const DEFAULT: &str = "stbllm-4of8";

impl Recipe {
    /// A shipped recipe by name, or one from a `.toml` file.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name, [`Error::Io`] and [`Error::Invalid`] for files.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
            return Self::parse(text);
        }
        if !name.ends_with(".toml") {
            let names: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
            return Err(Error::usage(format!(
                "there is no recipe {name:?}; use one of {} or a .toml file",
                names.join(", ")
            )));
        }
        let path = std::path::Path::new(name);
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text)
    }

    /// Reads TOML and checks every value.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the place in the text or the offending value.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self =
            toml::from_str(text).map_err(|e| Error::invalid(format!("recipe: {e}")))?;
        recipe.body.method()?;
        recipe.body.allocation()?;
        recipe.embeddings.encoding()?;
        recipe.head.encoding()?;
        let calibration = &recipe.calibration;
        calibration.draw()?;
        calibration.refreshed()?;
        recipe.check_tuning()?;
        if calibration.ridge()?.is_some() {
            recipe.body.allows_dense_targets()?;
        }
        if calibration.samples == 0 || calibration.length < 2 {
            return Err(Error::invalid("recipe: calibration needs samples of 2 tokens or more"));
        }
        if !(calibration.damping > 0.0 && calibration.damping < 10.0) {
            return Err(Error::invalid("recipe: damping must be above 0 and below 10"));
        }
        Ok(recipe)
    }

    /// Whether tuning, if asked for, has something to tune.
    ///
    /// # Errors
    /// [`Error::Invalid`] if nothing is quantized, and as for [`Calibration::tuning`].
    pub fn check_tuning(&self) -> Result<()> {
        let quantizes = self.body.method()?.is_some() || self.body.target()?.is_some();
        let calibration = &self.calibration;
        let tunes = calibration.tuning()?.or(calibration.fine_tuning()?).is_some();
        if tunes && !quantizes {
            return Err(Error::invalid(format!(
                "recipe {}: tuning needs layers that are quantized, and method = {:?} has none",
                self.name, self.body.method
            )));
        }
        Ok(())
    }

    /// The recipe as TOML.
    ///
    /// # Errors
    /// None in practice: all fields can be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Internal { what: e.to_string() })
    }
}

/// The ridge of targets from the dense model, if the recipe does not say.
const RIDGE: f64 = 0.1;
/// The largest relative step of tuning, if the recipe does not say.
const TUNING_RATE: f64 = 0.01;
/// That of fine-tuning. `tests/bench/record/2026-11-26-fine-tuning.md` has what others gave.
const FINE_TUNING_RATE: f64 = 0.03;

/// How calibration windows are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// A PCG generator.
    Pcg,
    /// Python's `random.randint` after `random.seed`: a Mersenne Twister.
    Python,
}

impl Calibration {
    /// How windows are drawn.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown word.
    pub fn draw(&self) -> Result<Draw> {
        body::word("draw", &self.draw, &[("pcg", Draw::Pcg), ("python", Draw::Python)])
    }

    /// Whether statistics are taken anew behind every quantized linear layer.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown word.
    pub fn refreshed(&self) -> Result<bool> {
        body::word("inputs", &self.inputs, &[("layer", false), ("refreshed", true)])
    }

    /// How layers are tuned as a whole; `None` if they are not.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers out of range.
    pub fn tuning(&self) -> Result<Option<tune::Options>> {
        tuning("tuning", self.tuning, self.tuning_rate, TUNING_RATE)
    }

    /// How the whole model is tuned; `None` if it is not.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers out of range.
    pub fn fine_tuning(&self) -> Result<Option<tune::Options>> {
        tuning("fine-tuning", self.fine_tuning, self.fine_tuning_rate, FINE_TUNING_RATE)
    }

    /// Whether the dense model runs along.
    ///
    /// # Errors
    /// As for [`Calibration::ridge`] and [`Calibration::tuning`].
    pub fn follows_dense(&self) -> Result<bool> {
        Ok(self.ridge()?.is_some() || self.tuning()?.is_some())
    }

    /// The ridge of targets from the dense model; `None` if they are not from there.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown word, a number out of range, or options that do not go together.
    pub fn ridge(&self) -> Result<Option<f64>> {
        let dense = body::word("target", &self.target, &[("weights", false), ("dense", true)])?;
        if dense && !self.refreshed()? {
            return Err(Error::invalid("recipe: target = \"dense\" needs inputs = \"refreshed\""));
        }
        match self.ridge {
            Some(_) if !dense => Err(Error::invalid("recipe: ridge needs target = \"dense\"")),
            Some(r) if !(0.0..=1000.0).contains(&r) => {
                Err(Error::invalid("recipe: ridge must be from 0 to 1000"))
            }
            ridge => Ok(dense.then(|| ridge.unwrap_or(RIDGE))),
        }
    }
}

fn tuning(
    what: &str,
    epochs: Option<usize>,
    rate: Option<f64>,
    usual: f64,
) -> Result<Option<tune::Options>> {
    let options = tune::Options { epochs: epochs.unwrap_or(0), rate: rate.unwrap_or(usual) };
    if rate.is_some() && options.epochs == 0 {
        return Err(Error::invalid(format!("recipe: {what}-rate needs {what}")));
    }
    if options.epochs > 1000 || !(options.rate > 0.0 && options.rate <= 0.5) {
        return Err(Error::invalid(format!(
            "recipe: {what} is at most 1000, {what}-rate above 0 and at most 0.5"
        )));
    }
    Ok((options.epochs > 0).then_some(options))
}

impl Table {
    /// The encoding; `None` keeps the source.
    ///
    /// # Errors
    /// [`Error::Invalid`] for values out of range.
    pub fn encoding(&self) -> Result<Option<IntGroup>> {
        if self.bits == 0 {
            return Ok(None);
        }
        IntGroup::new(self.bits, self.group).map(Some).ok_or_else(|| {
            Error::invalid(
                "recipe: embeddings and head take bits 0, 1, 2, 3, 4 or 8 and group 32, 64 or 128",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_survives_writing() {
        for (name, text) in PRESETS {
            let recipe = Recipe::parse(text).unwrap();
            assert_eq!(recipe.name, *name);
            assert!(!recipe.description.is_empty(), "{name}");
            assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe, "{name}");
        }
        assert!(PRESETS.iter().any(|(name, _)| *name == DEFAULT));
    }

    #[test]
    fn mistakes_are_named() {
        let refuse = |body: &str, word: &str| {
            let error = Recipe::parse(&format!("name = 'x'\n[body]\n{body}")).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        };
        refuse("method = 'magic'", "magic");
        refuse("method = 'nm'\nn = 3", "1:4");
        refuse("method = 'nm'\nmetric = 'si'", "metric");
        refuse("method = 'stbllm'\nmetric = 'best'", "wanda");
        refuse("method = 'stbllm'\nn = 9", "1 to 8");
        refuse("method = 'stbllm'\nnn = 4", "nn");
        refuse("method = 'int'\nbits = 9", "bits 1 to 8");
        refuse("method = 'int'\nbits = 8\nsymmetric = false", "1 to 7");
        refuse("method = 'int'\nbits = 2\nsymmetric = false\nsweeps = 1", "sweeps");
        refuse("method = 'stbllm'\nmask = 'before'\norder = 'quantize-first'", "in-loop");
        refuse("method = 'stbllm'\nmask = 'in-loop'\npass = 'model'", "compensated");
        refuse("method = 'stbllm'\npartition = 'bell'\nregion-ratio = 3.0", "region-ratio");
        refuse("method = 'pb-llm'\nshare = 1.5", "share");
        let refuse_calibration = |lines: &str, word: &str| {
            let text = format!("name = 'x'\n[calibration]\n{lines}\n[body]\nmethod = 'nm'");
            let error = Recipe::parse(&text).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        };
        refuse_calibration("inputs = 'fresh'", "refreshed");
        refuse_calibration("target = 'dense'", "inputs");
        refuse_calibration("ridge = 0.5", "target");
        refuse_calibration("inputs = 'refreshed'\ntarget = 'dense'\nridge = -1.0", "ridge");
        refuse_calibration("tuning = 2000", "1000");
        refuse_calibration("tuning-rate = 0.1", "needs tuning");
        refuse_calibration("fine-tuning-rate = 0.1", "needs fine-tuning");
        refuse_calibration("fine-tuning = 1001", "fine-tuning is at most 1000");
        let idle = "name = 'x'\n[calibration]\ntuning = 2\n[body]\nmethod = 'source'";
        assert!(Recipe::parse(idle).unwrap_err().to_string().contains("source"));
        assert!(Recipe::load("nonsense").unwrap_err().to_string().contains("stbllm-4of8"));
        assert_eq!(Recipe::load("nowhere.toml").unwrap_err().exit_code(), 3);
    }
}
