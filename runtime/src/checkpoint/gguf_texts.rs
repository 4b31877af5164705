//! Tokenizer, chat template and sampling defaults of GGUF files.

use serde_json::{Map, Value, json};
use stb_format::gguf::{Gguf, GgufArray, GgufValue};

use super::gguf_config::number;
use super::license;
use crate::error::{Error, Result};
use crate::vocab::{TokenKind, Vocabulary, VocabularyKind, tokenizer_json};

/// What the files beside the weights say in the Hugging Face layout.
#[derive(Debug, Default)]
pub(super) struct GgufTexts {
    pub tokenizer: Option<String>,
    pub tokenizer_config: Option<String>,
    pub generation_config: Option<String>,
    pub chat_template: Option<String>,
    /// As an SPDX expression.
    pub license: Option<String>,
    pub bos: Option<u64>,
    pub eos: Vec<u64>,
}

/// The sampling defaults: key, and the field of `generation_config.json`.
const SAMPLING: [(&str, &str); 5] = [
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_k", "top_k"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

/// The tokens that end an answer: end of text, of a turn, of a message.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The end token of SentencePiece vocabularies, if the file does not state one.
const USUAL_EOS: u64 = 2;

impl GgufTexts {
    /// Reads the keys `tokenizer.*`, `general.sampling.*` and `general.license`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a key with a wrong value, [`Error::Unsupported`] for an unknown tokenizer; both
    /// name the key.
    pub(super) fn read(gguf: &Gguf<'_>) -> Result<Self> {
        let keys = TokenizerKeys(gguf);
        let mut eos = Vec::new();
        for key in END_KEYS {
            if let Some(id) = keys.u64(key)?
                && !eos.contains(&id)
            {
                eos.push(id);
            }
        }
        let vocabulary = gguf_vocabulary(gguf)?;
        let kind = vocabulary.as_ref().map(|vocabulary| vocabulary.kind);
        if eos.is_empty() && kind == Some(VocabularyKind::SentencePieceBpe) {
            eos.push(USUAL_EOS);
        }
        let tokenizer = vocabulary.as_ref().map(tokenizer_json).transpose()?;
        let mut sampling = Map::new();
        for (key, field) in SAMPLING {
            if let Some(value) = gguf.get(key) {
                let value = number(value).ok_or_else(|| wrong(key, "a finite number"))?;
                sampling.insert(field.into(), value);
            }
        }
        let add_bos = keys.bool("tokenizer.ggml.add_bos_token")?;
        let text = |value: Value| serde_json::to_string_pretty(&value).unwrap_or_default();
        Ok(Self {
            tokenizer,
            tokenizer_config: add_bos.map(|add| text(json!({ "add_bos_token": add }))),
            generation_config: (!sampling.is_empty()).then(|| text(sampling.into())),
            chat_template: keys.text("tokenizer.chat_template")?.map(str::to_owned),
            license: license::expression(
                keys.text("general.license")?.as_slice(),
                keys.text("general.license.name")?,
            ),
            bos: keys.u64("tokenizer.ggml.bos_token_id")?,
            eos,
        })
    }
}

/// The vocabulary of a GGUF file (keys `tokenizer.ggml.*`); `None` if it has none.
///
/// # Errors
/// [`Error::Invalid`] for a key with a wrong value, [`Error::Unsupported`] for an unknown tokenizer.
pub fn gguf_vocabulary(gguf: &Gguf<'_>) -> Result<Option<Vocabulary>> {
    TokenizerKeys(gguf).vocabulary()
}

fn wrong(key: &str, expected: &str) -> Error {
    Error::invalid(format!("key {key} is not {expected}"))
}

struct TokenizerKeys<'a>(&'a Gguf<'a>);

impl<'a> TokenizerKeys<'a> {
    fn u64(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        value.as_u64().map(Some).ok_or_else(|| wrong(key, "a token id"))
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        let Some(id) = self.u64(key)? else { return Ok(None) };
        u32::try_from(id).map(Some).map_err(|_| wrong(key, "a token id"))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong(key, "a boolean"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        value.as_text().map(Some).ok_or_else(|| wrong(key, "a text"))
    }

    /// The elements of an array; none if the key is missing.
    fn list<T>(&self, key: &str, element: impl Fn(GgufValue<'a>) -> Option<T>) -> Result<Vec<T>> {
        let Some(value) = self.0.get(key) else { return Ok(Vec::new()) };
        let read = |array: GgufArray<'a>| array.iter().map(&element).collect::<Option<Vec<T>>>();
        value.as_array().and_then(read).ok_or_else(|| wrong(key, "an array of the right type"))
    }

    /// Whether the model is a Phi-3, which only its name tells.
    fn is_phi3(&self) -> Result<bool> {
        let name = self.text("general.name")?.unwrap_or_default().to_lowercase();
        Ok(name.contains("phi-3") || name.contains("phi3"))
    }

    fn vocabulary(&self) -> Result<Option<Vocabulary>> {
        let model = match self.text("tokenizer.ggml.model")? {
            None | Some("none" | "no_vocab") => return Ok(None),
            Some(model) => model,
        };
        let text = |value: GgufValue<'a>| value.as_text().map(str::to_owned);
        let score = |value| match value {
            GgufValue::F32(score) => Some(score),
            _ => None,
        };
        let token_kind = |value: GgufValue<'a>| value.as_i64().map(TokenKind::from_number);
        let byte = |value: GgufValue<'a>| {
            let number = value.as_i64()?;
            // Some files have the bytes as signed numbers.
            u8::try_from(number).ok().or_else(|| i8::try_from(number).ok().map(|b| b as u8))
        };
        let flag = |key| self.bool(key);
        Ok(Some(Vocabulary {
            kind: VocabularyKind::from_gguf(model)?,
            pre: self.text("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: self.list("tokenizer.ggml.tokens", text)?,
            scores: self.list("tokenizer.ggml.scores", score)?,
            token_kinds: self.list("tokenizer.ggml.token_type", token_kind)?,
            merges: self.list("tokenizer.ggml.merges", text)?,
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            remove_extra_whitespaces: flag("tokenizer.ggml.remove_extra_whitespaces")?
                .unwrap_or(false),
            charsmap: self.list("tokenizer.ggml.precompiled_charsmap", byte)?,
            strip_after_special: self.is_phi3()?,
            unknown: self.id("tokenizer.ggml.unknown_token_id")?,
            bos: self.id("tokenizer.ggml.bos_token_id")?,
            add_bos: flag("tokenizer.ggml.add_bos_token")?,
        }))
    }
}
