//! Recipes: what is done to which tensor, as TOML.

use serde::{Deserialize, Serialize};
use stb_format::encoding::{IntGroup, Nm, Stbllm};
use stb_runtime::{Error, Result};

use crate::plan::Method;
use crate::quantise::metric::Metric;
use crate::quantise::stbllm::MaskPlacement;
use crate::quantise::{nm, stbllm};

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

/// How much calibration text, and what is done with its statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Calibration {
    /// Sequences.
    pub samples: usize,
    /// Tokens per sequence; never more than the model's context.
    pub length: usize,
    /// Seed of the random windows.
    pub seed: u64,
    /// Share of the mean diagonal that is added to the diagonal of the second moments.
    pub damping: f64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self { samples: 128, length: 256, seed: 0, damping: 0.01 }
    }
}

/// The method for the linear layers and its options. Options of other methods are refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Body {
    /// `stbllm`, `nm`, `int`, `budget` or `source`.
    pub method: String,
    /// stbllm, nm: weights kept of each group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u8>,
    /// nm: weights of a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub m: Option<u8>,
    /// stbllm, nm: columns that share scales; 0 (nm) for one scale per row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<u16>,
    /// nm: bits of a block's scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_bits: Option<u8>,
    /// nm: rounds of re-choosing codes and refitting scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweeps: Option<usize>,
    /// stbllm: the importance metric: si, si-eq3, magnitude, wanda or sparsegpt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// stbllm: where the mask is chosen: compensated, in-loop or before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// stbllm: how N is spread over decoder layers: uniform or outlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<String>,
    /// stbllm: the most salient columns of a block, plus one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salient_limit: Option<usize>,
    /// stbllm: upper over lower region threshold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region_ratio: Option<f32>,
    /// int: bits per code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// int: columns per scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u16>,
    /// budget: true bits per parameter of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_bits: Option<f64>,
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

/// How N is spread over the decoder layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// The same N everywhere.
    Uniform,
    /// More for layers with more outlying weights, the mean exactly N.
    Outlier,
}

macro_rules! presets {
    ($($name:literal)*) => {
        /// Names and texts of the recipes that ship with the program.
        pub const PRESETS: &[(&str, &str)] = &[
            $(($name, include_str!(concat!("../recipes/", $name, ".toml")))),*
        ];
    };
}

presets! {
    "stbllm-4of8" "stbllm-5of8" "stbllm-6of8" "stbllm-si-4of8"
    "nm-1of8" "nm-1of4" "nm-2of8" "nm-2of4"
    "sign" "int2" "int3" "int4" "int8" "source"
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
        if calibration.samples == 0 || calibration.length < 2 {
            return Err(Error::invalid("recipe: calibration needs samples of 2 tokens or more"));
        }
        if !(calibration.damping > 0.0 && calibration.damping < 10.0) {
            return Err(Error::invalid("recipe: damping must be above 0 and below 10"));
        }
        Ok(recipe)
    }

    /// The recipe as TOML.
    ///
    /// # Errors
    /// None in practice: all fields can be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Internal { what: e.to_string() })
    }
}

impl Body {
    /// The quantiser with its options; `None` keeps the source.
    ///
    /// # Errors
    /// [`Error::Invalid`] for unknown words, values out of range and options of other methods.
    pub fn method(&self) -> Result<Option<Method>> {
        let method = match self.method.as_str() {
            "stbllm" => {
                self.allow(&[
                    "n",
                    "block",
                    "metric",
                    "mask",
                    "allocation",
                    "salient-limit",
                    "region-ratio",
                ])?;
                Some(Method::Stbllm(self.stbllm()?))
            }
            "nm" => {
                self.allow(&["n", "m", "block", "scale-bits", "sweeps"])?;
                Some(Method::Nm(self.nm()?))
            }
            "int" => {
                self.allow(&["bits", "group"])?;
                let (bits, group) = (self.bits.unwrap_or(4), self.group.unwrap_or(128));
                let spec = IntGroup::new(bits, group).ok_or_else(|| {
                    Error::invalid("recipe: int takes bits 1, 2, 3, 4 or 8 and group 32, 64 or 128")
                })?;
                Some(Method::Int(spec))
            }
            "source" => {
                self.allow(&[])?;
                None
            }
            "budget" => {
                self.allow(&["target-bits"])?;
                self.target()?;
                None
            }
            other => {
                return Err(Error::invalid(format!(
                    "recipe: there is no method {other:?}; stbllm, nm, int, budget and source exist"
                )));
            }
        };
        Ok(method)
    }

    /// Refuses options that the method does not have: a typing error must not pass silently.
    fn allow(&self, allowed: &[&str]) -> Result<()> {
        let given = [
            ("n", self.n.is_some()),
            ("m", self.m.is_some()),
            ("block", self.block.is_some()),
            ("scale-bits", self.scale_bits.is_some()),
            ("sweeps", self.sweeps.is_some()),
            ("metric", self.metric.is_some()),
            ("mask", self.mask.is_some()),
            ("allocation", self.allocation.is_some()),
            ("salient-limit", self.salient_limit.is_some()),
            ("region-ratio", self.region_ratio.is_some()),
            ("bits", self.bits.is_some()),
            ("group", self.group.is_some()),
            ("target-bits", self.target_bits.is_some()),
        ];
        match given.iter().find(|(name, given)| *given && !allowed.contains(name)) {
            Some((name, _)) => {
                Err(Error::invalid(format!("recipe: method {} has no option {name}", self.method)))
            }
            None => Ok(()),
        }
    }

    fn stbllm(&self) -> Result<stbllm::Options> {
        let (n, block) = (self.n.unwrap_or(4), self.block.unwrap_or(128));
        let spec = Stbllm::new(n, block).ok_or_else(|| {
            Error::invalid("recipe: stbllm takes n from 1 to 8 and block, a multiple of 32")
        })?;
        let ratio = self.region_ratio.unwrap_or(2.0);
        let limit = self.salient_limit.unwrap_or(50);
        if !(ratio > 1.0 && ratio < 100.0) || limit == 0 {
            return Err(Error::invalid(
                "recipe: region-ratio is above 1, salient-limit at least 1",
            ));
        }
        Ok(stbllm::Options {
            spec,
            metric: word("metric", self.metric.as_deref().unwrap_or("si"), METRICS)?,
            mask: word("mask", self.mask.as_deref().unwrap_or("compensated"), PLACEMENTS)?,
            salient_limit: limit,
            region_ratio: ratio,
        })
    }

    fn nm(&self) -> Result<nm::Options> {
        let (n, m) = (self.n.unwrap_or(2), self.m.unwrap_or(8));
        let block = self.block.unwrap_or(128);
        let bits = self.scale_bits.unwrap_or(if block == 0 { 0 } else { 4 });
        let spec = Nm::new(n, m, bits, block, false).ok_or_else(|| {
            Error::invalid(
                "recipe: nm takes n:m of 1:4, 1:8, 2:4 or 2:8, and either block 0 with scale-bits \
                 0 or block, a multiple of 32, with scale-bits 4 or 8",
            )
        })?;
        Ok(nm::Options { spec, sweeps: self.sweeps.unwrap_or(4) })
    }

    /// The size that a `budget` recipe asks for, in true bits per parameter; else `None`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is missing or no size.
    pub fn target(&self) -> Result<Option<f64>> {
        if self.method != "budget" {
            return Ok(None);
        }
        match self.target_bits {
            Some(bits) if bits > 0.0 && bits <= 64.0 => Ok(Some(bits)),
            _ => Err(Error::invalid("recipe: budget takes target-bits above 0 and at most 64")),
        }
    }

    /// A body that chooses encodings for a size.
    #[must_use]
    pub fn budget(bits: f64) -> Self {
        Self { method: "budget".into(), target_bits: Some(bits), ..Self::default() }
    }

    /// How N is spread over layers.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown word.
    pub fn allocation(&self) -> Result<Allocation> {
        let words = &[("uniform", Allocation::Uniform), ("outlier", Allocation::Outlier)];
        word("allocation", self.allocation.as_deref().unwrap_or("uniform"), words)
    }
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

const METRICS: &[(&str, Metric)] = &[
    ("si", Metric::Si),
    ("si-eq3", Metric::SiEq3),
    ("magnitude", Metric::Magnitude),
    ("wanda", Metric::Wanda),
    ("sparsegpt", Metric::Sparsegpt),
];

const PLACEMENTS: &[(&str, MaskPlacement)] = &[
    ("compensated", MaskPlacement::Compensated),
    ("in-loop", MaskPlacement::InLoop),
    ("before", MaskPlacement::Before),
];

/// The value that a word stands for.
fn word<T: Copy>(option: &str, word: &str, words: &[(&str, T)]) -> Result<T> {
    words.iter().find(|(w, _)| *w == word).map(|(_, value)| *value).ok_or_else(|| {
        let all: Vec<_> = words.iter().map(|(w, _)| *w).collect();
        Error::invalid(format!("recipe: {option} is {word:?}; use one of {}", all.join(", ")))
    })
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
        refuse("method = 'int'\nbits = 5", "1, 2, 3, 4 or 8");
        assert!(Recipe::load("nonsense").unwrap_err().to_string().contains("stbllm-4of8"));
        assert_eq!(Recipe::load("nowhere.toml").unwrap_err().exit_code(), 3);
    }
}
