//! LLaMA 1 to 3 and models with `model_type` `llama`, such as TinyLlama and SmolLM.

use super::config::{ConfigError, ConfigFields};
use super::options::{refuse_biases, refuse_window, required_f64, required_u64, rope};
use super::roles::{Linear, NormSite, Role};
use super::spec::{Activation, Architecture, Family, ModelSpec, RopePairing};

/// See [`Architecture::LLAMA`].
pub(super) const ARCHITECTURE: Architecture = Architecture(&FAMILY);

pub(super) static FAMILY: Family = Family {
    architecture: "llama",
    model_types: &["llama"],
    token_embedding: "model.embed_tokens.weight",
    layer_prefix: "model.layers",
    layer: &[
        (Role::Norm(NormSite::Attention), "input_layernorm.weight"),
        (Role::Linear(Linear::Q), "self_attn.q_proj.weight"),
        (Role::Linear(Linear::K), "self_attn.k_proj.weight"),
        (Role::Linear(Linear::V), "self_attn.v_proj.weight"),
        (Role::Linear(Linear::O), "self_attn.o_proj.weight"),
        (Role::Norm(NormSite::Mlp), "post_attention_layernorm.weight"),
        (Role::Linear(Linear::Gate), "mlp.gate_proj.weight"),
        (Role::Linear(Linear::Up), "mlp.up_proj.weight"),
        (Role::Linear(Linear::Down), "mlp.down_proj.weight"),
    ],
    final_norm: "model.norm.weight",
    lm_head: "lm_head.weight",
    from_config,
};

pub(super) fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    match config.text("hidden_act").as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(ConfigError::Unsupported(format!("hidden_act {other} is not supported")));
        }
    }
    refuse_biases(config)?;
    refuse_window(config, config.u64("sliding_window"))?;
    let hidden_size = required_u64(config, "hidden_size")?;
    let heads = required_u64(config, "num_attention_heads")?;
    let (rope_theta, rope_scaling) = rope(config)?;
    Ok(ModelSpec {
        architecture: ARCHITECTURE,
        vocab_size: required_u64(config, "vocab_size")?,
        hidden_size,
        intermediate_size: required_u64(config, "intermediate_size")?,
        layers: required_u64(config, "num_hidden_layers")?,
        heads,
        kv_heads: config.u64("num_key_value_heads").unwrap_or(heads),
        head_dim: config
            .u64("head_dim")
            .or_else(|| hidden_size.checked_div(heads))
            .unwrap_or(hidden_size),
        context_length: required_u64(config, "max_position_embeddings")?,
        norm_eps: required_f64(config, "rms_norm_eps")?,
        rope_theta,
        rope_pairing: RopePairing::Half,
        rope_scaling,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(false),
        activation: Activation::Silu,
    })
}
