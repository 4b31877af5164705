//! Mistral: LLaMA with a sliding window in its first version.

use super::config::{ConfigError, ConfigFields};
use super::family::Family;
use super::llama;
use super::options::window;
use super::spec::{LayerSet, ModelSpec};

pub(super) static FAMILY: Family =
    Family { model_types: &["mistral"], from_config, ..llama::FAMILY };

pub(super) fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    // transformers takes a missing window for 4096 tokens, and null for none.
    let size = if config.has("sliding_window") { config.u64("sliding_window") } else { Some(4096) };
    let spec = llama::from_config(config)?;
    Ok(ModelSpec { window: window(&spec, size, LayerSet::All), ..spec })
}
