//! Reads the `config.json` of a Hugging Face checkpoint into a [`ModelSpec`].

use serde_json::Value;
use stb_format::ModelSpec;
use stb_format::arch::{ConfigError, ConfigFields, Family};

use crate::error::{Error, Result};

/// Token ids from `config.json` and `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenConfig {
    /// The begin token, if any.
    pub bos: Option<u64>,
    /// End tokens.
    pub eos: Vec<u64>,
}

/// What a `config.json` says of a model.
#[derive(Debug)]
pub struct Config {
    /// The family of the checkpoint, which names its tensors.
    pub family: &'static Family,
    /// The architecture.
    pub spec: ModelSpec,
    /// Token ids.
    pub tokens: TokenConfig,
}

/// Parses the text of a `config.json`.
///
/// # Errors
/// [`Error::Invalid`] for missing or contradictory fields, [`Error::Unsupported`] for an
/// architecture or option that this version lacks.
pub fn parse_config(json: &str) -> Result<Config> {
    let config: Value =
        serde_json::from_str(json).map_err(|e| Error::invalid(format!("config.json: {e}")))?;
    let fields = Fields(&config);
    let family = Family::of_config(&fields).map_err(|e| match config_error(e) {
        Error::Unsupported { what } => {
            let model_type = fields.text("model_type").unwrap_or_default();
            Error::unsupported(format!("{what}. {}", advice(&model_type)))
        }
        other => other,
    })?;
    let spec = family.spec(&fields).map_err(config_error)?;
    let bos = config.get("bos_token_id").and_then(Value::as_u64);
    let tokens = TokenConfig { bos, eos: token_ids(config.get("eos_token_id")) };
    Ok(Config { family, spec, tokens })
}

/// What to do about a `model_type` that is not supported.
fn advice(model_type: &str) -> String {
    let stem = stem(model_type);
    let all = Family::supported_model_types().into_iter();
    let near: Vec<&str> = all.filter(|name| !stem.is_empty() && self::stem(name) == stem).collect();
    let near = match near.is_empty() {
        true => "Use a model of one of these".to_owned(),
        false => format!("The nearest are {}: use such a model", near.join(", ")),
    };
    format!("{near}; \"Add an architecture\" in docs/architecture.md says how to add a family")
}

/// The letters at the start of a `model_type`: `qwen` of `qwen2_moe`.
fn stem(model_type: &str) -> &str {
    model_type.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default()
}

fn config_error(e: ConfigError) -> Error {
    match e {
        ConfigError::Invalid(what) if what.starts_with("config.json") => Error::invalid(what),
        ConfigError::Invalid(what) => Error::invalid(format!("config.json: {what}")),
        ConfigError::Unsupported(what) => Error::unsupported(what),
    }
}

/// The fields of a JSON object.
struct Fields<'a>(&'a Value);

impl ConfigFields for Fields<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    fn u64(&self, name: &str) -> Option<u64> {
        integer(self.0.get(name)?)
    }

    fn f64(&self, name: &str) -> Option<f64> {
        self.0.get(name)?.as_f64()
    }

    fn bool(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(self.0.get(name)?.as_str()?.to_owned())
    }

    fn u64s(&self, name: &str) -> Option<Vec<u64>> {
        self.0.get(name)?.as_array()?.iter().map(integer).collect()
    }

    fn f64s(&self, name: &str) -> Option<Vec<f64>> {
        self.0.get(name)?.as_array()?.iter().map(Value::as_f64).collect()
    }

    fn texts(&self, name: &str) -> Option<Vec<String>> {
        let texts = self.0.get(name)?.as_array()?.iter();
        texts.map(|text| Some(text.as_str()?.to_owned())).collect()
    }

    fn object(&self, name: &str) -> Option<Box<dyn ConfigFields + '_>> {
        let value = self.0.get(name).filter(|v| v.is_object())?;
        Some(Box::new(Fields(value)))
    }

    fn class(&self) -> Option<String> {
        Some(self.0.get("architectures")?.get(0)?.as_str()?.to_owned())
    }
}

/// An integer. Some files contain integers as floating-point numbers, such as 8192.0.
fn integer(value: &Value) -> Option<u64> {
    let whole = |v: &f64| (0.0..9e15).contains(v) && v.fract() == 0.0;
    value.as_u64().or_else(|| value.as_f64().filter(whole).map(|v| v as u64))
}

/// One id, a list of ids, or nothing.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u64> {
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use stb_format::RopeScaling;

    use super::*;

    const BASE: &str = r#""model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "hidden_act": "silu""#;

    fn parse(extra: &str) -> Result<Config> {
        parse_config(&format!("{{{BASE}{extra}}}"))
    }

    #[test]
    fn llama_3_1_with_its_scaling() {
        let Config { spec, tokens, .. } = parse(
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
        let Config { spec, .. } =
            parse(r#", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}"#).unwrap();
        assert_eq!((spec.rope_theta, spec.rope_scaling), (1e6, RopeScaling::None));
    }

    /// The configuration of the 4B model with vision has only what differs from the defaults of transformers.
    #[test]
    fn gemma_3_with_vision_has_defaults() {
        let config = r#"{"model_type": "gemma3", "text_config": {"hidden_size": 2560,
            "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}"#;
        let spec = parse_config(config).unwrap().spec;
        let sizes = (spec.vocab_size, spec.heads, spec.kv_heads, spec.head_dim);
        assert_eq!(sizes, (262_208, 8, 4, 256));
        assert_eq!((spec.rope_theta, spec.local_rope_theta), (1e6, Some(1e4)));
        assert_eq!(spec.rope_scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(spec.block(4).attention.window, Some(1024));
        assert_eq!(spec.block(5).attention.window, None);
        assert_eq!(spec.attention_scale(), 1.0 / 16.0);
    }

    #[test]
    fn unsupported_options_are_named_in_the_error() {
        for (extra, word) in [
            (r#", "hidden_act": "mish""#, "mish"),
            (r#", "rope_scaling": {"rope_type": "spiral", "factor": 2}"#, "spiral"),
            (r#", "quantization_config": {}"#, "quantized"),
        ] {
            let error = parse(extra).unwrap_err();
            assert_eq!(error.exit_code(), 5, "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
        let error = parse_config(r#"{"model_type": "mamba"}"#).unwrap_err();
        assert!(error.to_string().contains("mamba"), "{error}");
        assert!(!error.to_string().contains("nearest"), "{error}");
        let error = parse_config(r#"{"model_type": "qwen2_moe"}"#).unwrap_err().to_string();
        assert!(error.contains("The nearest are qwen2, qwen3, qwen3_moe: "), "{error}");
        assert!(error.contains("gemma2") && error.contains("docs/architecture.md"), "{error}");
        assert_eq!(parse_config("{").unwrap_err().exit_code(), 4);
        let error = parse(r#", "head_dim": 7"#).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
    }
}
