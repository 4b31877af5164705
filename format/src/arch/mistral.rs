//! Mistral 7B and the models that call themselves so. They compute as LLaMA models do, except for
//! the sliding window of the first version, which is refused.

use super::config::{ConfigError, ConfigFields};
use super::llama;
use super::options::refuse_window;
use super::spec::{Family, ModelSpec};

pub(super) static FAMILY: Family =
    Family { model_types: &["mistral"], from_config, ..llama::FAMILY };

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    // transformers takes a missing window for 4096 tokens, and null for none.
    let is_missing = !config.has("sliding_window");
    refuse_window(config, if is_missing { Some(4096) } else { config.u64("sliding_window") })?;
    llama::from_config(config)
}
