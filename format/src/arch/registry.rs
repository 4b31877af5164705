//! The registry of supported model families.

use super::config::{ConfigError, ConfigFields};
use super::family::Family;
use super::spec::ModelSpec;
use super::{gemma, gpt2, llama, mistral, mixtral, olmoe, opt, options, phi3, qwen, smollm3};

/// All supported families. Add new families here.
static FAMILIES: &[&Family] = &[
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gemma::GEMMA3_VISION,
    &gpt2::FAMILY,
    &llama::FAMILY,
    &mistral::FAMILY,
    &mixtral::FAMILY,
    &olmoe::FAMILY,
    &opt::FAMILY,
    &phi3::FAMILY,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &qwen::QWEN3_MOE,
    &smollm3::FAMILY,
];

impl Family {
    /// The supported values of `model_type` in `config.json`, in alphabetical order.
    #[must_use]
    pub fn supported_model_types() -> Vec<&'static str> {
        let mut all: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        all.sort_unstable();
        all
    }

    /// The family of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for a family that this version lacks.
    pub fn of_config(config: &dyn ConfigFields) -> Result<&'static Self, ConfigError> {
        let model_type = config.text("model_type").unwrap_or_else(|| "(none)".to_owned());
        let family = FAMILIES.iter().find(|f| f.model_types.contains(&model_type.as_str()));
        family.copied().ok_or_else(|| {
            ConfigError::Unsupported(format!(
                "model_type {model_type}{} is not supported; supported are: {}",
                config.class().map(|class| format!(" ({class})")).unwrap_or_default(),
                Self::supported_model_types().join(", ")
            ))
        })
    }

    /// The model that a `config.json` of this family describes.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for an option that this version lacks, [`ConfigError::Invalid`] for a
    /// field that is missing or has an impossible value.
    pub fn spec(&self, config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
        options::refuse_quantized(config)?;
        let spec = (self.from_config)(config)?;
        spec.check().map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(spec)
    }
}
