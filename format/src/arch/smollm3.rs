//! SmolLM3: LLaMA with layers without RoPE.

use super::config::{ConfigError, ConfigFields};
use super::family::Family;
use super::llama;
use super::options::{layer_types, window};
use super::spec::{LayerSet, ModelSpec};

pub(super) static FAMILY: Family =
    Family { model_types: &["smollm3"], from_config, ..llama::FAMILY };

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = llama::from_config(config)?;
    // The list has 1 for a layer with RoPE. Without it, every `no_rope_layer_interval`th layer has none.
    let interval = config.u64("no_rope_layer_interval").unwrap_or(4);
    let flags = config.u64s("no_rope_layers");
    let is_wrong = |flags: &Vec<u64>| crate::num::len_u64(flags.len()) != spec.layers;
    if flags.as_ref().is_some_and(is_wrong) {
        let layers = spec.layers;
        return Err(ConfigError::Invalid(format!("no_rope_layers needs {layers} entries")));
    }
    let rotates = |layer: u64| match &flags {
        Some(flags) => usize::try_from(layer).ok().and_then(|i| flags.get(i)) != Some(&0),
        None => layer.saturating_add(1).checked_rem(interval) != Some(0),
    };
    let is_used = config.bool("use_sliding_window").unwrap_or(false);
    let size = config.u64("sliding_window").filter(|_| is_used);
    let windowed = layer_types(config, &spec)?.unwrap_or_default();
    Ok(ModelSpec {
        rope_layers: LayerSet::matching(spec.layers, rotates),
        window: window(&spec, size, windowed),
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(true),
        ..spec
    })
}
