//! The keys of models of `model.architecture` `decoder` (spec, metadata §2.5), and RoPE scalings.

use super::keys::{Keys, unknown};
use crate::arch::{
    Biases, ExpertsSpec, LayerSet, MlpKind, ModelSpec, NormPlacement, QkNorm, RopeScaling, Window,
};
use crate::error::{Error, Result, Rule};
use crate::meta::{Meta, Value};

/// `spec` with the keys that only `decoder` models have. Each has a default: what LLaMA does.
pub(super) fn read(keys: &Keys<'_, '_>, spec: ModelSpec) -> Result<ModelSpec> {
    let norm_placement = match keys.optional("model.norm_placement", Keys::text)? {
        None | Some("pre") => NormPlacement::Pre,
        Some("post") => NormPlacement::Post,
        Some("sandwich") => NormPlacement::Sandwich,
        Some(other) => return Err(unknown("model.norm_placement", other)),
    };
    let mlp = match keys.optional("model.mlp", Keys::text)? {
        None | Some("gated") => MlpKind::Gated,
        Some("plain") => MlpKind::Plain,
        Some(other) => return Err(unknown("model.mlp", other)),
    };
    let qk_norm = match keys.optional("model.attention.qk_norm", Keys::text)? {
        None | Some("none") => QkNorm::None,
        Some("head") => QkNorm::Head,
        Some("full") => QkNorm::Full,
        Some(other) => return Err(unknown("model.attention.qk_norm", other)),
    };
    let learned_positions = match keys.optional("model.position", Keys::text)? {
        None | Some("rope") => false,
        Some("learned") => true,
        Some(other) => return Err(unknown("model.position", other)),
    };
    let flag = |key: &str| Ok(keys.optional(key, Keys::bool)?.unwrap_or(false));
    let number = |key: &str| keys.optional(key, Keys::f64);
    let layers = |key: &str| {
        let listed = keys.optional(key, Keys::list)?;
        Ok(listed.map_or(LayerSet::All, LayerSet::Only))
    };
    let window = match keys.optional("model.attention.window", Keys::u64)? {
        Some(size) => Some(Window { size, layers: layers("model.attention.window_layers")? }),
        None => None,
    };
    let experts = match keys.optional("model.experts.count", Keys::u64)? {
        Some(count) => Some(ExpertsSpec {
            count,
            active: keys.u64("model.experts.active")?,
            intermediate_size: keys.u64("model.experts.intermediate_size")?,
            normalize: keys.bool("model.experts.normalize")?,
            layers: layers("model.experts.layers")?,
        }),
        None => None,
    };
    Ok(ModelSpec {
        norm_placement,
        no_final_norm: keys.optional("model.final_norm", Keys::bool)? == Some(false),
        rope_dim: keys.optional("model.rope.dim", Keys::u64)?,
        rope_layers: layers("model.rope.layers")?,
        local_rope_theta: number("model.rope.local_theta")?,
        learned_positions,
        attention_scale: number("model.attention.scale")?,
        attention_soft_cap: number("model.attention.soft_cap")?,
        window,
        qk_norm,
        biases: Biases {
            qkv: flag("model.bias.qkv")?,
            attention_output: flag("model.bias.attention_output")?,
            mlp: flag("model.bias.mlp")?,
        },
        mlp,
        experts,
        embedding_scale: number("model.embedding_scale")?,
        embedding_size: keys.optional("model.embedding_size", Keys::u64)?,
        logit_soft_cap: number("model.logit_soft_cap")?,
        ..spec
    })
}

/// Writes the keys that [`read`] reads, except those with their default.
pub(super) fn write(spec: &ModelSpec, meta: &mut Meta) -> Result<()> {
    let text = |v: &str| Value::Text(v.to_owned());
    let placement = match spec.norm_placement {
        NormPlacement::Pre => None,
        NormPlacement::Post => Some("post"),
        NormPlacement::Sandwich => Some("sandwich"),
    };
    let qk_norm = match spec.qk_norm {
        QkNorm::None => None,
        QkNorm::Head => Some("head"),
        QkNorm::Full => Some("full"),
    };
    let layers = |set: &LayerSet| match set {
        LayerSet::All => None,
        LayerSet::Only(layers) => Some(Value::U64List(layers.clone())),
    };
    let flag = |value: bool| value.then_some(Value::Bool(true));
    let (window, experts) = (spec.window.as_ref(), spec.experts.as_ref());
    let entries = [
        ("model.norm_placement", placement.map(text)),
        ("model.final_norm", spec.no_final_norm.then_some(Value::Bool(false))),
        ("model.mlp", (spec.mlp == MlpKind::Plain).then(|| text("plain"))),
        ("model.position", spec.learned_positions.then(|| text("learned"))),
        ("model.rope.dim", spec.rope_dim.map(Value::U64)),
        ("model.rope.layers", layers(&spec.rope_layers)),
        ("model.rope.local_theta", spec.local_rope_theta.map(Value::F64)),
        ("model.attention.scale", spec.attention_scale.map(Value::F64)),
        ("model.attention.soft_cap", spec.attention_soft_cap.map(Value::F64)),
        ("model.attention.window", window.map(|window| Value::U64(window.size))),
        ("model.attention.window_layers", window.and_then(|window| layers(&window.layers))),
        ("model.attention.qk_norm", qk_norm.map(text)),
        ("model.bias.qkv", flag(spec.biases.qkv)),
        ("model.bias.attention_output", flag(spec.biases.attention_output)),
        ("model.bias.mlp", flag(spec.biases.mlp)),
        ("model.embedding_scale", spec.embedding_scale.map(Value::F64)),
        ("model.embedding_size", spec.embedding_size.map(Value::U64)),
        ("model.logit_soft_cap", spec.logit_soft_cap.map(Value::F64)),
        ("model.experts.count", experts.map(|e| Value::U64(e.count))),
        ("model.experts.active", experts.map(|e| Value::U64(e.active))),
        ("model.experts.intermediate_size", experts.map(|e| Value::U64(e.intermediate_size))),
        ("model.experts.normalize", experts.map(|e| Value::Bool(e.normalize))),
        ("model.experts.layers", experts.and_then(|e| layers(&e.layers))),
    ];
    for (key, value) in entries {
        if let Some(value) = value {
            meta.set(key, value)?;
        }
    }
    Ok(())
}

/// Reads `model.rope.scaling` and the keys that it needs. `llama` models know three scalings.
pub(super) fn read_scaling(keys: &Keys<'_, '_>, is_decoder: bool) -> Result<RopeScaling> {
    let number = |name: &str| keys.f64(&format!("model.rope.{name}"));
    let original = || keys.u64("model.rope.original_context");
    match keys.text("model.rope.scaling")? {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: original()?,
        }),
        "dynamic" if is_decoder => {
            Ok(RopeScaling::Dynamic { factor: number("factor")?, original_context: original()? })
        }
        "yarn" if is_decoder => Ok(RopeScaling::Yarn {
            factor: number("factor")?,
            beta_fast: number("beta_fast")?,
            beta_slow: number("beta_slow")?,
            truncate: keys.bool("model.rope.truncate")?,
            attention_factor: number("attention_factor")?,
            original_context: original()?,
        }),
        "longrope" if is_decoder => Ok(RopeScaling::LongRope {
            short_factors: read_numbers(keys, "model.rope.short_factors")?,
            long_factors: read_numbers(keys, "model.rope.long_factors")?,
            attention_factor: number("attention_factor")?,
            original_context: original()?,
        }),
        other => Err(unknown("model.rope.scaling", other)),
    }
}

/// Decimal numbers without sign, separated by one space.
fn read_numbers(keys: &Keys<'_, '_>, key: &str) -> Result<Vec<f64>> {
    let number = |word: &str| {
        // Rust also reads signs, `.5`, `inf` and `nan`.
        let starts_with_digit = word.starts_with(|first: char| first.is_ascii_digit());
        word.parse().ok().filter(|_| starts_with_digit)
    };
    keys.text(key)?.split(' ').map(number).collect::<Option<_>>().ok_or_else(|| {
        Error::new(Rule::ModelKey, format!("key {key} does not hold numbers separated by spaces"))
    })
}

/// Writes `model.rope.scaling` and its keys.
pub(super) fn write_scaling(scaling: &RopeScaling, meta: &mut Meta) -> Result<()> {
    let mut set = |name: &str, value: Value| meta.set(&format!("model.rope.{name}"), value);
    let numbers = |factors: &[f64]| {
        let words: Vec<String> = factors.iter().map(f64::to_string).collect();
        Value::Text(words.join(" "))
    };
    let (name, factor, original) = match scaling {
        RopeScaling::None => ("none", None, None),
        RopeScaling::Linear { factor } => ("linear", Some(factor), None),
        RopeScaling::Dynamic { factor, original_context } => {
            ("dynamic", Some(factor), Some(original_context))
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            set("low_freq_factor", Value::F64(*low_freq_factor))?;
            set("high_freq_factor", Value::F64(*high_freq_factor))?;
            ("llama3", Some(factor), Some(original_context))
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
            original_context,
        } => {
            set("beta_fast", Value::F64(*beta_fast))?;
            set("beta_slow", Value::F64(*beta_slow))?;
            set("truncate", Value::Bool(*truncate))?;
            set("attention_factor", Value::F64(*attention_factor))?;
            ("yarn", Some(factor), Some(original_context))
        }
        RopeScaling::LongRope {
            short_factors,
            long_factors,
            attention_factor,
            original_context,
        } => {
            set("short_factors", numbers(short_factors))?;
            set("long_factors", numbers(long_factors))?;
            set("attention_factor", Value::F64(*attention_factor))?;
            ("longrope", None, Some(original_context))
        }
    };
    if let Some(factor) = factor {
        set("factor", Value::F64(*factor))?;
    }
    if let Some(original) = original {
        set("original_context", Value::U64(*original))?;
    }
    set("scaling", Value::Text(name.to_owned()))
}
