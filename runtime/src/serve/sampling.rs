//! The fields of requests that say how tokens are chosen and when an answer ends.

use std::collections::BTreeMap;

use serde::Deserialize;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::sampler::{SamplerOptions, SamplingRange, random_seed};

/// The most stop texts of a request, and the most bytes of one.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// The range of OpenAI's biases.
const BIAS: SamplingRange = SamplingRange { name: "logit_bias", low: -100.0, high: 100.0 };
/// The most answers to one prompt.
const MAX_ANSWERS: u32 = 16;
/// The most alternatives that are reported for a token.
const MAX_TOP: u32 = 20;

/// How tokens are chosen and when an answer ends. Absent fields have the values of the model file, else those of
/// `stb-run --help`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct SamplingFields {
    /// Divides the logits; 0 selects the most likely token.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    /// Keep the most likely tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keep the K most likely tokens; 0 or -1 keeps all.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Keep tokens with at least this fraction of the probability of the best one.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Lowers the logits of tokens that the answer has already.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// Lowers the logits of tokens by how often the answer has them already.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Divides positive logits of recent tokens and multiplies negative ones; 1 is off. Also `repetition_penalty`.
    #[serde(alias = "repetition_penalty")]
    #[schema(exclusive_minimum = 0)]
    repeat_penalty: Option<f32>,
    /// Added to the logits of tokens: token id to value. -100 bans a token.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// The same prompt with the same seed has the same answer. Without it, every answer is another one.
    seed: Option<i64>,
    /// Texts that end the answer and are not part of it.
    stop: Option<OneOrMany>,
    /// The number of answers.
    #[schema(minimum = 1, maximum = 16)]
    n: Option<u32>,
    /// The most tokens of the answer; -1 for as many as fit into the context.
    #[schema(minimum = -1)]
    max_tokens: Option<i64>,
    /// The newer name of `max_tokens`.
    #[schema(minimum = -1)]
    max_completion_tokens: Option<i64>,
    /// Never choose an end token.
    ignore_eos: Option<bool>,
    /// Send the answer as server-sent events.
    pub stream: Option<bool>,
    /// Options of the events.
    pub stream_options: Option<StreamOptions>,
}

/// Options of a streamed answer.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Send the number of tokens in an event of its own at the end.
    pub include_usage: Option<bool>,
}

/// A text or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(crate) enum OneOrMany {
    /// One text.
    One(String),
    /// Several texts.
    Many(Vec<String>),
}

/// Checked [`SamplingFields`].
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub options: SamplerOptions,
    pub stop: Vec<String>,
    pub max_tokens: Option<usize>,
    pub answers: u32,
    pub ignore_end: bool,
}

impl SamplingFields {
    /// Checks the fields. `defaults` has the values of absent ones, `vocab` is the number of tokens of the model.
    ///
    /// # Errors
    /// 400 that names the wrong field.
    pub fn check(&self, defaults: &SamplerOptions, vocab: usize) -> Result<Sampling, ApiError> {
        let temperature = checked("temperature", self.temperature)?;
        let repeat_penalty = checked("repeat_penalty", self.repeat_penalty)?;
        let top_k = match self.top_k {
            None => defaults.top_k,
            Some(-1) => 0,
            Some(k) => usize::try_from(k).map_err(|_| {
                ApiError::field("top_k", format!("`top_k` is {k}, but must be at least -1"))
            })?,
        };
        let options = SamplerOptions {
            temperature: temperature.unwrap_or(defaults.temperature),
            top_k,
            top_p: checked("top_p", self.top_p)?.unwrap_or(defaults.top_p),
            min_p: checked("min_p", self.min_p)?.unwrap_or(defaults.min_p),
            repeat_penalty: repeat_penalty.unwrap_or(defaults.repeat_penalty),
            presence_penalty: checked("presence_penalty", self.presence_penalty)?
                .unwrap_or(defaults.presence_penalty),
            frequency_penalty: checked("frequency_penalty", self.frequency_penalty)?
                .unwrap_or(defaults.frequency_penalty),
            logit_bias: self.bias(vocab)?,
            seed: self.seed.map_or_else(random_seed, i64::cast_unsigned),
            ..defaults.clone()
        };
        Ok(Sampling {
            options,
            stop: self.stops()?,
            max_tokens: self.limit()?,
            answers: self.answers()?,
            ignore_end: self.ignore_eos.unwrap_or(false),
        })
    }

    fn answers(&self) -> Result<u32, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_ANSWERS => Ok(n),
            n => Err(ApiError::field(
                "n",
                format!("`n` is {n}, but must be from 1 to {MAX_ANSWERS}"),
            )),
        }
    }

    fn limit(&self) -> Result<Option<usize>, ApiError> {
        let (name, value) = match self.max_completion_tokens {
            Some(n) => ("max_completion_tokens", n),
            None => ("max_tokens", self.max_tokens.unwrap_or(-1)),
        };
        match value {
            -1 => Ok(None),
            n => usize::try_from(n).map(Some).map_err(|_| {
                ApiError::field(
                    name,
                    format!("`{name}` is {n}, but must be at least 0 (or -1: no limit)"),
                )
            }),
        }
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => return Ok(Vec::new()),
            Some(OneOrMany::One(text)) => vec![text.clone()],
            Some(OneOrMany::Many(texts)) => texts.clone(),
        };
        if stops.len() > MAX_STOPS {
            let message = format!("`stop` has {} texts, but may have {MAX_STOPS}", stops.len());
            return Err(ApiError::field("stop", message));
        }
        if stops.iter().any(|text| text.len() > MAX_STOP_BYTES) {
            let message = format!("a text of `stop` has more than {MAX_STOP_BYTES} bytes");
            return Err(ApiError::field("stop", message));
        }
        Ok(stops.into_iter().filter(|text| !text.is_empty()).collect())
    }

    fn bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let entry = |(key, value): (&String, &f32)| {
            let token = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
            let token = token.ok_or_else(|| {
                let message =
                    format!("`logit_bias` has the key {key:?}, which is no token id below {vocab}");
                ApiError::field("logit_bias", message)
            })?;
            if let Some(problem) = BIAS.refuse(*value) {
                return Err(ApiError::field("logit_bias", problem));
            }
            // OpenAI documents -100 as a ban.
            Ok((token, if *value <= BIAS.low { f32::NEG_INFINITY } else { *value }))
        };
        self.logit_bias.iter().flatten().map(entry).collect()
    }

    /// Whether the answer is sent as events.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether the events end with the number of tokens.
    pub fn reports_usage(&self) -> bool {
        self.stream_options.unwrap_or_default().include_usage.unwrap_or(false)
    }
}

/// Checks a number of alternatives per token.
///
/// # Errors
/// 400 that names `field`.
pub(crate) fn alternatives(field: &str, value: Option<u32>) -> Result<usize, ApiError> {
    match value.unwrap_or(0) {
        n @ 0..=MAX_TOP => Ok(n as usize),
        n => Err(ApiError::field(
            field,
            format!("`{field}` is {n}, but must be from 0 to {MAX_TOP}"),
        )),
    }
}

fn checked(field: &str, value: Option<f32>) -> Result<Option<f32>, ApiError> {
    match value.and_then(|value| SamplingRange::problem(field, value)) {
        Some(problem) => Err(ApiError::field(field, problem)),
        None => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Sampling, ApiError> {
        let fields: SamplingFields = serde_json::from_str(text).unwrap();
        fields.check(&SamplerOptions::default(), 100)
    }

    #[test]
    fn wrong_values_name_their_field() {
        for (text, field) in [
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"top_p": 1.1}"#, "top_p"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"min_p": 2}"#, "min_p"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty"),
            (r#"{"frequency_penalty": -3}"#, "frequency_penalty"),
            (r#"{"repetition_penalty": 0}"#, "repeat_penalty"),
            (r#"{"logit_bias": {"100": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"x": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 17}"#, "n"),
            (r#"{"max_tokens": -2}"#, "max_tokens"),
            (r#"{"max_completion_tokens": -7}"#, "max_completion_tokens"),
        ] {
            let error = check(text).unwrap_err();
            let body = serde_json::to_value(error.body()).unwrap();
            assert_eq!(body["error"]["param"], field, "{text}");
        }
    }

    #[test]
    fn nulls_and_absent_fields_are_defaults() {
        let sampling = check(r#"{"temperature": null, "stop": null, "logit_bias": null}"#).unwrap();
        assert_eq!(sampling.options.temperature, SamplerOptions::default().temperature);
        assert_eq!((sampling.answers, sampling.max_tokens), (1, None));
        let sampling = check(
            r#"{"stop": ["", "x"], "max_tokens": 5, "seed": -1, "top_k": -1, "logit_bias": {"7": -100}}"#,
        )
        .unwrap();
        assert_eq!(sampling.stop, ["x"]);
        assert_eq!((sampling.max_tokens, sampling.options.seed), (Some(5), u64::MAX));
        assert_eq!(sampling.options.logit_bias, [(7, f32::NEG_INFINITY)]);
        assert_eq!(sampling.options.top_k, 0);
    }
}
