//! Model architectures as data (spec §5.2): the decoder block, the tensors of a model with their
//! roles, and one file per family with the names of its tensors and the fields of its `config.json`.
//!
//! Everything outside this module asks these descriptions. No other code knows the name of a tensor.

mod block;
mod config;
mod llama;
mod tensors;

use std::fmt;

pub use block::{
    Activation, Attention, Block, Experts, Mlp, MlpKind, Norm, NormKind, NormPlacement, Position,
};
pub use config::{ConfigError, ConfigFields};
pub use tensors::{InputMap, Linear, LinearInput, LinearMap, NormSite, Role, TensorSpec};

use crate::profile::ModelSpec;

/// All families that a checkpoint can belong to.
static FAMILIES: &[&Family] = &[&llama::FAMILY];

/// A family of models: what a checkpoint calls its tensors, and what its `config.json` means.
pub struct Family {
    /// The value of `model.architecture` in a file.
    architecture: &'static str,
    /// The values of `model_type` in `config.json`.
    model_types: &'static [&'static str],
    /// The token embeddings, [vocab, hidden].
    token_embedding: &'static str,
    /// What stands before the number of a decoder layer.
    layer_prefix: &'static str,
    /// The tensors of a decoder layer in the order in which a forward pass uses them, with their
    /// names behind the number of the layer. A tensor that the block does not have is left out.
    layer: &'static [(Role, &'static str)],
    /// The norm behind the last layer.
    final_norm: &'static str,
    /// The matrix that turns hidden states into logits, if it is not the embeddings.
    lm_head: &'static str,
    /// Reads `config.json`.
    from_config: fn(&dyn ConfigFields) -> Result<ModelSpec, ConfigError>,
}

/// The architecture of a model: a [`Family`].
#[derive(Clone, Copy)]
pub struct Architecture(&'static Family);

impl Architecture {
    /// The LLaMA family: RMSNorm before each sublayer, RoPE, a gated MLP with SiLU, no biases.
    pub const LLAMA: Self = Self(&llama::FAMILY);

    /// The value of `model.architecture` in a file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.architecture
    }

    /// The architecture that a file names; `None` if this version does not have it.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        FAMILIES.iter().copied().find(|f| f.architecture == name).map(Self)
    }

    /// The values of `model_type` in `config.json` that this version reads, in alphabetical order.
    #[must_use]
    pub fn supported_model_types() -> Vec<&'static str> {
        let mut all: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        all.sort_unstable();
        all
    }

    fn family(self) -> &'static Family {
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

impl ModelSpec {
    /// The model that a `config.json` describes.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for a family or an option that this version does not have,
    /// [`ConfigError::Invalid`] for a field that is missing or has an impossible value.
    pub fn from_config(config: &dyn ConfigFields) -> Result<Self, ConfigError> {
        let model_type = config.text("model_type").unwrap_or_else(|| "(none)".to_owned());
        let family = FAMILIES.iter().find(|f| f.model_types.contains(&model_type.as_str()));
        let family = family.ok_or_else(|| {
            ConfigError::Unsupported(format!(
                "model_type {model_type}{} is not supported; supported are: {}",
                config.class().map(|class| format!(" ({class})")).unwrap_or_default(),
                Architecture::supported_model_types().join(", ")
            ))
        })?;
        config::refuse_quantized(config)?;
        let spec = (family.from_config)(config)?;
        spec.check().map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(spec)
    }
}
