//! Phi-3 and Phi-4-mini: LLaMA with fused matrices, a window, longrope, and RoPE on a part of each head.

use super::config::{ConfigError, ConfigFields};
use super::family::{Family, Piece, StoredAs};
use super::llama;
use super::options::window;
use super::roles::{Linear, NormSite, Role};
use super::spec::{LayerSet, ModelSpec};

const QKV: Piece = Piece::Stacked(&[Linear::Q, Linear::K, Linear::V]);
const GATE_UP: Piece = Piece::Stacked(&[Linear::Gate, Linear::Up]);

pub(super) static FAMILY: Family = Family {
    model_types: &["phi3"],
    layer: &[
        StoredAs(Role::Norm(NormSite::Attention), "input_layernorm.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::Q), "self_attn.qkv_proj.weight", QKV),
        StoredAs(Role::Linear(Linear::K), "self_attn.qkv_proj.weight", QKV),
        StoredAs(Role::Linear(Linear::V), "self_attn.qkv_proj.weight", QKV),
        StoredAs(Role::Linear(Linear::O), "self_attn.o_proj.weight", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Mlp), "post_attention_layernorm.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::Gate), "mlp.gate_up_proj.weight", GATE_UP),
        StoredAs(Role::Linear(Linear::Up), "mlp.gate_up_proj.weight", GATE_UP),
        StoredAs(Role::Linear(Linear::Down), "mlp.down_proj.weight", Piece::Whole),
    ],
    from_config,
    ..llama::FAMILY
};

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = llama::from_config(config)?;
    Ok(ModelSpec { window: window(&spec, config.u64("sliding_window"), LayerSet::All), ..spec })
}
