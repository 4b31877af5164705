//! A recipe as it is written: the shape of its TOML, nothing checked but the names of the options.

use serde::{Deserialize, Serialize};

/// A whole recipe, as in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeFile {
    /// Its name.
    pub name: String,
    /// One line about it.
    #[serde(default)]
    pub description: String,
    /// The calibration text, and what is done with its statistics.
    #[serde(default)]
    pub calibration: CalibrationFile,
    /// The linear layers of the decoder.
    pub body: LinearFile,
    /// Token embeddings; also the head if they are tied.
    #[serde(default)]
    pub embeddings: RoundingFile,
    /// The head, if it is a matrix of its own.
    #[serde(default)]
    pub head: RoundingFile,
}

/// Names that options had before: section, old name, new name. The old ones are still read.
pub(crate) const RENAMED: [(&str, &str, &str); 4] = [
    ("calibration", "tuning", "distill-layers"),
    ("calibration", "tuning-rate", "distill-layers-rate"),
    ("calibration", "fine-tuning", "distill"),
    ("calibration", "fine-tuning-rate", "distill-rate"),
];

/// Which calibration text, how much of it, and what is done with its statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CalibrationFile {
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
    /// Share of the mean diagonal of the Hessian that is added to its diagonal.
    pub damping: f64,
    /// The inputs that o, gate, up and down are calibrated with: those behind the linear layers before them as
    /// they were (`layer`, published code) or as they have been quantized (`refreshed`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    /// What a linear layer is to compute from its inputs: what its own weights would (`weights`), or
    /// what the dense model has there, errors of the layers before included (`dense`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// With targets from the dense model: the ridge of the regression that finds them, relative to the diagonal of
    /// the Hessian; a large one gives the layer's own weights back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
    /// Passes over the calibration sequences in which scales and norms of a finished layer are distilled from
    /// the dense model's output of that layer; none if not given.
    #[serde(skip_serializing_if = "Option::is_none", alias = "tuning")]
    pub distill_layers: Option<usize>,
    /// The largest relative step of that.
    #[serde(skip_serializing_if = "Option::is_none", alias = "tuning-rate")]
    pub distill_layers_rate: Option<f64>,
    /// Passes over the calibration sequences in which scales and norms of the whole model are distilled from
    /// the dense model's output distribution; none if not given.
    #[serde(skip_serializing_if = "Option::is_none", alias = "fine-tuning")]
    pub distill: Option<usize>,
    /// The largest relative step of that, for a model that is one nat per token or more away from the
    /// dense one; it falls with the root of that distance.
    #[serde(skip_serializing_if = "Option::is_none", alias = "fine-tuning-rate")]
    pub distill_rate: Option<f64>,
}

impl Default for CalibrationFile {
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
            distill_layers: None,
            distill_layers_rate: None,
            distill: None,
            distill_rate: None,
        }
    }
}

/// How embeddings or head are rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RoundingFile {
    /// 1, 2, 3, 4 or 8; 0 keeps the numbers of the source.
    pub bits: u8,
    /// Columns per scale.
    pub group: u16,
}

impl Default for RoundingFile {
    fn default() -> Self {
        Self { bits: 4, group: 32 }
    }
}

macro_rules! linear_file {
    ($($(#[$text:meta])* $field:ident $name:literal: $kind:ty,)*) => {
        /// The method for the linear layers and its options. Options of other methods are refused.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        pub struct LinearFile {
            /// `stbllm`, `nm`, `int`, `pb-llm`, `budget` or `source`.
            pub method: String,
            $(
                $(#[$text])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $field: Option<$kind>,
            )*
        }

        impl LinearFile {
            /// The names of the options that are given.
            pub(super) fn given(&self) -> Vec<&'static str> {
                let all = [$(($name, self.$field.is_some())),*];
                all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
            }
        }
    };
}

linear_file! {
    /// stbllm, nm: weights kept of each group.
    n "n": u8,
    /// nm: weights of a group.
    m "m": u8,
    /// stbllm, nm, pb-llm: columns that share scales; 0 (nm) for one scale per row.
    block "block": u16,
    /// nm: bits of a block's scale.
    scale_bits "scale-bits": u8,
    /// nm: rounds of re-choosing codes and refitting scales; stbllm: the same with signs and
    /// regions, no refit at all if not given.
    sweeps "sweeps": usize,
    /// nm: whether scales are fitted to the layer's output.
    refit "refit": bool,
    /// stbllm: the importance metric: si (published code), si-eq3 (the paper's equation 3),
    /// magnitude, wanda or sparsegpt.
    metric "metric": String,
    /// stbllm: where the mask is chosen: compensated, in-loop or before.
    mask "mask": String,
    /// stbllm: whether a mask that is not chosen in the loop comes from the step of its own layer
    /// (`layer`) or from a pass over the whole model before any layer is binarized (`model`).
    pass "pass": String,
    /// stbllm: over what an in-loop metric takes its sums: matrix or block.
    scope "scope": String,
    /// stbllm: what pruned weights are: zero, or forgotten as in the published code.
    pruned "pruned": String,
    /// stbllm: prune-first or quantize-first.
    order "order": String,
    /// stbllm: how N is spread over decoder layers: uniform, outlier, paper, published-code or sine.
    allocation "allocation": String,
    /// stbllm, pb-llm: what makes columns (pb-llm: weights) salient: hessian, magnitude or (stbllm)
    /// off.
    salient "salient": String,
    /// stbllm: the most salient columns of a block, plus one.
    salient_limit "salient-limit": usize,
    /// stbllm: regions: trisection, bell (BiLLM), exhaustive or none.
    partition "partition": String,
    /// stbllm: upper over lower threshold of a trisection.
    region_ratio "region-ratio": f32,
    /// stbllm: the error that searches compare: weighted (of weights, by 1/d²), weights or saliency.
    search "search": String,
    /// stbllm: thresholds are quantiles of the members of the regions, or of the whole block.
    quantiles "quantiles": String,
    /// stbllm: whether binarizing subtracts means.
    means "means": bool,
    /// stbllm: whether it does while searches compare candidates; else as for the result.
    search_means "search-means": bool,
    /// stbllm: how errors are passed on to later blocks: solve, diagonal or off.
    propagation "propagation": String,
    /// int, pb-llm: bits per code.
    bits "bits": u8,
    /// int: columns per scale.
    group "group": u16,
    /// int: compensated (GPTQ) or nearest (RTN).
    rounding "rounding": String,
    /// int: whether codes lie around zero, with the scale of least error, or between minimum and
    /// maximum of the group.
    symmetric "symmetric": bool,
    /// pb-llm: share of the weights that are salient.
    share "share": f64,
    /// budget: true bits per parameter of the whole file.
    target_bits "target-bits": f64,
}

impl LinearFile {
    /// Encodings are chosen for a size: `bits` true bits per parameter of the whole file.
    #[must_use]
    pub fn budget(bits: f64) -> Self {
        Self { method: "budget".into(), target_bits: Some(bits), ..Self::default() }
    }
}

impl RecipeFile {
    /// Makes this a recipe that chooses encodings for a size: `bits` true bits per parameter of the whole file.
    pub fn set_budget(&mut self, bits: f64) {
        self.name = format!("bits-{bits}");
        self.description = "Encodings chosen for a size".into();
        self.body = LinearFile::budget(bits);
    }
}
