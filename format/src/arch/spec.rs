//! [`ModelSpec`]: the sizes and options of a model.

use super::block::{
    Activation, Attention, Block, Experts, Mlp, MlpKind, Norm, NormKind, NormPlacement, QkNorm,
    RopeTable,
};
use crate::error::{Error, Result, Rule};
use crate::num;

/// The pairs of elements of a head that RoPE rotates. Files must state it, because a wrong guess would
/// go unnoticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopePairing {
    /// `half`: element i with element i + R/2 of the R elements that rotate, as in Hugging Face checkpoints.
    #[default]
    Half,
    /// `interleaved`: element 2i with element 2i + 1, as in Meta's and GGUF's LLaMA.
    Interleaved,
}

/// The scaling of RoPE frequencies for contexts beyond the trained one.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// `none`.
    #[default]
    None,
    /// `linear`: all frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// `dynamic`: beyond the trained context, the base θ grows with the position.
    Dynamic {
        /// The growth per trained context.
        factor: f64,
        /// The trained context in tokens.
        original_context: u64,
    },
    /// `llama3`: low frequencies are divided by `factor` and high ones unchanged, with a smooth
    /// transition.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Frequencies with wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Frequencies with wavelengths below `original_context / high_freq_factor` are unchanged.
        high_freq_factor: f64,
        /// The trained context in tokens.
        original_context: u64,
    },
    /// `yarn`: like `llama3` with a ramp over the pairs, and rotated values are scaled.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Turns in the original context above which a frequency is unchanged.
        beta_fast: f64,
        /// Turns in the original context below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
        /// The factor of cosine and sine.
        attention_factor: f64,
        /// The trained context in tokens.
        original_context: u64,
    },
    /// `longrope`: each frequency has its own divisor, one set for contexts up to the trained one and one
    /// for longer contexts.
    LongRope {
        /// Divisors for contexts up to the trained one, `[rope_dim / 2]`.
        short_factors: Vec<f64>,
        /// Divisors for longer contexts, `[rope_dim / 2]`.
        long_factors: Vec<f64>,
        /// The factor of cosine and sine.
        attention_factor: f64,
        /// The trained context in tokens.
        original_context: u64,
    },
}

/// Some of the decoder layers of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LayerSet {
    /// All layers.
    #[default]
    All,
    /// The layers with these indices, ascending.
    Only(Vec<u64>),
}

impl LayerSet {
    /// Whether `layer` is in the set.
    #[must_use]
    pub fn contains(&self, layer: u64) -> bool {
        match self {
            Self::All => true,
            Self::Only(layers) => layers.binary_search(&layer).is_ok(),
        }
    }

    /// The layers below `layers` that satisfy `is_in`; [`LayerSet::All`] if all do.
    #[must_use]
    pub fn matching(layers: u64, is_in: impl Fn(u64) -> bool) -> Self {
        let chosen: Vec<u64> = (0..layers).filter(|layer| is_in(*layer)).collect();
        if num::len_u64(chosen.len()) == layers { Self::All } else { Self::Only(chosen) }
    }
}

/// A sliding window of attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The tokens that a token attends to, itself included.
    pub size: u64,
    /// The layers with the window.
    pub layers: LayerSet,
}

/// Which linear layers have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The attention output.
    pub attention_output: bool,
    /// The linear layers of the MLP.
    pub mlp: bool,
}

/// The mixtures of experts of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertsSpec {
    /// Experts per layer.
    pub count: u64,
    /// Experts per token.
    pub active: u64,
    /// Width of the MLP of an expert.
    pub intermediate_size: u64,
    /// Whether the weights of the active experts are divided by their sum.
    pub normalize: bool,
    /// The layers with experts. The others have an MLP of width [`ModelSpec::intermediate_size`].
    pub layers: LayerSet,
}

/// A decoder model, as described by the `model.*` keys. [`ModelSpec::default`] has the options of LLaMA and no
/// sizes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSpec {
    /// The number of token embeddings.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the MLP.
    pub intermediate_size: u64,
    /// Decoder layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u64,
    /// Width of a head; even.
    pub head_dim: u64,
    /// The largest context in tokens.
    pub context_length: u64,
    /// The formula of the norms.
    pub norm_kind: NormKind,
    /// The positions of the norms.
    pub norm_placement: NormPlacement,
    /// The ε of the norms.
    pub norm_eps: f64,
    /// Whether there is no norm after the last layer: OPT-350M.
    pub no_final_norm: bool,
    /// The base θ of RoPE.
    pub rope_theta: f64,
    /// The pairing of RoPE.
    pub rope_pairing: RopePairing,
    /// The frequency scaling of RoPE.
    pub rope_scaling: RopeScaling,
    /// The elements of a head that rotate, the first ones; `None` for all. Phi-4-mini rotates three quarters.
    pub rope_dim: Option<u64>,
    /// The layers with RoPE: three of four in SmolLM3.
    pub rope_layers: LayerSet,
    /// The base θ of windowed layers, whose frequencies are not scaled: Gemma 3.
    pub local_rope_theta: Option<f64>,
    /// Whether learned position embeddings, [context, hidden], are added to the token embeddings instead of
    /// RoPE: OPT, GPT-2.
    pub learned_positions: bool,
    /// The factor of attention scores; `None` for 1 / √head_dim.
    pub attention_scale: Option<f64>,
    /// The soft cap of attention scores: Gemma 2.
    pub attention_soft_cap: Option<f64>,
    /// The sliding window, if some layers have one.
    pub window: Option<Window>,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// The linear layers with biases.
    pub biases: Biases,
    /// The MLP: with or without a gate.
    pub mlp: MlpKind,
    /// The activation function of the MLP.
    pub activation: Activation,
    /// The mixtures of experts, if some layers have one.
    pub experts: Option<ExpertsSpec>,
    /// Whether the lm_head is the matrix of token embeddings.
    pub tied_embeddings: bool,
    /// The factor of token embeddings; `None` for 1. Gemma: √hidden_size.
    pub embedding_scale: Option<f64>,
    /// The width E of token embeddings and lm_head if it differs from `hidden_size`: matrices [hidden, E] and
    /// [E, hidden] project between the two, as in OPT-350M.
    pub embedding_size: Option<u64>,
    /// The soft cap c of logits: z becomes c · tanh(z / c), as in Gemma 2.
    pub logit_soft_cap: Option<f64>,
}

/// The largest number of decoder layers: bounds what a reader allocates from the keys alone.
const MAX_LAYERS: u64 = 4096;
/// The largest vocabulary and width.
const MAX_SIZE: u64 = 1 << 24;

/// The largest number of experts of a layer.
const MAX_EXPERTS: u64 = 1 << 12;

impl ModelSpec {
    /// Whether the model computes as LLaMA does: only sizes, θ, ε, tied embeddings and the scalings `linear` and
    /// `llama3` are its own.
    #[must_use]
    pub fn is_llama(&self) -> bool {
        let is_known = matches!(
            self.rope_scaling,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. }
        );
        let llama = Self {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            context_length: self.context_length,
            norm_eps: self.norm_eps,
            rope_theta: self.rope_theta,
            rope_pairing: self.rope_pairing,
            rope_scaling: self.rope_scaling.clone(),
            tied_embeddings: self.tied_embeddings,
            ..Self::default()
        };
        is_known && *self == llama
    }

    /// The factor of attention scores. 1 / √head_dim is rounded as f32 arithmetic does, step by step.
    #[must_use]
    pub fn attention_scale(&self) -> f64 {
        self.attention_scale.unwrap_or_else(|| f64::from(1.0 / num::f32_of(self.head_dim).sqrt()))
    }

    /// Whether there is a norm after the last layer.
    #[must_use]
    pub fn has_final_norm(&self) -> bool {
        !self.no_final_norm
    }

    /// The elements of a head that RoPE rotates.
    #[must_use]
    pub fn rope_dim(&self) -> u64 {
        self.rope_dim.unwrap_or(self.head_dim)
    }

    /// The width of token embeddings and lm_head.
    #[must_use]
    pub fn embedding_size(&self) -> u64 {
        self.embedding_size.unwrap_or(self.hidden_size)
    }

    /// Checks that the values are consistent and within limits (STB-R-062).
    ///
    /// # Errors
    /// STB-R-062 with the offending value.
    pub fn check(&self) -> Result<()> {
        self.check_sizes()?;
        self.check_numbers()?;
        self.check_scaling()?;
        self.check_layer_sets()
    }

    fn check_sizes(&self) -> Result<()> {
        let mut sizes = vec![
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("layers", self.layers, MAX_LAYERS),
            ("heads", self.heads, 1 << 16),
            ("kv_heads", self.kv_heads, 1 << 16),
            ("head_dim", self.head_dim, 1 << 16),
            ("context_length", self.context_length, 1 << 32),
        ];
        sizes.extend(self.embedding_size.map(|size| ("embedding_size", size, MAX_SIZE)));
        sizes.extend(self.rope_dim.map(|dim| ("rope.dim", dim, self.head_dim)));
        if let Some(window) = &self.window {
            sizes.push(("attention.window", window.size, 1 << 32));
        }
        if let Some(experts) = &self.experts {
            sizes.push(("experts.count", experts.count, MAX_EXPERTS));
            sizes.push(("experts.active", experts.active, experts.count));
            sizes.push(("experts.intermediate_size", experts.intermediate_size, MAX_SIZE));
            if self.mlp == MlpKind::Plain {
                return fail("experts without gates".into());
            }
        }
        for (what, size, most) in sizes {
            if size == 0 || size > most {
                return fail(format!("model.{what} is {size}, 1 to {most} are allowed"));
            }
        }
        if self.heads.checked_rem(self.kv_heads) != Some(0) {
            return fail(format!("{} heads share {} key heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) || !self.rope_dim().is_multiple_of(2) {
            let dim = self.head_dim.min(self.rope_dim());
            return fail(format!("heads of width {dim} cannot rotate in pairs"));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let mut positive = vec![("norm_eps", self.norm_eps), ("rope.theta", self.rope_theta)];
        let optional = [
            ("rope.local_theta", self.local_rope_theta),
            ("attention.scale", self.attention_scale),
            ("attention.soft_cap", self.attention_soft_cap),
            ("embedding_scale", self.embedding_scale),
            ("logit_soft_cap", self.logit_soft_cap),
        ];
        positive.extend(optional.iter().filter_map(|(what, value)| Some((*what, (*value)?))));
        match &self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => {
                positive.push(("rope.factor", *factor));
            }
            RopeScaling::Llama3 { factor, low_freq_factor, .. } => {
                positive.push(("rope.factor", *factor));
                positive.push(("rope.low_freq_factor", *low_freq_factor));
            }
            RopeScaling::Yarn { factor, beta_slow, attention_factor, .. } => {
                positive.push(("rope.factor", *factor));
                positive.push(("rope.beta_slow", *beta_slow));
                positive.push(("rope.attention_factor", *attention_factor));
            }
            RopeScaling::LongRope { short_factors, long_factors, attention_factor, .. } => {
                positive.extend(short_factors.iter().map(|f| ("rope.short_factors", *f)));
                positive.extend(long_factors.iter().map(|f| ("rope.long_factors", *f)));
                positive.push(("rope.attention_factor", *attention_factor));
            }
        }
        // Written so that NaN fails, too.
        match positive.into_iter().find(|(_, v)| !(*v > 0.0 && v.is_finite())) {
            Some((what, value)) => fail(format!("model.{what} is {value}")),
            None => Ok(()),
        }
    }

    fn check_scaling(&self) -> Result<()> {
        let is_empty = match &self.rope_scaling {
            RopeScaling::None | RopeScaling::Linear { .. } => false,
            RopeScaling::Dynamic { factor, original_context } => {
                *original_context == 0 || *factor < 1.0
            }
            RopeScaling::Llama3 { low_freq_factor, high_freq_factor, original_context, .. } => {
                *original_context == 0 || high_freq_factor <= low_freq_factor
            }
            RopeScaling::Yarn { beta_fast, beta_slow, original_context, .. } => {
                if self.rope_theta <= 1.0 {
                    return fail(format!("yarn with a base of {}", self.rope_theta));
                }
                *original_context == 0 || beta_fast <= beta_slow
            }
            RopeScaling::LongRope { short_factors, long_factors, original_context, .. } => {
                let pairs = self.rope_dim().div_euclid(2);
                let is_wrong = |factors: &[f64]| num::len_u64(factors.len()) != pairs;
                if is_wrong(short_factors) || is_wrong(long_factors) {
                    return fail(format!("longrope needs {pairs} short and long factors"));
                }
                *original_context == 0
            }
        };
        if is_empty {
            return fail("the frequency range of the rope scaling is empty".into());
        }
        Ok(())
    }

    fn check_layer_sets(&self) -> Result<()> {
        let sets = [
            ("rope.layers", Some(&self.rope_layers)),
            ("attention.window_layers", self.window.as_ref().map(|window| &window.layers)),
            ("experts.layers", self.experts.as_ref().map(|experts| &experts.layers)),
        ];
        for (what, set) in sets {
            let Some(LayerSet::Only(layers)) = set else { continue };
            let is_ascending = layers.is_sorted_by(|a, b| a < b);
            if !is_ascending || layers.last().is_some_and(|last| *last >= self.layers) {
                let most = self.layers;
                return fail(format!(
                    "model.{what} is not a list of ascending layers below {most}"
                ));
            }
        }
        Ok(())
    }
}

impl ModelSpec {
    /// The description of decoder layer `layer`.
    #[must_use]
    pub fn block(&self, layer: u64) -> Block {
        let windowed = self.window.as_ref().filter(|window| window.layers.contains(layer));
        let rope = self.rope_layers.contains(layer).then(|| match self.local_rope_theta {
            Some(_) if windowed.is_some() => RopeTable::Local,
            _ => RopeTable::Global,
        });
        let experts = self.experts.as_ref().filter(|experts| experts.layers.contains(layer));
        Block {
            norm: self.norm(),
            attention: Attention {
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                scale: self.attention_scale(),
                rope: rope.filter(|_| !self.learned_positions),
                qkv_bias: self.biases.qkv,
                output_bias: self.biases.attention_output,
                qk_norm: self.qk_norm,
                window: windowed.map(|window| window.size),
                soft_cap: self.attention_soft_cap,
            },
            mlp: Mlp {
                kind: self.mlp,
                activation: self.activation,
                intermediate_size: experts.map_or(self.intermediate_size, |e| e.intermediate_size),
                bias: self.biases.mlp,
                experts: experts.map(|e| Experts {
                    count: e.count,
                    active: e.active,
                    normalize: e.normalize,
                }),
            },
        }
    }

    /// The formula, placement and ε of the norms.
    #[must_use]
    pub fn norm(&self) -> Norm {
        Norm { kind: self.norm_kind, placement: self.norm_placement, eps: self.norm_eps }
    }
}

fn fail(detail: String) -> Result<()> {
    Err(Error::new(Rule::ModelValue, detail))
}
