//! The TOML of a recipe. Only the names and types of options are checked here.

use serde::{Deserialize, Serialize};

/// A whole recipe, as in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeFile {
    /// The name.
    pub name: String,
    /// One line of description.
    #[serde(default)]
    pub description: String,
    /// The calibration.
    #[serde(default)]
    pub calibration: CalibrationFile,
    /// The linear layers of the decoder.
    pub body: LinearFile,
    /// The token embeddings; also the lm_head if they are tied.
    #[serde(default)]
    pub embeddings: RoundingFile,
    /// The lm_head, if it is not tied.
    #[serde(default)]
    pub head: RoundingFile,
}

/// Renamed options: section, old name, new name. Old names are still read.
pub(crate) const RENAMED: [(&str, &str, &str); 4] = [
    ("calibration", "tuning", "distill-layers"),
    ("calibration", "tuning-rate", "distill-layers-rate"),
    ("calibration", "fine-tuning", "distill"),
    ("calibration", "fine-tuning-rate", "distill-rate"),
];

/// The calibration text, its windows, and the use of their statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CalibrationFile {
    /// A text file, UTF-8, a `.jsonl` file, or `self` for a text that the model writes; default: the built-in text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The separator of documents, which are trimmed and get a begin token each; default: one document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// How windows are drawn: `pcg`, or `python` for Python's `random.seed` and `random.randint`, which GPTQ and its
    /// descendants use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draw: Option<String>,
    /// Number of sequences.
    pub samples: usize,
    /// Tokens per sequence; never more than the model's context.
    pub length: usize,
    /// Seed of the random windows.
    pub seed: u64,
    /// Share of the mean diagonal of the Hessian that is added to its diagonal.
    pub damping: f64,
    /// The inputs that o, gate, up and down are calibrated with: computed with the earlier linear layers of the same
    /// decoder layer before (`layer`, published code) or after (`refreshed`) these are quantized.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    /// The target of a linear layer: the output of its own weights (`weights`), or the output in the dense model, which
    /// also corrects errors of earlier layers (`dense`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// With targets from the dense model: the ridge of the regression, relative to the diagonal of the Hessian. A large
    /// ridge keeps the layer's own weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
    /// Passes over the calibration sequences that train scales and norms of a finished layer on the dense model's output
    /// of that layer; default: none.
    #[serde(skip_serializing_if = "Option::is_none", alias = "tuning")]
    pub distill_layers: Option<usize>,
    /// The learning rate of that distillation: the largest relative step.
    #[serde(skip_serializing_if = "Option::is_none", alias = "tuning-rate")]
    pub distill_layers_rate: Option<f64>,
    /// Training sequences per calibration sequence, fresh ones for as long as the text has them, that train scales and
    /// norms of the whole model on the dense model's output distribution; default: none.
    #[serde(skip_serializing_if = "Option::is_none", alias = "fine-tuning")]
    pub distill: Option<usize>,
    /// The learning rate of that distillation for a model of at most four decoder layers with a KL divergence of at least
    /// one nat per token. It is multiplied by the root of a smaller divergence, and by 4 / layers of a deeper model.
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

/// How the embeddings or the lm_head are rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RoundingFile {
    /// 1, 2, 3, 4 or 8; 0 keeps the data type of the checkpoint.
    pub bits: u8,
    /// Columns per scale, at most; see [`fit_group`](crate::quantize::int_group::fit_group).
    pub group: u16,
    /// `nearest`, or `compensated`: against a Hessian that weighs errors by use, then 4 rounds of refits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<String>,
}

impl Default for RoundingFile {
    fn default() -> Self {
        Self { bits: 4, group: 32, rounding: None }
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
            /// The names of the options in the file.
            pub(super) fn given_options(&self) -> Vec<&'static str> {
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
    /// stbllm, nm, trellis, pb-llm: columns that share scales; 0 (nm, trellis) for one scale per row.
    block "block": u16,
    /// trellis: whether each column has a factor.
    col_factors "col-factors": bool,
    /// nm: bits of a block's scale.
    scale_bits "scale-bits": u8,
    /// nm, int, trellis: rounds of re-choosing codes and refitting scales; stbllm: the same with signs and regions, without it
    /// no refit.
    sweeps "sweeps": usize,
    /// nm: whether scales are fitted to the layer's output.
    refit "refit": bool,
    /// stbllm: the importance metric: si (published code), si-eq3 (the paper's equation 3),
    /// magnitude, wanda or sparsegpt.
    metric "metric": String,
    /// stbllm: where the mask is chosen: compensated, in-loop or before.
    mask "mask": String,
    /// stbllm: whether a mask that is not chosen in the loop comes from a pass over its own layer (`layer`) or over the
    /// whole model before any layer is binarized (`model`).
    pass "pass": String,
    /// stbllm: the weights over which an in-loop metric takes its sums: matrix or block.
    scope "scope": String,
    /// stbllm: pruned weights stay zero, or are forgotten as in the published code: zero or forgotten.
    pruned "pruned": String,
    /// stbllm: prune-first or quantize-first.
    order "order": String,
    /// stbllm: how N is allocated to decoder layers: uniform, outlier, paper, published-code or sine.
    allocation "allocation": String,
    /// stbllm, pb-llm: what makes columns (pb-llm: weights) salient: hessian, magnitude or (stbllm)
    /// off.
    salient "salient": String,
    /// stbllm: the largest number of salient columns of a block, plus one.
    salient_limit "salient-limit": usize,
    /// stbllm: regions: trisection, bell (BiLLM), exhaustive or none.
    partition "partition": String,
    /// stbllm: upper over lower threshold of a trisection.
    region_ratio "region-ratio": f32,
    /// stbllm: the error that searches compare: weighted (of weights, by 1/d²), weights or saliency.
    search "search": String,
    /// stbllm: the values whose quantiles are candidate thresholds: members (of the regions) or block.
    quantiles "quantiles": String,
    /// stbllm: whether binarization subtracts means.
    means "means": bool,
    /// stbllm: whether binarization subtracts means while searches compare candidates; default: as `means`.
    search_means "search-means": bool,
    /// stbllm: how errors are spread over later blocks: solve, diagonal or off.
    propagation "propagation": String,
    /// int, pb-llm: bits per code.
    bits "bits": u8,
    /// int: columns per scale, at most; see [`fit_group`](crate::quantize::int_group::fit_group).
    group "group": u16,
    /// int: compensated (GPTQ) or nearest (RTN).
    rounding "rounding": String,
    /// int: whether codes are around zero, with the scale of least error, or span minimum and maximum of the group.
    symmetric "symmetric": bool,
    /// trellis: bits per weight.
    rate "rate": f64,
    /// pb-llm: share of the weights that are salient.
    share "share": f64,
    /// budget: true bits per parameter of the whole file.
    target_bits "target-bits": f64,
    /// budget: the KL divergence from the dense model that the smallest file may have, in nats per token.
    max_kl "max-kl": f64,
}

impl LinearFile {
    /// Encodings chosen for a size: `bits` true bits per parameter of the whole file.
    #[must_use]
    pub fn budget(bits: f64) -> Self {
        Self { method: "budget".into(), target_bits: Some(bits), ..Self::default() }
    }

    /// Encodings chosen for the smallest file whose KL divergence from the dense model is at most `kl` nats per token.
    #[must_use]
    pub fn divergence(kl: f64) -> Self {
        Self { method: "budget".into(), max_kl: Some(kl), ..Self::default() }
    }
}

impl RecipeFile {
    /// Makes this a recipe that chooses encodings for a size: `bits` true bits per parameter of the whole file.
    pub fn set_budget(&mut self, bits: f64) {
        self.name = format!("bits-{bits}");
        self.description = "Encodings chosen for a size".into();
        self.body = LinearFile::budget(bits);
    }

    /// Makes this a recipe for the smallest file whose KL divergence from the dense model is at most `kl` nats per
    /// token.
    pub fn set_max_kl(&mut self, kl: f64) {
        self.name = format!("max-kl-{kl}");
        self.description = "The smallest file within a KL divergence".into();
        self.body = LinearFile::divergence(kl);
    }
}
