//! LLaMA 1 to 3 and models with `model_type` `llama`, such as TinyLlama and SmolLM.

use super::config::{ConfigError, ConfigFields};
use super::family::{Family, LLAMA_LAYER, LLAMA_OUTSIDE};
use super::options::{activation, has_bias, required_f64, required_u64, rope};
use super::spec::{Biases, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["llama"],
    prefixes: &["model.", ""],
    layers: "layers",
    outside: LLAMA_OUTSIDE,
    layer: LLAMA_LAYER,
    expert: None,
    ignored: &[],
    from_config,
};

pub(super) fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let attention_bias = has_bias(config, "attention_bias");
    Ok(ModelSpec {
        biases: Biases {
            qkv: attention_bias,
            attention_output: attention_bias,
            mlp: has_bias(config, "mlp_bias"),
        },
        activation: activation(config, "hidden_act")?,
        ..sizes(config)?
    })
}

/// The sizes, ε and RoPE of a family that names these fields as LLaMA does.
pub(super) fn sizes(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let hidden_size = required_u64(config, "hidden_size")?;
    let heads = required_u64(config, "num_attention_heads")?;
    let head_dim = config.u64("head_dim").or_else(|| hidden_size.checked_div(heads));
    let context_length = required_u64(config, "max_position_embeddings")?;
    let spec = ModelSpec {
        vocab_size: required_u64(config, "vocab_size")?,
        hidden_size,
        intermediate_size: required_u64(config, "intermediate_size")?,
        layers: required_u64(config, "num_hidden_layers")?,
        heads,
        kv_heads: config.u64("num_key_value_heads").unwrap_or(heads),
        head_dim: head_dim.unwrap_or(hidden_size),
        context_length,
        norm_eps: required_f64(config, "rms_norm_eps")?,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(false),
        ..ModelSpec::default()
    };
    rope(config, spec)
}
