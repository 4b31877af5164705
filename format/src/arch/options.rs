//! Fields of `config.json` that families share.

use super::config::{ConfigError, ConfigFields};
use super::spec::RopeScaling;

type ConfigResult<T> = Result<T, ConfigError>;

/// A required integer.
pub(super) fn required_u64(config: &dyn ConfigFields, name: &str) -> ConfigResult<u64> {
    config.u64(name).ok_or_else(|| missing(name))
}

/// A required number.
pub(super) fn required_f64(config: &dyn ConfigFields, name: &str) -> ConfigResult<f64> {
    config.f64(name).ok_or_else(|| missing(name))
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

/// Rejects biases in linear layers.
pub(super) fn refuse_biases(config: &dyn ConfigFields) -> ConfigResult<()> {
    for name in ["attention_bias", "mlp_bias"] {
        if config.bool(name) == Some(true) {
            let what = format!("{name}: biases in linear layers are not supported");
            return Err(ConfigError::Unsupported(what));
        }
    }
    Ok(())
}

/// Rejects a sliding window of `window` tokens if that is shorter than the context.
pub(super) fn refuse_window(config: &dyn ConfigFields, window: Option<u64>) -> ConfigResult<()> {
    match (window, config.u64("max_position_embeddings")) {
        (Some(window), Some(context)) if window < context => Err(ConfigError::Unsupported(
            format!("a sliding window of {window} tokens is not supported"),
        )),
        _ => Ok(()),
    }
}

/// The base θ and the scaling of RoPE, from `rope_parameters` (transformers 5), or from `rope_theta`
/// and `rope_scaling`.
pub(super) fn rope(config: &dyn ConfigFields) -> ConfigResult<(f64, RopeScaling)> {
    let scaling = config.object("rope_parameters").or_else(|| config.object("rope_scaling"));
    let number = |name: &str| scaling.as_ref().and_then(|s| s.f64(name));
    let theta = number("rope_theta").or_else(|| config.f64("rope_theta")).unwrap_or(10_000.0);
    let kind = scaling.as_ref().and_then(|s| s.text("rope_type").or_else(|| s.text("type")));
    let kind = kind.unwrap_or_else(|| "default".to_owned());
    let required = |name: &str| {
        number(name)
            .ok_or_else(|| ConfigError::Invalid(format!("rope scaling {kind} has no {name}")))
    };
    let original = || {
        let name = "original_max_position_embeddings";
        let whole = scaling.as_ref().and_then(|s| s.u64(name));
        whole.ok_or_else(|| ConfigError::Invalid(format!("rope scaling {kind} has no {name}")))
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: required("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context: original()?,
        },
        other => {
            return Err(ConfigError::Unsupported(format!(
                "rope scaling {other} is not supported; default, linear and llama3 are"
            )));
        }
    };
    Ok((theta, scaling))
}
