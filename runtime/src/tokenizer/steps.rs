//! Limits on the steps of a `tokenizer.json`: replacements that multiply a text, nested sequences, tokens of any length.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::vocab::{MAX_TOKEN_BYTES, longest_replacement};

/// The normalizer, the pre-tokenizer, the post-processor and the decoder have at most this many steps each.
const MAX_STEPS: usize = 64;
/// Sequences in sequences.
const MAX_DEPTH: usize = 8;
/// The steps of a normalizer or a decoder make a text at most this many times as long. Those of LLaMA 2 count as 12.
const MAX_GROWTH: f64 = 256.0;
/// Bytes of a regular expression.
const MAX_REGEX_BYTES: usize = 16 << 10;

/// The parts of a file that are limited.
#[derive(serde::Deserialize)]
struct File {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    added_tokens: Longest,
    model: Option<Model>,
}

#[derive(serde::Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Longest,
}

/// Checks the text of a `tokenizer.json` before the crate sees it.
///
/// # Errors
/// [`Error::Invalid`] if it is no JSON object, or exceeds a limit.
pub(super) fn check(json: &str) -> Result<()> {
    let file: File =
        serde_json::from_str(json).map_err(|e| Error::invalid(format!("tokenizer.json: {e}")))?;
    let vocabulary = file.model.map_or(0, |model| model.vocab.0);
    let longest = vocabulary.max(file.added_tokens.0);
    if longest > MAX_TOKEN_BYTES {
        return Err(refused(&format!("a token has {longest} bytes, more than {MAX_TOKEN_BYTES}")));
    }
    let parts = [
        ("normalizer", &file.normalizer),
        ("pre_tokenizer", &file.pre_tokenizer),
        ("post_processor", &file.post_processor),
        ("decoder", &file.decoder),
    ];
    for (name, part) in parts {
        let mut steps = Steps { name, count: 0, growth: 1.0 };
        steps.add(part, 0)?;
    }
    Ok(())
}

fn refused(what: &str) -> Error {
    Error::invalid(format!("tokenizer.json exceeds a limit: {what}"))
}

/// The steps of a part of the file that have been seen.
struct Steps {
    name: &'static str,
    count: usize,
    /// How many times as long a text can become.
    growth: f64,
}

impl Steps {
    /// Adds a step with the steps inside it.
    fn add(&mut self, step: &Value, depth: usize) -> Result<()> {
        let name = self.name;
        if depth > MAX_DEPTH {
            return Err(refused(&format!("the {name} is nested more than {MAX_DEPTH} deep")));
        }
        self.count += 1;
        self.check_count()?;
        for inside in ["normalizers", "pretokenizers", "processors", "decoders"] {
            for step in step.get(inside).and_then(Value::as_array).into_iter().flatten() {
                self.add(step, depth + 1)?;
            }
        }
        self.add_template(step)?;
        self.growth *= growth(step)?;
        if self.growth > MAX_GROWTH {
            return Err(refused(&format!(
                "the {name} can make a text more than {MAX_GROWTH} times as long"
            )));
        }
        Ok(())
    }

    /// Counts what a template puts around a text.
    fn add_template(&mut self, step: &Value) -> Result<()> {
        for pieces in ["single", "pair"] {
            self.count += step.get(pieces).and_then(Value::as_array).map_or(0, Vec::len);
        }
        let tokens = step.get("special_tokens").and_then(Value::as_object);
        for token in tokens.into_iter().flat_map(serde_json::Map::values) {
            self.count += token.get("ids").and_then(Value::as_array).map_or(0, Vec::len);
        }
        self.check_count()
    }

    fn check_count(&self) -> Result<()> {
        let name = self.name;
        if self.count > MAX_STEPS {
            return Err(refused(&format!("the {name} has more than {MAX_STEPS} steps")));
        }
        Ok(())
    }
}

/// How many times as long a step makes a text at most; steps without a rule here keep or shorten it.
fn growth(step: &Value) -> Result<f64> {
    let text = |field: &str| step.get(field).and_then(Value::as_str);
    let pattern = |kind: &str| step.get("pattern").and_then(|p| p.get(kind)?.as_str());
    if let Some(regex) = pattern("Regex").filter(|regex| regex.len() > MAX_REGEX_BYTES) {
        let bytes = regex.len();
        return Err(refused(&format!(
            "a regular expression has {bytes} bytes, more than {MAX_REGEX_BYTES}"
        )));
    }
    Ok(match text("type").unwrap_or_default() {
        "Replace" => {
            let content = text("content").unwrap_or_default().len() as f64;
            match (pattern("String"), pattern("Regex")) {
                (Some(""), _) => {
                    return Err(Error::invalid("tokenizer.json: a step replaces the empty text"));
                }
                (Some(old), _) => (content / old.len() as f64).max(1.0),
                // A match may be empty.
                _ => 1.0 + content,
            }
        }
        "Prepend" => 1.0 + text("prepend").unwrap_or_default().len() as f64,
        "Precompiled" => match text("precompiled_charsmap") {
            Some(map) => longest_replacement(map)?.max(1) as f64,
            None => 1.0,
        },
        // U+FDFA has 3 bytes, and 33 in compatibility form.
        "NFKC" | "NFKD" => 11.0,
        "NFC" | "NFD" => 3.0,
        // Spaces around Chinese characters, and decomposed letters.
        "BertNormalizer" => 6.0,
        "Lowercase" | "ByteLevel" | "CTC" => 2.0,
        // The replacement of a space.
        "Metaspace" => 4.0,
        "FixedLength" if step.get("length").and_then(Value::as_u64) == Some(0) => {
            return Err(Error::invalid(
                "tokenizer.json: a step cuts the text into pieces of length 0",
            ));
        }
        _ => 1.0,
    })
}

/// The bytes of the longest text in a JSON value, which is not kept.
#[derive(Clone, Copy, Default)]
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(LongestVisitor)
    }
}

struct LongestVisitor;

impl<'de> Visitor<'de> for LongestVisitor {
    type Value = Longest;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<Longest, E> {
        Ok(Longest(text.len()))
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<Longest, E> {
        Ok(Longest(0))
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<Longest, E> {
        Ok(Longest(0))
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<Longest, E> {
        Ok(Longest(0))
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<Longest, E> {
        Ok(Longest(0))
    }

    fn visit_unit<E>(self) -> std::result::Result<Longest, E> {
        Ok(Longest(0))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Longest, A::Error> {
        let mut longest = 0;
        while let Some(Longest(bytes)) = seq.next_element()? {
            longest = longest.max(bytes);
        }
        Ok(Longest(longest))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Longest, A::Error> {
        let mut longest = 0;
        while let Some((Longest(key), Longest(value))) = map.next_entry()? {
            longest = longest.max(key).max(value);
        }
        Ok(Longest(longest))
    }
}
