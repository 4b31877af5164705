//! Fields of `config.json` that families share.

use super::block::Activation;
use super::config::{ConfigError, ConfigFields};
use super::spec::{LayerSet, ModelSpec, RopeScaling, Window};
use crate::num;

type ConfigResult<T> = Result<T, ConfigError>;

/// A required integer.
pub(super) fn required_u64(config: &dyn ConfigFields, name: &str) -> ConfigResult<u64> {
    config.u64(name).ok_or_else(|| missing(name))
}

/// A required number.
pub(super) fn required_f64(config: &dyn ConfigFields, name: &str) -> ConfigResult<f64> {
    config.f64(name).ok_or_else(|| missing(name))
}

/// A required boolean.
pub(super) fn required_bool(config: &dyn ConfigFields, name: &str) -> ConfigResult<bool> {
    config.bool(name).ok_or_else(|| missing(name))
}

/// The number of experts of a layer: `num_experts`, or `num_local_experts`, as transformers 5 writes it for some
/// families.
pub(super) fn expert_count(config: &dyn ConfigFields) -> ConfigResult<u64> {
    config.u64("num_local_experts").map_or_else(|| required_u64(config, "num_experts"), Ok)
}

fn missing(name: &str) -> ConfigError {
    ConfigError::Invalid(format!("config.json has no {name}, or its type is wrong"))
}

/// Rejects quantized checkpoints.
pub(super) fn refuse_quantized(config: &dyn ConfigFields) -> ConfigResult<()> {
    match config.object("quantization_config") {
        Some(_) => Err(ConfigError::Unsupported(
            "a checkpoint that is already quantized is not supported; convert the original".into(),
        )),
        None => Ok(()),
    }
}

/// Whether linear layers have biases; they have none unless the field says so.
pub(super) fn has_bias(config: &dyn ConfigFields, name: &str) -> bool {
    config.bool(name).unwrap_or(false)
}

/// The activation function that the required field `name` names.
pub(super) fn activation(config: &dyn ConfigFields, name: &str) -> ConfigResult<Activation> {
    let value = config.text(name).ok_or_else(|| missing(name))?;
    match value.as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "relu" => Ok(Activation::Relu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        other => Err(ConfigError::Unsupported(format!(
            "{name} {other} is not supported; silu, relu, gelu and gelu_pytorch_tanh are"
        ))),
    }
}

/// The window of `size` tokens in `layers`; `None` if it covers the whole context, no layer has it, or the size is 0,
/// as some files say for none.
pub(super) fn window(spec: &ModelSpec, size: Option<u64>, layers: LayerSet) -> Option<Window> {
    let size = size.filter(|size| (1..spec.context_length).contains(size))?;
    let is_empty = matches!(&layers, LayerSet::Only(layers) if layers.is_empty());
    (!is_empty).then_some(Window { size, layers })
}

/// The layers that `layer_types` calls `sliding_attention`; `None` without the field.
pub(super) fn layer_types(
    config: &dyn ConfigFields,
    spec: &ModelSpec,
) -> ConfigResult<Option<LayerSet>> {
    let Some(types) = config.texts("layer_types") else { return Ok(None) };
    if num::len_u64(types.len()) != spec.layers {
        let layers = spec.layers;
        return Err(ConfigError::Invalid(format!("layer_types needs {layers} entries")));
    }
    let is_known = |name: &&String| matches!(name.as_str(), "sliding_attention" | "full_attention");
    if let Some(other) = types.iter().find(|name| !is_known(name)) {
        return Err(ConfigError::Unsupported(format!("layers of type {other} are not supported")));
    }
    let is_sliding = |layer: u64| {
        let name = usize::try_from(layer).ok().and_then(|i| types.get(i));
        name.is_some_and(|name| name == "sliding_attention")
    };
    Ok(Some(LayerSet::matching(spec.layers, is_sliding)))
}

/// `spec` with the RoPE of a `config.json`: base θ, scaling, rotated part of a head. The fields are in
/// `rope_parameters` (transformers 5; there may be one object per type of layer), or beside and in `rope_scaling`.
pub(super) fn rope(config: &dyn ConfigFields, spec: ModelSpec) -> ConfigResult<ModelSpec> {
    let parameters = config.object("rope_parameters");
    let by_type = |name: &str| parameters.as_ref().and_then(|p| p.object(name));
    let local_rope_theta = by_type("sliding_attention").and_then(|p| p.f64("rope_theta"));
    let scaling = match by_type("full_attention") {
        Some(global) => Some(global),
        None => config.object("rope_parameters").or_else(|| config.object("rope_scaling")),
    };
    let number = |name: &str| scaling.as_ref().and_then(|s| s.f64(name));
    let theta = number("rope_theta").or_else(|| config.f64("rope_theta")).unwrap_or(10_000.0);
    let partial = number("partial_rotary_factor").or_else(|| config.f64("partial_rotary_factor"));
    let rope_dim = match partial {
        Some(part) if part != 1.0 => Some(num::truncated(num::f64_of(spec.head_dim) * part)),
        _ => None,
    };
    let kind = scaling.as_ref().and_then(|s| s.text("rope_type").or_else(|| s.text("type")));
    let kind = kind.unwrap_or_else(|| "default".to_owned());
    let rope_scaling = match &scaling {
        Some(fields) => {
            let context = spec.context_length;
            Scaling { kind: &kind, fields: fields.as_ref(), config, context }.read()?
        }
        None => RopeScaling::None,
    };
    Ok(ModelSpec { rope_theta: theta, rope_scaling, rope_dim, local_rope_theta, ..spec })
}

/// The fields of a RoPE scaling.
struct Scaling<'a> {
    kind: &'a str,
    fields: &'a dyn ConfigFields,
    config: &'a dyn ConfigFields,
    /// `max_position_embeddings`.
    context: u64,
}

impl Scaling<'_> {
    fn read(&self) -> ConfigResult<RopeScaling> {
        match self.kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.required("factor")? }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: self.required("factor")?,
                original_context: self.context,
            }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_context: self.original().ok_or_else(|| self.missing(ORIGINAL))?,
            }),
            "yarn" => self.yarn(),
            "longrope" | "su" => self.longrope(),
            other => Err(ConfigError::Unsupported(format!(
                "rope scaling {other} is not supported; default, linear, dynamic, llama3, yarn and longrope are"
            ))),
        }
    }

    /// YaRN (Peng et al., 2023), with the defaults of transformers.
    fn yarn(&self) -> ConfigResult<RopeScaling> {
        let factor = self.required("factor")?;
        let magnitude = |scale: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let attention_factor = match self.fields.f64("attention_factor") {
            Some(given) => given,
            None => match (self.fields.f64("mscale"), self.fields.f64("mscale_all_dim")) {
                (Some(part), Some(all)) if part != 0.0 && all != 0.0 => {
                    magnitude(part) / magnitude(all)
                }
                _ => magnitude(1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: self.fields.f64("beta_fast").unwrap_or(32.0),
            beta_slow: self.fields.f64("beta_slow").unwrap_or(1.0),
            truncate: self.fields.bool("truncate").unwrap_or(true),
            attention_factor,
            original_context: self.original().unwrap_or(self.context),
        })
    }

    /// LongRoPE (Ding et al., 2024), as Phi-3 uses it.
    fn longrope(&self) -> ConfigResult<RopeScaling> {
        let factors = |name: &str| self.fields.f64s(name).ok_or_else(|| self.missing(name));
        let original = self.original().ok_or_else(|| self.missing(ORIGINAL))?;
        let factor = match self.fields.f64("factor") {
            Some(factor) => factor,
            None => num::f64_of(self.context) / num::f64_of(original.max(1)),
        };
        let attention_factor =
            self.fields.f64("attention_factor").unwrap_or_else(|| match factor <= 1.0 {
                true => 1.0,
                false => (1.0 + factor.ln() / num::f64_of(original.max(2)).ln()).sqrt(),
            });
        Ok(RopeScaling::LongRope {
            short_factors: factors("short_factor")?,
            long_factors: factors("long_factor")?,
            attention_factor,
            original_context: original,
        })
    }

    /// The trained context: in the scaling, or, in Phi-3, beside it, which comes first.
    fn original(&self) -> Option<u64> {
        self.config.u64(ORIGINAL).or_else(|| self.fields.u64(ORIGINAL))
    }

    fn required(&self, name: &str) -> ConfigResult<f64> {
        self.fields.f64(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> ConfigError {
        ConfigError::Invalid(format!("rope scaling {} has no {name}", self.kind))
    }
}

const ORIGINAL: &str = "original_max_position_embeddings";
