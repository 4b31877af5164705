//! A model as data: sizes, and the family that it belongs to.

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

/// Which elements of a head rotate together (required, because guessing it wrong is silent).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairing {
    /// `half`: element i with element i + head_dim/2, as in Hugging Face checkpoints.
    Half,
    /// `interleaved`: element 2i with element 2i + 1, as in Meta's and GGUF's LLaMA.
    Interleaved,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `none`.
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// `llama3`: low frequencies divided by `factor`, high ones kept, smooth between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above original context ÷ this are divided.
        low_freq_factor: f64,
        /// Wavelengths below original context ÷ this are kept.
        high_freq_factor: f64,
        /// The context before stretching.
        original_context: u64,
    },
}

/// A decoder as described by the `model.*` keys.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family that it belongs to.
    pub architecture: Architecture,
    /// Token embeddings.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the feed-forward network.
    pub intermediate_size: u64,
    /// Decoder layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u64,
    /// Width of a head; even.
    pub head_dim: u64,
    /// The context the model was configured for, in tokens.
    pub context_length: u64,
    /// The ε of RMSNorm.
    pub norm_eps: f64,
    /// The base of rotary frequencies.
    pub rope_theta: f64,
    /// Pairing of rotated elements.
    pub rope_pairing: RopePairing,
    /// Frequency scaling.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding matrix.
    pub tied_embeddings: bool,
    /// The activation.
    pub activation: Activation,
}

/// The most decoder layers: bounds what a reader builds from the keys alone.
const MAX_LAYERS: u64 = 4096;
/// The largest of the other sizes.
const MAX_SIZE: u64 = 1 << 24;

impl ModelSpec {
    /// STB-R-062: values that a reader may compute with.
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

/// A family of models: what a checkpoint calls its tensors, and what its `config.json` means.
pub struct Family {
    /// The value of `model.architecture` in a file.
    pub(super) architecture: &'static str,
    /// The values of `model_type` in `config.json`.
    pub(super) model_types: &'static [&'static str],
    /// The token embeddings, [vocab, hidden].
    pub(super) token_embedding: &'static str,
    /// What stands before the number of a decoder layer.
    pub(super) layer_prefix: &'static str,
    /// The tensors of a decoder layer in the order in which a forward pass uses them, with their
    /// names behind the number of the layer. A tensor that the block does not have is left out.
    pub(super) layer: &'static [(Role, &'static str)],
    /// The norm behind the last layer.
    pub(super) final_norm: &'static str,
    /// The matrix that turns hidden states into logits, if it is not the embeddings.
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

    /// Names of tensors.
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
