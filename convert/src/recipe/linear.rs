//! The options of a recipe for the linear layers of the decoder, checked.

use stb_format::encoding::{Nm, Stbllm, Trellis, TrellisRate};

use super::file::LinearFile;
use super::problem::{Problem, Resolved, keyword};
use crate::quantize::int_group::{IntGrid, IntOptions};
use crate::quantize::metric::Metric;
use crate::quantize::nm::NmOptions;
use crate::quantize::pb_llm::PbLlmOptions;
use crate::quantize::search::{Partition, Quantiles, Salient, SearchOptions};
use crate::quantize::search_error::SearchError;
use crate::quantize::stbllm::{MaskOrder, MaskPlacement, Scope, StbllmOptions};
use crate::quantize::trellis::TrellisOptions;
use crate::quantize::{Allocation, Method, Propagation};

/// How the linear layers of the decoder are converted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LinearRecipe {
    /// Kept in the data type of the checkpoint.
    Keep,
    /// All quantized by one method.
    Quantize(Method),
    /// Encodings with the least estimated error within a size, for all tensors including embeddings and lm_head.
    Budget(Goal),
}

/// What decides on the size of a file whose encodings are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most this many true bits per parameter of the whole file.
    Bits(f64),
    /// The smallest file whose measured KL divergence from the dense model is at most this many nats per token.
    MaxKl(f64),
}

impl LinearRecipe {
    /// The method for all linear layers; `None` for other variants.
    #[must_use]
    pub fn method(&self) -> Option<Method> {
        match self {
            Self::Quantize(method) => Some(*method),
            Self::Keep | Self::Budget(_) => None,
        }
    }

    /// What decides on the size; `None` if encodings are not chosen.
    #[must_use]
    pub fn goal(&self) -> Option<Goal> {
        match self {
            Self::Budget(goal) => Some(*goal),
            Self::Keep | Self::Quantize(_) => None,
        }
    }

    /// The KL divergence that a search for a size may reach, in nats per token; `None` if there is no search.
    #[must_use]
    pub fn max_kl(&self) -> Option<f64> {
        match self.goal()? {
            Goal::MaxKl(kl) => Some(kl),
            Goal::Bits(_) => None,
        }
    }
}

/// The options of `stbllm`.
const STBLLM: &[&str] = &[
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
];

/// The problem of an option of this section.
fn problem(option: &'static str, what: impl Into<String>) -> Problem {
    Problem::new("body", option, what)
}

impl LinearFile {
    /// The method with its options. Fails for unknown words, values out of range and options of other methods.
    pub(super) fn resolve(&self) -> Resolved<LinearRecipe> {
        let method = match self.method.as_str() {
            "stbllm" => Method::Stbllm(self.stbllm()?),
            "nm" => Method::Nm(self.nm()?),
            "int" => Method::Int(self.int()?),
            "trellis" => Method::Trellis(self.trellis()?),
            "pb-llm" => Method::PbLlm(self.pb_llm()?),
            "source" => return self.check_allowed(&[]).map(|()| LinearRecipe::Keep),
            "budget" => return self.goal().map(LinearRecipe::Budget),
            other => {
                let what = format!(
                    "there is no method {other:?}; stbllm, nm, int, trellis, pb-llm, budget and source exist"
                );
                return Err(problem("method", what));
            }
        };
        Ok(LinearRecipe::Quantize(method))
    }

    fn goal(&self) -> Resolved<Goal> {
        self.check_allowed(&["target-bits", "max-kl"])?;
        match (self.target_bits, self.max_kl) {
            (Some(bits), None) if bits > 0.0 && bits <= 64.0 => Ok(Goal::Bits(bits)),
            (None, Some(kl)) if kl > 0.0 && kl <= 100.0 => Ok(Goal::MaxKl(kl)),
            (None, Some(_)) => Err(problem("max-kl", "max-kl is above 0 and at most 100")),
            (Some(_), Some(_)) => {
                Err(problem("max-kl", "budget takes target-bits or max-kl, not both"))
            }
            _ => Err(problem(
                "target-bits",
                "budget takes target-bits above 0 and at most 64, or max-kl above 0",
            )),
        }
    }

    /// Fails for options that the method does not have, so that typing errors are not ignored.
    fn check_allowed(&self, allowed: &[&str]) -> Resolved<()> {
        match self.given_options().into_iter().find(|name| !allowed.contains(name)) {
            Some(name) => Err(problem(
                name,
                format!(
                    "method {} has no option {name}; it takes {}",
                    self.method,
                    if allowed.is_empty() { "none".into() } else { allowed.join(", ") }
                ),
            )),
            None => Ok(()),
        }
    }

    fn stbllm(&self) -> Resolved<StbllmOptions> {
        self.check_allowed(STBLLM)?;
        let (n, block) = (self.n.unwrap_or(4), self.block.unwrap_or(128));
        let spec = Stbllm::new(n, block).ok_or_else(|| {
            problem("n", "stbllm takes n from 1 to 8 and block, a multiple of 32")
        })?;
        let options = StbllmOptions {
            spec,
            allocation: keyword("body", "allocation", &self.allocation, ALLOCATIONS)?,
            metric: keyword("body", "metric", &self.metric, METRICS)?,
            mask: keyword("body", "mask", &self.mask, PLACEMENTS)?,
            separate: keyword("body", "pass", &self.pass, &[("layer", false), ("model", true)])?,
            scope: keyword("body", "scope", &self.scope, SCOPES)?,
            strict: keyword(
                "body",
                "pruned",
                &self.pruned,
                &[("zero", true), ("forgotten", false)],
            )?,
            order: match self.order.as_deref() {
                // The spelling before 0.1.
                Some("quantise-first") => MaskOrder::QuantizeFirst,
                _ => keyword("body", "order", &self.order, ORDERS)?,
            },
            search: self.search_options()?,
            means: self.means.unwrap_or(false),
            propagation: keyword("body", "propagation", &self.propagation, PROPAGATIONS)?,
            sweeps: self.sweeps,
        };
        let in_loop = options.mask == MaskPlacement::InLoop;
        let (option, what) = if options.sweeps.is_some() && !options.storable() {
            ("sweeps", "sweeps needs pruned = \"zero\" and no means")
        } else if in_loop && options.separate {
            ("pass", "pass = \"model\" needs mask = \"compensated\" or \"before\"")
        } else if !in_loop && options.order == MaskOrder::QuantizeFirst {
            ("order", "order = \"quantize-first\" needs mask = \"in-loop\"")
        } else if !in_loop && options.scope == Scope::Block {
            ("scope", "scope = \"block\" needs mask = \"in-loop\"")
        } else if in_loop && !options.strict {
            ("pruned", "pruned = \"forgotten\" needs mask = \"compensated\" or \"before\"")
        } else {
            return Ok(options);
        };
        Err(problem(option, what))
    }

    fn search_options(&self) -> Resolved<SearchOptions> {
        let options = SearchOptions {
            error: keyword("body", "search", &self.search, SEARCHES)?,
            salient: keyword("body", "salient", &self.salient, SALIENT)?,
            salient_limit: self.salient_limit.unwrap_or(50),
            partition: keyword("body", "partition", &self.partition, PARTITIONS)?,
            region_ratio: self.region_ratio.unwrap_or(2.0),
            quantiles: keyword("body", "quantiles", &self.quantiles, QUANTILES)?,
            means: self.search_means.or(self.means).unwrap_or(false),
        };
        if !(options.region_ratio > 1.0 && options.region_ratio < 100.0) {
            return Err(problem("region-ratio", "region-ratio is above 1 and below 100"));
        }
        if options.salient_limit == 0 {
            return Err(problem("salient-limit", "salient-limit is at least 1"));
        }
        for (option, given, partition) in [
            ("region-ratio", self.region_ratio.is_some(), Partition::Trisection),
            ("salient-limit", self.salient_limit.is_some(), options.partition),
        ] {
            let unused = option == "salient-limit" && options.salient == Salient::Off;
            if given && (options.partition != partition || unused) {
                return Err(problem(option, format!("{option} does nothing here; leave it out")));
            }
        }
        Ok(options)
    }

    fn nm(&self) -> Resolved<NmOptions> {
        self.check_allowed(&["n", "m", "block", "scale-bits", "sweeps", "refit"])?;
        let (n, m) = (self.n.unwrap_or(2), self.m.unwrap_or(8));
        let block = self.block.unwrap_or(128);
        let bits = self.scale_bits.unwrap_or(if block == 0 { 0 } else { 4 });
        let spec = Nm::new(n, m, bits, block, false).ok_or_else(|| {
            problem(
                "n",
                "nm takes n:m of 1:4, 1:8, 2:4 or 2:8, and either block 0 with scale-bits \
                 0 or block, a multiple of 32, with scale-bits 4 or 8",
            )
        })?;
        let (sweeps, refit) = (self.sweeps.unwrap_or(4), self.refit.unwrap_or(true));
        Ok(NmOptions { spec, sweeps, refit })
    }

    fn int(&self) -> Resolved<IntOptions> {
        self.check_allowed(&["bits", "group", "rounding", "symmetric", "sweeps"])?;
        let grid =
            IntGrid { bits: self.bits.unwrap_or(4), symmetric: self.symmetric.unwrap_or(true) };
        let words = &[("compensated", true), ("nearest", false)];
        let compensate = keyword("body", "rounding", &self.rounding, words)?;
        let sweeps = self.sweeps.unwrap_or(0);
        if sweeps > 0 && !(compensate && grid.symmetric) {
            return Err(problem(
                "sweeps",
                "sweeps of int needs rounding = \"compensated\" and a symmetric grid",
            ));
        }
        let options = IntOptions::new(grid, self.group.unwrap_or(128), compensate);
        options.map(|options| IntOptions { sweeps, ..options }).ok_or_else(|| {
            problem(
                "bits",
                "int takes bits 1 to 8 (1 to 7 if not symmetric) and group 32, 64 or 128",
            )
        })
    }

    fn trellis(&self) -> Resolved<TrellisOptions> {
        self.check_allowed(&["rate", "block", "scale-bits", "col-factors", "sweeps"])?;
        let rate = self.rate.unwrap_or(2.0);
        let bits = |known: &TrellisRate| known.step_bits() as f64 / known.step_weights() as f64;
        let Some(known) = TrellisRate::ALL.iter().find(|known| bits(known) == rate) else {
            let rates: Vec<String> = TrellisRate::ALL.iter().map(|r| bits(r).to_string()).collect();
            return Err(problem("rate", format!("trellis takes a rate of {}", rates.join(", "))));
        };
        let block = self.block.unwrap_or(128);
        let scale_bits = self.scale_bits.unwrap_or(if block == 0 { 0 } else { 4 });
        let (step_bits, step_weights) = (known.step_bits() as u8, known.step_weights() as u8);
        let spec = Trellis::new(step_bits, step_weights, scale_bits, block).ok_or_else(|| {
            problem(
                "block",
                "trellis takes either block 0 with scale-bits 0 or block, a multiple of 32, with scale-bits 4 or 8",
            )
        })?;
        let spec = spec.with_col_factors(self.col_factors.unwrap_or(false));
        Ok(TrellisOptions { spec, sweeps: self.sweeps.unwrap_or(2) })
    }

    fn pb_llm(&self) -> Resolved<PbLlmOptions> {
        self.check_allowed(&["share", "bits", "salient", "block"])?;
        let options = PbLlmOptions {
            share: self.share.unwrap_or(0.1),
            bits: self.bits.unwrap_or(8),
            salient: keyword("body", "salient", &self.salient, &SALIENT[..2])?,
            block: self.block.unwrap_or(128),
        };
        let fits = (0.0..=1.0).contains(&options.share)
            && (1..=8).contains(&options.bits)
            && options.block >= 8;
        fits.then_some(options).ok_or_else(|| {
            problem("share", "pb-llm takes share from 0 to 1, bits 1 to 8, block 8 or more")
        })
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

const ORDERS: &[(&str, MaskOrder)] =
    &[("prune-first", MaskOrder::PruneFirst), ("quantize-first", MaskOrder::QuantizeFirst)];

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

const ALLOCATIONS: &[(&str, Allocation)] = &[
    ("uniform", Allocation::Uniform),
    ("outlier", Allocation::Outlier),
    ("paper", Allocation::Paper),
    ("published-code", Allocation::PublishedCode),
    ("sine", Allocation::Sine),
];
