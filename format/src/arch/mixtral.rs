//! Mixtral: Mistral with a mixture of experts in each layer.

use super::config::{ConfigError, ConfigFields};
use super::family::{ExpertNames, Family, Piece, StoredAs};
use super::llama;
use super::options::{expert_count, required_u64, window};
use super::roles::{Linear, NormSite, Role};
use super::spec::{ExpertsSpec, LayerSet, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["mixtral"],
    layer: &[
        StoredAs(Role::Norm(NormSite::Attention), "input_layernorm.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::Q), "self_attn.q_proj.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::K), "self_attn.k_proj.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::V), "self_attn.v_proj.weight", Piece::Whole),
        StoredAs(Role::Linear(Linear::O), "self_attn.o_proj.weight", Piece::Whole),
        StoredAs(Role::Norm(NormSite::Mlp), "post_attention_layernorm.weight", Piece::Whole),
        StoredAs(Role::Router, "block_sparse_moe.gate.weight", Piece::Whole),
    ],
    expert: Some(ExpertNames {
        before: "block_sparse_moe.experts",
        gate: "w1.weight",
        up: "w3.weight",
        down: "w2.weight",
    }),
    from_config,
    ..llama::FAMILY
};

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = llama::from_config(config)?;
    Ok(ModelSpec {
        window: window(&spec, config.u64("sliding_window"), LayerSet::All),
        experts: Some(ExpertsSpec {
            count: expert_count(config)?,
            active: required_u64(config, "num_experts_per_tok")?,
            intermediate_size: spec.intermediate_size,
            normalize: true,
            layers: LayerSet::All,
        }),
        ..spec
    })
}
