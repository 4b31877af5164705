//! `config.json` and its companions of a Hugging Face checkpoint, as a [`ModelSpec`].

use serde::Deserialize;
use serde_json::Value;
use stb_format::{Activation, ModelSpec, RopePairing, RopeScaling};

use crate::error::{Error, Result};

/// The fields of `config.json` that decide the computation. Tagged and flattened enums are avoided
/// on purpose: they break on floats when any crate turns on `serde_json/arbitrary_precision`.
#[derive(Deserialize)]
struct Config {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<u64>,
    quantization_config: Option<Value>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

/// Token ids that `config.json` and `generation_config.json` give.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenConfig {
    /// The token before every text, if any.
    pub bos: Option<u64>,
    /// Tokens that end a text.
    pub eos: Vec<u64>,
}

/// Reads `config.json`.
///
/// # Errors
/// [`Error::Invalid`] for missing or contradictory fields, [`Error::Unsupported`] for an
/// architecture or option that the graph does not have.
pub fn parse_config(json: &str) -> Result<(ModelSpec, TokenConfig)> {
    let config: Config =
        serde_json::from_str(json).map_err(|e| Error::invalid(format!("config.json: {e}")))?;
    config.check_supported()?;
    let field = |name: &str, value: Option<u64>| {
        value.ok_or_else(|| Error::invalid(format!("config.json has no {name}")))
    };
    let hidden_size = field("hidden_size", config.hidden_size)?;
    let heads = field("num_attention_heads", config.num_attention_heads)?;
    let (rope_theta, rope_scaling) = config.rope()?;
    let spec = ModelSpec {
        vocab_size: field("vocab_size", config.vocab_size)?,
        hidden_size,
        intermediate_size: field("intermediate_size", config.intermediate_size)?,
        layers: field("num_hidden_layers", config.num_hidden_layers)?,
        heads,
        kv_heads: config.num_key_value_heads.unwrap_or(heads),
        head_dim: config.head_dim.unwrap_or(hidden_size / heads.max(1)),
        context_length: field("max_position_embeddings", config.max_position_embeddings)?,
        norm_eps: config
            .rms_norm_eps
            .ok_or_else(|| Error::invalid("config.json has no rms_norm_eps"))?,
        rope_theta,
        rope_pairing: RopePairing::Half,
        rope_scaling,
        tied_embeddings: config.tie_word_embeddings.unwrap_or(false),
        activation: Activation::Silu,
    };
    spec.check().map_err(|e| Error::invalid(format!("config.json: {e}")))?;
    let bos = config.bos_token_id.as_ref().and_then(Value::as_u64);
    Ok((spec, TokenConfig { bos, eos: token_ids(config.eos_token_id.as_ref()) }))
}

/// One id, a list of ids, or nothing.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u64> {
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}

impl Config {
    fn check_supported(&self) -> Result<()> {
        let unsupported = |what: String| {
            Err(Error::unsupported(format!("{what}; LLaMA-type models (model_type llama) are")))
        };
        let kind = self.model_type.as_deref().unwrap_or("(none)");
        if kind != "llama" {
            let class = self.architectures.as_ref().and_then(|a| a.first());
            let class = class.map(|c| format!(" ({c})")).unwrap_or_default();
            return unsupported(format!("model_type {kind}{class} is not supported"));
        }
        if self.quantization_config.is_some() {
            return unsupported(
                "a checkpoint that is already quantized is not supported, convert the original"
                    .into(),
            );
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return unsupported(format!("hidden_act {other} is not supported")),
        }
        if self.attention_bias == Some(true) || self.mlp_bias == Some(true) {
            return unsupported("biases in linear layers are not supported".into());
        }
        if let (Some(window), Some(context)) = (self.sliding_window, self.max_position_embeddings)
            && window < context
        {
            return unsupported(format!("a sliding window of {window} is not supported"));
        }
        Ok(())
    }

    /// θ and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let scaling = scaling.filter(|v| !v.is_null());
        let number = |name: &str| scaling.and_then(|s| s.get(name)).and_then(Value::as_f64);
        let theta = number("rope_theta").or(self.rope_theta).unwrap_or(10_000.0);
        let kind = scaling
            .and_then(|s| s.get("rope_type").or_else(|| s.get("type")))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let required = |name: &str| {
            number(name).ok_or_else(|| Error::invalid(format!("rope scaling {kind} has no {name}")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: required("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_context: required("original_max_position_embeddings")? as u64,
            },
            other => {
                return Err(Error::unsupported(format!(
                    "rope scaling {other} is not supported; default, linear and llama3 are"
                )));
            }
        };
        Ok((theta, scaling))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#""model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05"#;

    fn parse(extra: &str) -> Result<(ModelSpec, TokenConfig)> {
        parse_config(&format!("{{{BASE}{extra}}}"))
    }

    #[test]
    fn llama_3_1_with_its_scaling() {
        let (spec, tokens) = parse(
            r#", "rope_theta": 500000.0, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "rope_scaling": {"factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}"#,
        )
        .unwrap();
        assert_eq!((spec.head_dim, spec.kv_heads, spec.rope_theta), (128, 8, 500_000.0));
        assert!(!spec.tied_embeddings);
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        assert_eq!(spec.rope_scaling, expected);
        assert_eq!(
            tokens,
            TokenConfig { bos: Some(128_000), eos: vec![128_001, 128_008, 128_009] }
        );
    }

    #[test]
    fn transformers_5_rope_parameters() {
        let (spec, _) =
            parse(r#", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}"#).unwrap();
        assert_eq!((spec.rope_theta, spec.rope_scaling), (1e6, RopeScaling::None));
    }

    #[test]
    fn what_the_graph_lacks_is_refused_by_name() {
        for (extra, word) in [
            (r#", "hidden_act": "gelu""#, "gelu"),
            (r#", "attention_bias": true"#, "bias"),
            (r#", "rope_scaling": {"rope_type": "yarn", "factor": 2}"#, "yarn"),
            (r#", "sliding_window": 4096"#, "window"),
            (r#", "quantization_config": {}"#, "quantized"),
        ] {
            let error = parse(extra).unwrap_err();
            assert_eq!(error.exit_code(), 5, "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
        let error = parse_config(r#"{"model_type": "mamba"}"#).unwrap_err();
        assert!(error.to_string().contains("mamba"), "{error}");
        assert_eq!(parse_config("{").unwrap_err().exit_code(), 4);
        let error = parse(r#", "head_dim": 7"#).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
    }
}
