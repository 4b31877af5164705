//! OLMoE: a mixture of experts in each layer, queries and keys normalized over all heads.

use super::block::QkNorm;
use super::config::{ConfigError, ConfigFields};
use super::family::{EXPERTS, Family};
use super::llama;
use super::options::{expert_count, required_u64};
use super::spec::{Biases, ExpertsSpec, LayerSet, ModelSpec};

pub(super) static FAMILY: Family =
    Family { model_types: &["olmoe"], expert: Some(EXPERTS), from_config, ..llama::FAMILY };

fn from_config(config: &dyn ConfigFields) -> Result<ModelSpec, ConfigError> {
    if let Some(clip) = config.f64("clip_qkv") {
        return Err(ConfigError::Unsupported(format!(
            "clip_qkv is {clip}; clipping of q, k and v is not supported"
        )));
    }
    let spec = llama::from_config(config)?;
    Ok(ModelSpec {
        biases: Biases { mlp: false, ..spec.biases },
        qk_norm: QkNorm::Full,
        experts: Some(ExpertsSpec {
            count: expert_count(config)?,
            active: required_u64(config, "num_experts_per_tok")?,
            intermediate_size: spec.intermediate_size,
            normalize: config.bool("norm_topk_prob").unwrap_or(false),
            layers: LayerSet::All,
        }),
        ..spec
    })
}
