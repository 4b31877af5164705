//! [`ModelSpec`]: the sizes and options of a model, and its family.

use std::fmt;

use super::config::{ConfigError, ConfigFields};
use super::roles::Role;
use crate::error::{Error, Result, Rule};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu`: x · sigmoid(x).
    Silu,
    /// `relu`: max(x, 0).
    Relu,
    /// `gelu`: x · Φ(x).
    Gelu,
    /// `gelu_tanh`: the approximation of `gelu` by tanh.
    GeluTanh,
}

/// The pairs of elements of a head that RoPE rotates. Files must state it, because a wrong guess would
/// go unnoticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairing {
    /// `half`: element i with element i + head_dim/2, as in Hugging Face checkpoints.
    Half,
    /// `interleaved`: element 2i with element 2i + 1, as in Meta's and GGUF's LLaMA.
    Interleaved,
}

/// The scaling of RoPE frequencies for contexts beyond the trained one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `none`.
    None,
    /// `linear`: all frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
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
}

/// A decoder model, as described by the `model.*` keys.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family of the model.
    pub architecture: Architecture,
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
    /// The ε of RMSNorm.
    pub norm_eps: f64,
    /// The base θ of RoPE.
    pub rope_theta: f64,
    /// The pairing of RoPE.
    pub rope_pairing: RopePairing,
    /// The frequency scaling of RoPE.
    pub rope_scaling: RopeScaling,
    /// Whether the lm_head is the matrix of token embeddings.
    pub tied_embeddings: bool,
    /// The activation function of the MLP.
    pub activation: Activation,
}

/// The largest number of decoder layers: bounds what a reader allocates from the keys alone.
const MAX_LAYERS: u64 = 4096;
/// The largest vocabulary and width.
const MAX_SIZE: u64 = 1 << 24;

impl ModelSpec {
    /// Checks that the values are consistent and within limits (STB-R-062).
    ///
    /// # Errors
    /// STB-R-062 with the offending value.
    pub fn check(&self) -> Result<()> {
        let fail = |detail: String| Err(Error::new(Rule::ModelValue, detail));
        for (what, size, most) in [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("layers", self.layers, MAX_LAYERS),
            ("heads", self.heads, 1 << 16),
            ("kv_heads", self.kv_heads, 1 << 16),
            ("head_dim", self.head_dim, 1 << 16),
            ("context_length", self.context_length, 1 << 32),
        ] {
            if size == 0 || size > most {
                return fail(format!("model.{what} is {size}, 1 to {most} are allowed"));
            }
        }
        if self.heads.checked_rem(self.kv_heads) != Some(0) {
            return fail(format!("{} heads share {} key heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!("heads of width {} cannot rotate in pairs", self.head_dim));
        }
        let mut positive = vec![("norm_eps", self.norm_eps), ("rope.theta", self.rope_theta)];
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive.push(("rope.factor", factor)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive.push(("rope.factor", factor));
                positive.push(("rope.low_freq_factor", low_freq_factor));
                if original_context == 0 || high_freq_factor <= low_freq_factor {
                    return fail("the llama3 frequency range is empty".into());
                }
            }
        }
        match positive.into_iter().find(|(_, v)| *v <= 0.0) {
            Some((what, value)) => fail(format!("model.{what} is {value}")),
            None => Ok(()),
        }
    }
}

/// A family of models: its tensor names and the reader of its `config.json`.
pub struct Family {
    /// The value of `model.architecture` in a file.
    pub(super) architecture: &'static str,
    /// The values of `model_type` in `config.json`.
    pub(super) model_types: &'static [&'static str],
    /// The token embeddings, [vocab, hidden].
    pub(super) token_embedding: &'static str,
    /// The part of a tensor name before the index of a decoder layer.
    pub(super) layer_prefix: &'static str,
    /// The tensors of a decoder layer in the order of a forward pass: role, and the part of the name
    /// after the index of the layer. Tensors that the block lacks are skipped.
    pub(super) layer: &'static [(Role, &'static str)],
    /// The norm after the last layer.
    pub(super) final_norm: &'static str,
    /// The lm_head, unless it is tied to the embeddings.
    pub(super) lm_head: &'static str,
    /// Reads `config.json`.
    pub(super) from_config: fn(&dyn ConfigFields) -> std::result::Result<ModelSpec, ConfigError>,
}

/// The architecture of a model: a [`Family`].
#[derive(Clone, Copy)]
pub struct Architecture(pub(super) &'static Family);

impl Architecture {
    /// The value of `model.architecture` in a file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.architecture
    }

    /// The family with its tensor names.
    pub(super) fn family(self) -> &'static Family {
        self.0
    }
}

impl PartialEq for Architecture {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl fmt::Debug for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
