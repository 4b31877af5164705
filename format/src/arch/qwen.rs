//! Qwen2 and 2.5 (biases of q, k and v), Qwen3 (norms of heads) and Qwen3-MoE.

use super::block::QkNorm;
use super::config::{ConfigError, ConfigFields};
use super::family::{EXPERTS, Family};
use super::llama;
use super::options::{
    activation, expert_count, has_bias, layer_types, required_bool, required_u64, window,
};
use super::spec::{Biases, ExpertsSpec, LayerSet, ModelSpec};

pub(super) static QWEN2: Family =
    Family { model_types: &["qwen2"], from_config: qwen2, ..llama::FAMILY };

pub(super) static QWEN3: Family =
    Family { model_types: &["qwen3"], from_config: qwen3, ..llama::FAMILY };

pub(super) static QWEN3_MOE: Family = Family {
    model_types: &["qwen3_moe"],
    expert: Some(EXPERTS),
    from_config: qwen3_moe,
    ..llama::FAMILY
};

fn qwen2(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    Ok(ModelSpec { biases: Biases { qkv: true, ..Biases::default() }, ..base(config)? })
}

fn qwen3(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let bias = has_bias(config, "attention_bias");
    let biases = Biases { qkv: bias, attention_output: bias, mlp: false };
    Ok(ModelSpec { biases, qk_norm: QkNorm::Head, ..base(config)? })
}

fn qwen3_moe(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = qwen3(config)?;
    let step = config.u64("decoder_sparse_step").unwrap_or(1).max(1);
    let dense = config.u64s("mlp_only_layers").unwrap_or_default();
    let is_sparse = |layer: u64| {
        !dense.contains(&layer) && layer.saturating_add(1).checked_rem(step) == Some(0)
    };
    Ok(ModelSpec {
        experts: Some(ExpertsSpec {
            count: expert_count(config)?,
            active: required_u64(config, "num_experts_per_tok")?,
            intermediate_size: required_u64(config, "moe_intermediate_size")?,
            normalize: required_bool(config, "norm_topk_prob")?,
            layers: LayerSet::matching(spec.layers, is_sparse),
        }),
        ..spec
    })
}

/// What all versions share. The window holds from layer `max_window_layers` on, if it is used at all.
fn base(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    let spec = llama::sizes(config)?;
    let is_used = config.bool("use_sliding_window").unwrap_or(false);
    let size = config.u64("sliding_window").filter(|_| is_used);
    let first = config.u64("max_window_layers").unwrap_or(28);
    let layers = match layer_types(config, &spec)? {
        Some(windowed) => windowed,
        None => LayerSet::matching(spec.layers, |layer| layer >= first),
    };
    Ok(ModelSpec {
        activation: activation(config, "hidden_act")?,
        window: window(&spec, size, layers),
        ..spec
    })
}
