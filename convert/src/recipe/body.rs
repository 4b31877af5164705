//! The part of a recipe about the linear layers of the decoder.

use serde::{Deserialize, Serialize};
use stb_format::encoding::{Nm, Stbllm};
use stb_runtime::{Error, Result};

use crate::allocation::Allocation;
use crate::plan::Method;
use crate::quantize::metric::Metric;
use crate::quantize::search::{Partition, Quantiles, Salient, SearchError, SearchOptions};
use crate::quantize::stbllm::{MaskPlacement, Order, Scope};
use crate::quantize::{Propagation, int_group, nm, pb_llm, stbllm};

macro_rules! body {
    ($($(#[$text:meta])* $field:ident $name:literal: $kind:ty,)*) => {
        /// The method for the linear layers and its options. Options of other methods are refused.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        pub struct Body {
            /// `stbllm`, `nm`, `int`, `pb-llm`, `budget` or `source`.
            pub method: String,
            $(
                $(#[$text])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $field: Option<$kind>,
            )*
        }

        impl Body {
            /// The names of the options that are given.
            fn given(&self) -> Vec<&'static str> {
                let all = [$(($name, self.$field.is_some())),*];
                all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
            }
        }
    };
}

body! {
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

impl Body {
    /// The quantizer with its options; `None` keeps the source.
    ///
    /// # Errors
    /// [`Error::Invalid`] for unknown words, values out of range and options of other methods.
    pub fn method(&self) -> Result<Option<Method>> {
        match self.method.as_str() {
            "stbllm" => self.stbllm().map(|o| Some(Method::Stbllm(o))),
            "nm" => self.nm().map(|o| Some(Method::Nm(o))),
            "int" => self.int().map(|o| Some(Method::Int(o))),
            "pb-llm" => self.pb_llm().map(|o| Some(Method::PbLlm(o))),
            "source" => self.allow(&[]).map(|()| None),
            "budget" => self.target().map(|_| None),
            other => Err(Error::invalid(format!(
                "recipe: there is no method {other:?}; stbllm, nm, int, pb-llm, budget and source \
                 exist"
            ))),
        }
    }

    /// Refuses options that the method does not have: a typing error must not pass silently.
    fn allow(&self, allowed: &[&str]) -> Result<()> {
        match self.given().into_iter().find(|name| !allowed.contains(name)) {
            Some(name) => {
                Err(Error::invalid(format!("recipe: method {} has no option {name}", self.method)))
            }
            None => Ok(()),
        }
    }

    fn stbllm(&self) -> Result<stbllm::Options> {
        self.allow(&[
            "n",
            "block",
            "metric",
            "mask",
            "pass",
            "scope",
            "pruned",
            "order",
            "allocation",
            "salient",
            "salient-limit",
            "partition",
            "region-ratio",
            "search",
            "quantiles",
            "means",
            "search-means",
            "propagation",
            "sweeps",
        ])?;
        let (n, block) = (self.n.unwrap_or(4), self.block.unwrap_or(128));
        let spec = Stbllm::new(n, block).ok_or_else(|| {
            Error::invalid("recipe: stbllm takes n from 1 to 8 and block, a multiple of 32")
        })?;
        let options = stbllm::Options {
            spec,
            metric: word("metric", &self.metric, METRICS)?,
            mask: word("mask", &self.mask, PLACEMENTS)?,
            separate: word("pass", &self.pass, &[("layer", false), ("model", true)])?,
            scope: word("scope", &self.scope, SCOPES)?,
            strict: word("pruned", &self.pruned, &[("zero", true), ("forgotten", false)])?,
            order: word("order", &self.order, ORDERS)?,
            search: self.search_options()?,
            means: self.means.unwrap_or(false),
            propagation: word("propagation", &self.propagation, PROPAGATIONS)?,
            sweeps: self.sweeps,
        };
        let in_loop = options.mask == MaskPlacement::InLoop;
        let contradiction = if options.sweeps.is_some() && !options.storable() {
            "sweeps needs pruned = \"zero\" and no means"
        } else if in_loop && options.separate {
            "pass = \"model\" needs mask = \"compensated\" or \"before\""
        } else if !in_loop && options.order == Order::QuantizeFirst {
            "order = \"quantize-first\" needs mask = \"in-loop\""
        } else if !in_loop && options.scope == Scope::Block {
            "scope = \"block\" needs mask = \"in-loop\""
        } else if in_loop && !options.strict {
            "pruned = \"forgotten\" needs mask = \"compensated\" or \"before\""
        } else {
            return Ok(options);
        };
        Err(Error::invalid(format!("recipe: {contradiction}")))
    }

    fn search_options(&self) -> Result<SearchOptions> {
        let options = SearchOptions {
            error: word("search", &self.search, SEARCHES)?,
            salient: word("salient", &self.salient, SALIENT)?,
            salient_limit: self.salient_limit.unwrap_or(50),
            partition: word("partition", &self.partition, PARTITIONS)?,
            region_ratio: self.region_ratio.unwrap_or(2.0),
            quantiles: word("quantiles", &self.quantiles, QUANTILES)?,
            means: self.search_means.or(self.means).unwrap_or(false),
        };
        if !(options.region_ratio > 1.0 && options.region_ratio < 100.0)
            || options.salient_limit == 0
        {
            return Err(Error::invalid(
                "recipe: region-ratio is above 1, salient-limit at least 1",
            ));
        }
        for (option, given, partition) in [
            ("region-ratio", self.region_ratio.is_some(), Partition::Trisection),
            ("salient-limit", self.salient_limit.is_some(), options.partition),
        ] {
            let unused = option == "salient-limit" && options.salient == Salient::Off;
            if given && (options.partition != partition || unused) {
                return Err(Error::invalid(format!(
                    "recipe: {option} does nothing here; leave it out"
                )));
            }
        }
        Ok(options)
    }

    fn nm(&self) -> Result<nm::Options> {
        self.allow(&["n", "m", "block", "scale-bits", "sweeps", "refit"])?;
        let (n, m) = (self.n.unwrap_or(2), self.m.unwrap_or(8));
        let block = self.block.unwrap_or(128);
        let bits = self.scale_bits.unwrap_or(if block == 0 { 0 } else { 4 });
        let spec = Nm::new(n, m, bits, block, false).ok_or_else(|| {
            Error::invalid(
                "recipe: nm takes n:m of 1:4, 1:8, 2:4 or 2:8, and either block 0 with scale-bits \
                 0 or block, a multiple of 32, with scale-bits 4 or 8",
            )
        })?;
        let (sweeps, refit) = (self.sweeps.unwrap_or(4), self.refit.unwrap_or(true));
        Ok(nm::Options { spec, sweeps, refit })
    }

    fn int(&self) -> Result<int_group::Options> {
        self.allow(&["bits", "group", "rounding", "symmetric", "sweeps"])?;
        let grid = int_group::Grid {
            bits: self.bits.unwrap_or(4),
            symmetric: self.symmetric.unwrap_or(true),
        };
        let words = &[("compensated", true), ("nearest", false)];
        let compensate = word("rounding", &self.rounding, words)?;
        let sweeps = self.sweeps.unwrap_or(0);
        if sweeps > 0 && !(compensate && grid.symmetric) {
            return Err(Error::invalid(
                "recipe: sweeps of int needs rounding = \"compensated\" and a symmetric grid",
            ));
        }
        let options = int_group::Options::new(grid, self.group.unwrap_or(128), compensate);
        options.map(|options| int_group::Options { sweeps, ..options }).ok_or_else(|| {
            Error::invalid(
                "recipe: int takes bits 1 to 8 (1 to 7 if not symmetric) and group 32, 64 or 128",
            )
        })
    }

    fn pb_llm(&self) -> Result<pb_llm::Options> {
        self.allow(&["share", "bits", "salient", "block"])?;
        let options = pb_llm::Options {
            share: self.share.unwrap_or(0.1),
            bits: self.bits.unwrap_or(8),
            salient: word("salient", &self.salient, &SALIENT[..2])?,
            block: self.block.unwrap_or(128),
        };
        let fits = (0.0..=1.0).contains(&options.share)
            && (1..=8).contains(&options.bits)
            && options.block >= 8;
        fits.then_some(options).ok_or_else(|| {
            Error::invalid("recipe: pb-llm takes share from 0 to 1, bits 1 to 8, block 8 or more")
        })
    }

    /// Whether targets from the dense model reach the quantizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if masks come from a pass that has targets of its own.
    pub fn allows_dense_targets(&self) -> Result<()> {
        match self.method()? {
            Some(Method::Stbllm(o)) if o.separate => {
                Err(Error::invalid("recipe: target = \"dense\" needs pass = \"layer\""))
            }
            _ => Ok(()),
        }
    }

    /// The size that a `budget` recipe asks for, in true bits per parameter; else `None`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is missing or no size.
    pub fn target(&self) -> Result<Option<f64>> {
        if self.method != "budget" {
            return Ok(None);
        }
        self.allow(&["target-bits"])?;
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
        let words = &[
            ("uniform", Allocation::Uniform),
            ("outlier", Allocation::Outlier),
            ("paper", Allocation::Paper),
            ("published-code", Allocation::PublishedCode),
            ("sine", Allocation::Sine),
        ];
        word("allocation", &self.allocation, words)
    }
}

// The first word of each list is the default.

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

const SCOPES: &[(&str, Scope)] = &[("matrix", Scope::Matrix), ("block", Scope::Block)];

const ORDERS: &[(&str, Order)] = &[
    ("prune-first", Order::PruneFirst),
    ("quantise-first", Order::QuantizeFirst),
    ("quantize-first", Order::QuantizeFirst),
];

const SEARCHES: &[(&str, SearchError)] = &[
    ("weighted", SearchError::Weighted),
    ("weights", SearchError::Weights),
    ("saliency", SearchError::Saliency),
];

const SALIENT: &[(&str, Salient)] =
    &[("hessian", Salient::Hessian), ("magnitude", Salient::Magnitude), ("off", Salient::Off)];

const PARTITIONS: &[(&str, Partition)] = &[
    ("trisection", Partition::Trisection),
    ("bell", Partition::Bell),
    ("exhaustive", Partition::Exhaustive),
    ("none", Partition::None),
];

const QUANTILES: &[(&str, Quantiles)] =
    &[("members", Quantiles::Members), ("block", Quantiles::Block)];

const PROPAGATIONS: &[(&str, Propagation)] = &[
    ("solve", Propagation::Solve),
    ("diagonal", Propagation::Diagonal),
    ("off", Propagation::Off),
];

/// The value that a word stands for; that of the first without one.
pub(super) fn word<T: Copy>(option: &str, word: &Option<String>, words: &[(&str, T)]) -> Result<T> {
    let Some(word) = word else { return Ok(words[0].1) };
    words.iter().find(|(w, _)| w == word).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(w, _)| *w).collect();
        Error::invalid(format!("recipe: {option} is {word:?}; known: {}", known.join(", ")))
    })
}
