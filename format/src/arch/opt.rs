//! OPT: LayerNorm, learned positions, biases, a ReLU MLP without gate. OPT-350M has its norms after the
//! sublayers and narrower embeddings.

use super::block::{MlpKind, NormKind, NormPlacement};
use super::config::{ConfigError, ConfigFields};
use super::family::{Family, Piece, StoredAs};
use super::llama;
use super::options::{activation, required_u64};
use super::roles::{Linear, NormSite, Role};
use super::spec::{Biases, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["opt"],
    prefixes: &["model.decoder.", "decoder."],
    outside: &[
        StoredAs(Role::TokenEmbedding, "embed_tokens.weight", Piece::Whole),
        // Position 0 has row 2; the first rows were for padding.
        StoredAs(Role::PositionEmbedding, "embed_positions.weight", Piece::After(2)),
        StoredAs(Role::ProjectIn, "project_in.weight", Piece::Whole),
        StoredAs(Role::ProjectOut, "project_out.weight", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Final), "final_layer_norm.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Final), "final_layer_norm.bias", Piece::Whole),
        StoredAs(Role::LmHead, "lm_head.weight", Piece::Whole),
    ],
    layer: &[
        StoredAs(Role::Norm(NormSite::Attention), "self_attn_layer_norm.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Attention), "self_attn_layer_norm.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Q), "self_attn.q_proj.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::Q), "self_attn.q_proj.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::K), "self_attn.k_proj.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::K), "self_attn.k_proj.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::V), "self_attn.v_proj.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::V), "self_attn.v_proj.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::O), "self_attn.out_proj.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::O), "self_attn.out_proj.bias", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Mlp), "final_layer_norm.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Mlp), "final_layer_norm.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Up), "fc1.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::Up), "fc1.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Down), "fc2.weight", Piece::Whole),
        StoredAs(Role::Bias(Linear::Down), "fc2.bias", Piece::Whole),
    ],
    from_config,
    ..llama::FAMILY
};

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    if config.bool("layer_norm_elementwise_affine") == Some(false) {
        let what =
            "layer_norm_elementwise_affine is false; norms without weights are not supported";
        return Err(ConfigError::Unsupported(what.into()));
    }
    let hidden_size = required_u64(config, "hidden_size")?;
    let heads = required_u64(config, "num_attention_heads")?;
    let is_pre = config.bool("do_layer_norm_before").unwrap_or(true);
    let bias = config.bool("enable_bias").unwrap_or(true);
    let embedding_size = config.u64("word_embed_proj_dim").filter(|size| *size != hidden_size);
    Ok(ModelSpec {
        vocab_size: required_u64(config, "vocab_size")?,
        hidden_size,
        intermediate_size: required_u64(config, "ffn_dim")?,
        layers: required_u64(config, "num_hidden_layers")?,
        heads,
        kv_heads: heads,
        head_dim: hidden_size.checked_div(heads).unwrap_or(hidden_size),
        context_length: required_u64(config, "max_position_embeddings")?,
        norm_kind: NormKind::Layer,
        norm_placement: if is_pre { NormPlacement::Pre } else { NormPlacement::Post },
        norm_eps: 1e-5,
        no_final_norm: !is_pre || config.bool("_remove_final_layer_norm") == Some(true),
        rope_theta: 10_000.0,
        learned_positions: true,
        biases: Biases { qkv: bias, attention_output: bias, mlp: bias },
        mlp: MlpKind::Plain,
        activation: activation(config, "activation_function")?,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(true),
        embedding_size,
        ..ModelSpec::default()
    })
}
