//! The registry of supported model families.

use super::config::{ConfigError, ConfigFields};
use super::spec::{Architecture, Family, ModelSpec};
use super::{llama, mistral, options};

/// All supported families. Add new families here.
static FAMILIES: &[&Family] = &[&llama::FAMILY, &mistral::FAMILY];

impl Architecture {
    /// The LLaMA family: RMSNorm before each sublayer, RoPE, a gated MLP with SiLU, no biases.
    pub const LLAMA: Self = llama::ARCHITECTURE;

    /// The architecture with this `model.architecture` value; `None` if this version lacks it.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        FAMILIES.iter().copied().find(|f| f.architecture == name).map(Self)
    }

    /// The supported values of `model_type` in `config.json`, in alphabetical order.
    #[must_use]
    pub fn supported_model_types() -> Vec<&'static str> {
        let mut all: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        all.sort_unstable();
        all
    }
}

impl ModelSpec {
    /// The model that a `config.json` describes.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for a family or an option that this version lacks,
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
        options::refuse_quantized(config)?;
        let spec = (family.from_config)(config)?;
        spec.check().map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(spec)
    }
}
