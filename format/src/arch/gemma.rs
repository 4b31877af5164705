//! Gemma 2 and 3 (text): norms with 1 + w before and after each sublayer, GELU, scaled embeddings, windows in
//! most layers; soft caps in Gemma 2, norms of heads and two RoPE bases in Gemma 3.

use super::block::{NormKind, NormPlacement, QkNorm};
use super::config::{ConfigError, ConfigFields};
use super::family::{Family, LLAMA_OUTSIDE, Piece, StoredAs};
use super::llama;
use super::options::{activation, has_bias, layer_types, required_f64, required_u64, window};
use super::roles::{Linear, NormSite, Role};
use super::spec::{Biases, LayerSet, ModelSpec};
use crate::num;

pub(super) static GEMMA2: Family = Family {
    model_types: &["gemma2"],
    outside: LLAMA_OUTSIDE,
    layer: LAYER,
    from_config: gemma2,
    ..llama::FAMILY
};

pub(super) static GEMMA3: Family =
    Family { model_types: &["gemma3_text"], from_config: gemma3, ..GEMMA2 };

/// Gemma 3 with vision: only its language model.
pub(super) static GEMMA3_VISION: Family = Family {
    model_types: &["gemma3"],
    prefixes: &["model.language_model.", "language_model.model."],
    ignored: &[
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "language_model.lm_head.",
    ],
    from_config: gemma3_vision,
    ..GEMMA2
};

const LAYER: &[StoredAs] = &[
    StoredAs(Role::Norm(NormSite::Attention), "input_layernorm.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Q), "self_attn.q_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::Q), "self_attn.q_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::K), "self_attn.k_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::K), "self_attn.k_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::V), "self_attn.v_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::V), "self_attn.v_proj.bias", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Query), "self_attn.q_norm.weight", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Key), "self_attn.k_norm.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::O), "self_attn.o_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::O), "self_attn.o_proj.bias", Piece::Whole),
    StoredAs(
        Role::Norm(NormSite::AttentionOutput),
        "post_attention_layernorm.weight",
        Piece::Whole,
    ),
    StoredAs(Role::Norm(NormSite::Mlp), "pre_feedforward_layernorm.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Gate), "mlp.gate_proj.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Up), "mlp.up_proj.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Down), "mlp.down_proj.weight", Piece::Whole),
    StoredAs(Role::Norm(NormSite::MlpOutput), "post_feedforward_layernorm.weight", Piece::Whole),
];

fn gemma2(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = base(config)?;
    // Layers 0, 2, 4, … have the window.
    let windowed = match layer_types(config, &spec)? {
        Some(windowed) => windowed,
        None => LayerSet::matching(spec.layers, |layer| layer.is_multiple_of(2)),
    };
    Ok(ModelSpec {
        window: window(&spec, Some(required_u64(config, "sliding_window")?), windowed),
        attention_soft_cap: config.f64("attn_logit_softcapping"),
        logit_soft_cap: config.f64("final_logit_softcapping"),
        ..spec
    })
}

fn gemma3(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = base(config)?;
    if config.bool("use_bidirectional_attention") == Some(true) {
        return Err(ConfigError::Unsupported("bidirectional attention is not supported".into()));
    }
    // Every sixth layer attends to the whole context.
    let pattern = config.u64("sliding_window_pattern").unwrap_or(6);
    let windowed = match layer_types(config, &spec)? {
        Some(windowed) => windowed,
        None => LayerSet::matching(spec.layers, |layer| {
            layer.saturating_add(1).checked_rem(pattern) != Some(0)
        }),
    };
    let local = spec.local_rope_theta.or_else(|| config.f64("rope_local_base_freq"));
    Ok(ModelSpec {
        qk_norm: QkNorm::Head,
        window: window(&spec, Some(required_u64(config, "sliding_window")?), windowed),
        local_rope_theta: Some(local.unwrap_or(10_000.0)),
        attention_soft_cap: config.f64("attn_logit_softcapping"),
        logit_soft_cap: config.f64("final_logit_softcapping"),
        ..spec
    })
}

fn gemma3_vision(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let text = config.object("text_config");
    let text = text.ok_or_else(|| ConfigError::Invalid("config.json has no text_config".into()))?;
    gemma3(text.as_ref())
}

fn base(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = llama::sizes(config)?;
    let bias = has_bias(config, "attention_bias");
    let name = if config.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
    Ok(ModelSpec {
        norm_kind: NormKind::RmsPlusOne,
        norm_placement: NormPlacement::Sandwich,
        biases: Biases { qkv: bias, attention_output: bias, mlp: false },
        activation: activation(config, name)?,
        attention_scale: Some(1.0 / required_f64(config, "query_pre_attn_scalar")?.sqrt()),
        embedding_scale: Some(num::f64_of(spec.hidden_size).sqrt()),
        head_dim: required_u64(config, "head_dim")?,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(true),
        ..spec
    })
}
