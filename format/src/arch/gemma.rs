//! Gemma 2 and 3 (text): norms with 1 + w before and after each sublayer, GELU, scaled embeddings, windows in
//! most layers; soft caps in Gemma 2, norms of heads and two RoPE bases in Gemma 3.

use super::block::{NormKind, NormPlacement, QkNorm};
use super::config::{ConfigError, ConfigFields};
use super::family::{Family, LLAMA_OUTSIDE, Piece, StoredAs};
use super::llama;
use super::options::{activation, has_bias, layer_types, required_f64, required_u64, window};
use super::roles::{Linear, NormSite, Role};
use super::spec::{Biases, LayerSet, ModelSpec, Window};
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

/// A configuration of Gemma 3 with the defaults of transformers, because those of the models with vision have only
/// the fields that differ.
struct Gemma3Fields<'a>(&'a dyn ConfigFields);

impl ConfigFields for Gemma3Fields<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.has(name) || self.text(name).is_some() || self.f64(name).is_some()
    }

    fn u64(&self, name: &str) -> Option<u64> {
        let default = || match name {
            "vocab_size" => Some(262_208),
            "hidden_size" => Some(2304),
            "intermediate_size" => Some(9216),
            "num_hidden_layers" => Some(26),
            "num_attention_heads" => Some(8),
            "num_key_value_heads" => Some(4),
            "head_dim" => Some(256),
            "max_position_embeddings" => Some(131_072),
            "sliding_window" => Some(4096),
            _ => None,
        };
        self.0.u64(name).or_else(default)
    }

    fn f64(&self, name: &str) -> Option<f64> {
        let default = || match name {
            "rms_norm_eps" => Some(1e-6),
            "rope_theta" => Some(1e6),
            "query_pre_attn_scalar" => Some(256.0),
            _ => None,
        };
        self.0.f64(name).or_else(default)
    }

    fn bool(&self, name: &str) -> Option<bool> {
        self.0.bool(name)
    }

    fn text(&self, name: &str) -> Option<String> {
        let default = || (name == "hidden_activation").then(|| "gelu_pytorch_tanh".to_owned());
        self.0.text(name).or_else(default)
    }

    fn u64s(&self, name: &str) -> Option<Vec<u64>> {
        self.0.u64s(name)
    }

    fn f64s(&self, name: &str) -> Option<Vec<f64>> {
        self.0.f64s(name)
    }

    fn texts(&self, name: &str) -> Option<Vec<String>> {
        self.0.texts(name)
    }

    fn object(&self, name: &str) -> Option<Box<dyn ConfigFields + '_>> {
        self.0.object(name)
    }

    fn class(&self) -> Option<String> {
        self.0.class()
    }
}

fn gemma3(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let config = &Gemma3Fields(config);
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
        // Also if it covers the whole context: layers with it have their own RoPE.
        window: Some(Window { size: required_u64(config, "sliding_window")?, layers: windowed }),
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
