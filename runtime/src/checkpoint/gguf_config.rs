//! The `config.json` that says what the metadata of a GGUF file say.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use stb_format::arch::{GgufArchitecture, GgufField, Implied, Role, gguf_name};
use stb_format::gguf::{Gguf, GgufValue};

use super::source::StoredTensor;
use crate::error::{Error, Result};

/// The architecture of a file.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown one, and for files that are not a model.
pub(super) fn architecture(gguf: &Gguf<'_>) -> Result<&'static GgufArchitecture> {
    if let Some(kind) = gguf.get("general.type").and_then(GgufValue::as_text)
        && kind != "model"
    {
        return Err(Error::unsupported(format!(
            "general.type is {kind}; only models are supported"
        )));
    }
    let name = gguf.get("general.architecture").and_then(GgufValue::as_text);
    let name = name.ok_or_else(|| Error::invalid("the file has no text general.architecture"))?;
    GgufArchitecture::by_name(name).ok_or_else(|| {
        let known: Vec<&str> = GgufArchitecture::names().collect();
        Error::unsupported(format!(
            "general.architecture {name} is not supported; supported are: {}",
            known.join(", ")
        ))
    })
}

/// The tensors with divisors of RoPE's frequencies, `[rope_dim / 2]`, of a file.
pub(super) enum RopeDivisors {
    /// The file has none.
    None,
    /// For all contexts.
    Plain(Vec<f32>),
    /// LongRoPE.
    Long {
        /// For contexts up to the trained one.
        short: Vec<f32>,
        /// For longer contexts.
        long: Vec<f32>,
    },
}

/// The text of a `config.json` for the model of the file. `tensors` are its tensors, `divisors` those of RoPE.
///
/// # Errors
/// [`Error::Invalid`] for a missing or contradictory key, which the error names; [`Error::Unsupported`] for
/// options that a `config.json` cannot express.
pub(super) fn config_json(
    gguf: &Gguf<'_>,
    architecture: &GgufArchitecture,
    tensors: &BTreeMap<String, StoredTensor>,
    divisors: RopeDivisors,
) -> Result<String> {
    let keys = Keys { gguf, prefix: architecture.name };
    let has = |role| gguf_name(role, None).is_some_and(|name| tensors.contains_key(&name));
    let mut config = Map::new();
    let experts = keys.u64("expert_count")?.unwrap_or(0);
    let model_type = match (experts, architecture.expert_model_type) {
        (0, _) | (_, None) => architecture.model_type,
        (_, Some(model_type)) => model_type,
    };
    config.insert("model_type".into(), model_type.into());
    for field in architecture.fields {
        if let Some(value) = keys.field(field)? {
            config.insert(field.field.into(), value);
        }
    }
    for (field, implied) in architecture.implied {
        let value = match implied {
            Implied::Text(text) => Some(Value::from(*text)),
            Implied::Bool(value) => Some(Value::from(*value)),
            Implied::HeadWidthUnless(layers) => head_width(&config, *layers).map(Value::from),
        };
        config.extend(value.map(|value| ((*field).to_owned(), value)));
    }
    let embeddings = gguf_name(Role::TokenEmbedding, None).unwrap_or_default();
    let vocabulary = tensors.get(&embeddings).and_then(|tensor| tensor.shape.first());
    let vocabulary =
        vocabulary.ok_or_else(|| Error::invalid(format!("the file has no tensor {embeddings}")))?;
    config.insert("vocab_size".into(), json!(vocabulary));
    config.insert("tie_word_embeddings".into(), (!has(Role::LmHead)).into());
    if let Some(part) = rotated_part(&keys, &config)? {
        config.insert("partial_rotary_factor".into(), part);
    }
    let rotated = keys.u64("rope.dimension_count")?.or_else(|| head_width(&config, 0));
    let scaling = match divisors {
        RopeDivisors::Plain(divisors)
            if rotated.is_some_and(|width| width != 2 * divisors.len() as u64) =>
        {
            let what = "tensor rope_freqs.weight does not have one divisor per pair of a head";
            return Err(Error::invalid(what));
        }
        RopeDivisors::Plain(divisors) => divisor_scaling(&keys, &divisors)?,
        RopeDivisors::Long { short, long } => Some(long_scaling(&keys, &short, &long)?),
        RopeDivisors::None => key_scaling(&keys)?,
    };
    if let Some(scaling) = scaling {
        config.insert("rope_scaling".into(), scaling);
    }
    Ok(serde_json::to_string_pretty(&config).unwrap_or_default())
}

/// The keys of an architecture.
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<GgufValue<'a>> {
        self.gguf.get(&format!("{}.{key}", self.prefix))
    }

    fn wrong(&self, key: &str, what: &str) -> Error {
        Error::invalid(format!("key {}.{key} {what}", self.prefix))
    }

    fn u64(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_u64().map(Some).ok_or_else(|| self.wrong(key, "is not a positive integer"))
    }

    fn number(&self, key: &str) -> Result<Option<Value>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        number(value).map(Some).ok_or_else(|| self.wrong(key, "is not a finite number"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_text().map(Some).ok_or_else(|| self.wrong(key, "is not a text"))
    }

    /// The value of a field of `config.json`.
    fn field(&self, field: &GgufField) -> Result<Option<Value>> {
        let key = field.key;
        let Some(value) = self.get(key) else {
            return match field.required {
                true => Err(self.wrong(key, "is missing")),
                false => Ok(None),
            };
        };
        // Some files state a value for each layer.
        let value = match value {
            GgufValue::Array(values) => {
                let mut values = values.iter();
                let first = values.next();
                let first = first.ok_or_else(|| self.wrong(key, "is an empty array"))?;
                if values.any(|value| value != first) {
                    let key = format!("{}.{key}", self.prefix);
                    let what = format!("key {key} differs between layers, which is not supported");
                    return Err(Error::unsupported(what));
                }
                first
            }
            value => value,
        };
        number(value).map(Some).ok_or_else(|| self.wrong(key, "is not a finite number"))
    }
}

/// A number in JSON. Numbers in f32 become the shortest decimal that rounds to them, which is what the
/// configuration that they come from had.
pub(super) fn number(value: GgufValue<'_>) -> Option<Value> {
    match value {
        GgufValue::Unsigned(value) => Some(value.into()),
        GgufValue::Signed(value) => Some(value.into()),
        GgufValue::F32(value) if value.is_finite() => {
            value.to_string().parse::<f64>().ok().map(Value::from)
        }
        GgufValue::F64(value) if value.is_finite() => Some(value.into()),
        GgufValue::Bool(value) => Some(value.into()),
        _ => None,
    }
}

/// The width of a head, or, in models of `layers` layers, hidden size over heads.
fn head_width(config: &Map<String, Value>, layers: u64) -> Option<u64> {
    let field = |name: &str| config.get(name).and_then(Value::as_u64);
    let per_head = field("hidden_size")?.checked_div(field("num_attention_heads")?);
    match field("num_hidden_layers") == Some(layers) {
        true => per_head,
        false => field("head_dim").or(per_head),
    }
}

/// The part of a head that RoPE rotates, unless it rotates all. Refuses heads whose values have another width than
/// their keys.
fn rotated_part(keys: &Keys<'_>, config: &Map<String, Value>) -> Result<Option<Value>> {
    let field = |name: &str| config.get(name).and_then(Value::as_u64);
    let per_head = || field("hidden_size")?.checked_div(field("num_attention_heads")?);
    let Some(width) = field("head_dim").or_else(per_head) else { return Ok(None) };
    if let Some(value) = keys.u64("attention.value_length")?.filter(|value| *value != width) {
        return Err(Error::unsupported(format!(
            "key {}.attention.value_length is {value}, but keys of heads have width {width}; only equal \
             widths are supported",
            keys.prefix
        )));
    }
    let key = "rope.dimension_count";
    match keys.u64(key)? {
        Some(rotated) if rotated > width => {
            Err(keys.wrong(key, "is larger than the width of a head"))
        }
        Some(rotated) if rotated < width => Ok(Some(json!(rotated as f64 / width as f64))),
        _ => Ok(None),
    }
}

/// Divisors of RoPE as a list.
fn finite_numbers(values: &[f32]) -> Result<Vec<Value>> {
    let each = values.iter().map(|value| number(GgufValue::F32(*value)));
    each.collect::<Option<_>>().ok_or_else(|| Error::invalid("a divisor of RoPE is not finite"))
}

/// LongRoPE with the divisors of two tensors.
fn long_scaling(keys: &Keys<'_>, short: &[f32], long: &[f32]) -> Result<Value> {
    let original = "rope.scaling.original_context_length";
    let context = keys.u64(original)?.ok_or_else(|| keys.wrong(original, "is missing"))?;
    let mut scaling = json!({
        "rope_type": "longrope",
        "short_factor": finite_numbers(short)?,
        "long_factor": finite_numbers(long)?,
        "original_max_position_embeddings": context,
    });
    if let Some(factor) = keys.number("rope.scaling.attn_factor")? {
        scaling["attention_factor"] = factor;
    }
    Ok(scaling)
}

/// The RoPE scaling that the keys `rope.scaling.*` state.
fn key_scaling(keys: &Keys<'_>) -> Result<Option<Value>> {
    let linear = keys.number("rope.scale_linear")?;
    let factor = keys.number("rope.scaling.factor")?;
    let kind = match (keys.text("rope.scaling.type")?, &linear) {
        (Some(kind), _) => kind,
        // Old files have a factor alone.
        (None, Some(_)) => "linear",
        (None, None) if factor.is_some() => "linear",
        (None, None) => "none",
    };
    if kind == "none" {
        return Ok(None);
    }
    let factor =
        factor.or(linear).ok_or_else(|| keys.wrong("rope.scaling.factor", "is missing"))?;
    let mut scaling = json!({ "rope_type": kind, "factor": factor });
    for (key, field) in [
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("rope.scaling.attn_factor", "attention_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ] {
        if let Some(value) = keys.number(key)? {
            scaling[field] = value;
        }
    }
    Ok(Some(scaling))
}

/// Parameters of Llama 3's scaling besides the factor that are in use: low and high frequency factor, trained
/// context.
const LLAMA3: (f64, f64, f64) = (1.0, 4.0, 8192.0);

/// The RoPE scaling that divides the frequency of each pair by `divisors`: none, linear, or Llama 3's.
fn divisor_scaling(keys: &Keys<'_>, divisors: &[f32]) -> Result<Option<Value>> {
    let first = divisors.first().copied().unwrap_or(1.0);
    if divisors.iter().all(|d| *d == first) {
        let factor = number(GgufValue::F32(first));
        return Ok((first != 1.0).then(|| json!({ "rope_type": "linear", "factor": factor })));
    }
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let theta = match keys.number("rope.freq_base")? {
        Some(theta) => theta.as_f64().unwrap_or(10_000.0),
        None => 10_000.0,
    };
    let (low, high, context) = LLAMA3;
    let expected = |i: usize| {
        let frequency = theta.powf(-(i as f64) / divisors.len() as f64);
        let turns = context * frequency / (2.0 * std::f64::consts::PI);
        let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / (kept + (1.0 - kept) / f64::from(factor))
    };
    // The file's divisors were computed in f32.
    let close = |(i, d): (usize, &f32)| (f64::from(*d) / expected(i) - 1.0).abs() < 1e-5;
    if divisors.iter().enumerate().all(close) {
        return Ok(Some(json!({
            "rope_type": "llama3",
            "factor": number(GgufValue::F32(factor)),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context as u64,
        })));
    }
    // Any divisors: LongRoPE with the same ones for all contexts.
    let context = keys.u64("context_length")?;
    let context = context.ok_or_else(|| keys.wrong("context_length", "is missing"))?;
    let values = finite_numbers(divisors)?;
    Ok(Some(json!({
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file without tensors that has these keys.
    fn file(keys: &[(&str, u32, &[u8])]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(0u64.to_le_bytes());
        bytes.extend((keys.len() as u64).to_le_bytes());
        for (key, kind, value) in keys {
            bytes.extend((key.len() as u64).to_le_bytes());
            bytes.extend(key.as_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(*value);
        }
        bytes
    }

    fn scaling_of(bytes: &[u8], divisors: Option<&[f32]>) -> Result<Option<Value>> {
        let gguf = Gguf::parse(bytes).unwrap();
        let keys = Keys { gguf: &gguf, prefix: "llama" };
        match divisors {
            Some(divisors) => divisor_scaling(&keys, divisors),
            None => key_scaling(&keys),
        }
    }

    #[test]
    fn divisors_of_llama_3_are_recognized() {
        let bytes = file(&[("llama.rope.freq_base", 6, &500_000f32.to_le_bytes())]);
        // As llama.cpp's converter computes them for Llama 3.2 1B: head_dim 64, factor 32.
        let mut divisors: Vec<f32> = (0..32)
            .map(|i| {
                let frequency = 1.0 / 500_000f32.powf(i as f32 * 2.0 / 64.0);
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength < 8192.0 / 4.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    32.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / 32.0 + smooth)
                }
            })
            .collect();
        let scaling = scaling_of(&bytes, Some(&divisors)).unwrap().unwrap();
        assert_eq!(scaling["rope_type"], "llama3");
        assert_eq!(scaling["factor"], 32.0);
        assert_eq!(scaling["original_max_position_embeddings"], 8192);
        divisors[20] *= 1.01;
        let bytes = file(&[
            ("llama.rope.freq_base", 6, &500_000f32.to_le_bytes()),
            ("llama.context_length", 4, &4096u32.to_le_bytes()),
        ]);
        let scaling = scaling_of(&bytes, Some(&divisors)).unwrap().unwrap();
        assert_eq!(
            (&scaling["rope_type"], &scaling["attention_factor"]),
            (&json!("longrope"), &json!(1.0))
        );
        assert_eq!(scaling["long_factor"].as_array().unwrap().len(), 32);
        assert_eq!(scaling_of(&bytes, Some(&[1.0; 32])).unwrap(), None);
        let linear = scaling_of(&bytes, Some(&[4.0; 32])).unwrap().unwrap();
        assert_eq!(
            (linear["rope_type"].as_str(), linear["factor"].as_f64()),
            (Some("linear"), Some(4.0))
        );
    }

    #[test]
    fn scaling_from_keys() {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let factor = 4f32.to_le_bytes();
        let context = 4096u32.to_le_bytes();
        for (kinds, expected) in [
            (vec![], None),
            (vec![("llama.rope.scaling.type", 8, text("none"))], None),
            (vec![("llama.rope.scale_linear", 6, factor.to_vec())], Some(("linear", None))),
            (
                vec![
                    ("llama.rope.scaling.type", 8, text("yarn")),
                    ("llama.rope.scaling.factor", 6, factor.to_vec()),
                    ("llama.rope.scaling.original_context_length", 4, context.to_vec()),
                ],
                Some(("yarn", Some(4096))),
            ),
        ] {
            let keys: Vec<_> = kinds.iter().map(|(key, kind, v)| (*key, *kind, &v[..])).collect();
            let scaling = scaling_of(&file(&keys), None).unwrap();
            let found = scaling.as_ref().map(|scaling| {
                assert_eq!(scaling["factor"], 4.0);
                let original = &scaling["original_max_position_embeddings"];
                (scaling["rope_type"].as_str().unwrap(), original.as_u64())
            });
            assert_eq!(found, expected);
        }
        let bytes = file(&[("llama.rope.scaling.type", 8, &text("linear"))]);
        let error = scaling_of(&bytes, None).unwrap_err();
        assert!(error.to_string().contains("llama.rope.scaling.factor"), "{error}");
    }

    #[test]
    fn numbers_are_those_of_the_configuration() {
        assert_eq!(number(GgufValue::F32(1e-5)), Some(json!(1e-5)));
        assert_eq!(number(GgufValue::F32(f32::NAN)), None);
    }
}
