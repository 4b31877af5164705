//! The bytes behind the written forms of tokens.

use std::collections::HashMap;

use serde_json::Value;

/// How a tokenizer writes the bytes of its tokens.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ByteStyle {
    /// GPT-2's: each byte is written as one character.
    Characters(HashMap<char, u8>),
    /// SentencePiece's: text in which another character stands for the space, and `<0xNN>` for single bytes.
    Spaces(String),
}

impl ByteStyle {
    /// The style by the decoder of a tokenizer.
    pub fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let own = std::slice::from_ref(&decoder);
        let parts = decoder.get("decoders").and_then(Value::as_array).map_or(own, Vec::as_slice);
        let is = |part: &Value, name: &str| part.get("type").and_then(Value::as_str) == Some(name);
        if parts.iter().any(|part| is(part, "ByteLevel")) {
            return Self::Characters(byte_characters());
        }
        let space = parts.iter().find_map(|part| {
            if is(part, "Metaspace") {
                return part.get("replacement").and_then(Value::as_str);
            }
            let is_space = part.get("content").and_then(Value::as_str) == Some(" ");
            part.get("pattern")?.get("String")?.as_str().filter(|s| is_space && !s.is_empty())
        });
        Self::Spaces(space.unwrap_or("\u{2581}").to_owned())
    }

    /// The bytes of a token that is written as `text`.
    pub fn bytes(&self, text: &str) -> Vec<u8> {
        match self {
            Self::Characters(bytes) => {
                let all: Option<Vec<u8>> = text.chars().map(|c| bytes.get(&c).copied()).collect();
                all.unwrap_or_else(|| text.as_bytes().to_vec())
            }
            Self::Spaces(space) => match single_byte(text) {
                Some(byte) => vec![byte],
                None => text.replace(space.as_str(), " ").into_bytes(),
            },
        }
    }
}

/// The byte of `<0xNN>`.
fn single_byte(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(hex, 16).ok().filter(|_| is_byte)
}

/// The byte of each character of GPT-2's encoding: printable Latin-1 characters stand for themselves, the other bytes
/// are written as the characters from U+0100 on.
fn byte_characters() -> HashMap<char, u8> {
    let is_printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let printable = (0..=255).filter(is_printable).map(|b| (char::from(b), b));
    let others = (0..=255).filter(|b| !is_printable(b));
    printable.chain(('\u{100}'..).zip(others)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_both_styles() {
        let gpt_2 = ByteStyle::Characters(byte_characters());
        assert_eq!(gpt_2.bytes("Ġthe"), b" the");
        assert_eq!(gpt_2.bytes("Ċ"), b"\n");
        assert_eq!(gpt_2.bytes("Ã©"), "é".as_bytes());
        assert_eq!(gpt_2.bytes("日"), "日".as_bytes());
        let spaces = ByteStyle::Spaces("▁".into());
        assert_eq!(spaces.bytes("▁the"), b" the");
        assert_eq!(spaces.bytes("<0x0A>"), b"\n");
        assert_eq!(spaces.bytes("<0x+A>"), b"<0x+A>");
    }
}
