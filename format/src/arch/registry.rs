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
            let class = config.class().map(|class| format!(" ({class})")).unwrap_or_default();
            ConfigError::Unsupported(format!("model_type {model_type}{class} {}", advice(&model_type)))
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

/// What to do about a `model_type` that is not supported.
fn advice(model_type: &str) -> String {
    let all = Family::supported_model_types();
    let stem = stem(model_type);
    let related: Vec<&str> =
        all.iter().copied().filter(|name| !stem.is_empty() && self::stem(name) == stem).collect();
    let nearest = match related.is_empty() {
        true => String::new(),
        false => format!("The nearest are {}. ", related.join(" and ")),
    };
    format!(
        "is not supported. {nearest}Supported are: {}. Use a model of one of them; \"Add an architecture\" in \
         docs/architecture.md says how to add a family",
        all.join(", ")
    )
}

/// The letters at the start of a `model_type`: `qwen` of `qwen2_moe`.
fn stem(model_type: &str) -> &str {
    let end = model_type.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(model_type.len());
    model_type.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::advice;

    #[test]
    fn relatives_of_an_unknown_family_come_first() {
        let text = advice("qwen2_moe");
        assert!(text.contains("The nearest are qwen2 and qwen3 and qwen3_moe. "), "{text}");
        assert!(text.contains("Supported are: gemma2, ") && text.contains("smollm3"), "{text}");
        assert!(!advice("mamba").contains("nearest") && !advice("").contains("nearest"));
    }
}
