//! GPT-2: LayerNorm, learned positions, biases, a GELU MLP without gate, matrices stored as [in, out].

use super::block::{MlpKind, NormKind};
use super::config::{ConfigError, ConfigFields};
use super::family::{Family, Piece, StoredAs};
use super::llama;
use super::options::{activation, required_f64, required_u64};
use super::roles::{Linear, NormSite, Role};
use super::spec::{Biases, ModelSpec};

const QKV: Piece = Piece::TransposedStacked(&[Linear::Q, Linear::K, Linear::V]);

pub(super) static FAMILY: Family = Family {
    model_types: &["gpt2"],
    prefixes: &["transformer.", ""],
    layers: "h",
    outside: &[
        StoredAs(Role::TokenEmbedding, "wte.weight", Piece::Whole),
        StoredAs(Role::PositionEmbedding, "wpe.weight", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Final), "ln_f.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Final), "ln_f.bias", Piece::Whole),
        StoredAs(Role::LmHead, "lm_head.weight", Piece::Whole),
    ],
    layer: &[
        StoredAs(Role::Norm(NormSite::Attention), "ln_1.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Attention), "ln_1.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Q), "attn.c_attn.weight", QKV),
        StoredAs(Role::Bias(Linear::Q), "attn.c_attn.bias", QKV),
        StoredAs(Role::Linear(Linear::K), "attn.c_attn.weight", QKV),
        StoredAs(Role::Bias(Linear::K), "attn.c_attn.bias", QKV),
        StoredAs(Role::Linear(Linear::V), "attn.c_attn.weight", QKV),
        StoredAs(Role::Bias(Linear::V), "attn.c_attn.bias", QKV),
        StoredAs(Role::Linear(Linear::O), "attn.c_proj.weight", Piece::Transposed),
        StoredAs(Role::Bias(Linear::O), "attn.c_proj.bias", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Mlp), "ln_2.weight", Piece::Whole),
        StoredAs(Role::NormBias(NormSite::Mlp), "ln_2.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Up), "mlp.c_fc.weight", Piece::Transposed),
        StoredAs(Role::Bias(Linear::Up), "mlp.c_fc.bias", Piece::Whole),
        StoredAs(Role::Linear(Linear::Down), "mlp.c_proj.weight", Piece::Transposed),
        StoredAs(Role::Bias(Linear::Down), "mlp.c_proj.bias", Piece::Whole),
    ],
    // Causal masks.
    ignored: &[".attn.bias", ".attn.masked_bias"],
    from_config,
    ..llama::FAMILY
};

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    for (name, usual) in [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false)]
    {
        if config.bool(name).is_some_and(|value| value != usual) {
            return Err(ConfigError::Unsupported(format!(
                "{name} other than {usual} is not supported"
            )));
        }
    }
    let hidden_size = required_u64(config, "n_embd")?;
    let heads = required_u64(config, "n_head")?;
    Ok(ModelSpec {
        vocab_size: required_u64(config, "vocab_size")?,
        hidden_size,
        intermediate_size: config.u64("n_inner").unwrap_or(hidden_size.saturating_mul(4)),
        layers: required_u64(config, "n_layer")?,
        heads,
        kv_heads: heads,
        head_dim: hidden_size.checked_div(heads).unwrap_or(hidden_size),
        context_length: required_u64(config, "n_positions")?,
        norm_kind: NormKind::Layer,
        norm_eps: required_f64(config, "layer_norm_epsilon")?,
        rope_theta: 10_000.0,
        learned_positions: true,
        biases: Biases { qkv: true, attention_output: true, mlp: true },
        mlp: MlpKind::Plain,
        activation: activation(config, "activation_function")?,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(true),
        ..ModelSpec::default()
    })
}
