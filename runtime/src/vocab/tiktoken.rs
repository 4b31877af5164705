//! The ranks of tiktoken: one line per token, its bytes in base64 and its rank.

use std::borrow::Cow;

use super::{Vocabulary, merges};
use crate::error::{Error, Result};

/// The number of ranks of Llama 3. The file does not say how text is split into words, so this tells
/// the family.
const LLAMA3_RANKS: usize = 128_000;

/// Reads the `tokenizer.model` of Llama 3. It lacks the special tokens.
///
/// # Errors
/// [`Error::Invalid`] for other content, [`Error::Unsupported`] for other numbers of ranks.
pub(super) fn parse(bytes: &[u8]) -> Result<Vocabulary> {
    let ranks = ranks(bytes)?;
    if ranks.len() != LLAMA3_RANKS {
        return Err(Error::unsupported(format!(
            "tokenizer.model has {} tokens in tiktoken's form, of which only Llama 3's with \
             {LLAMA3_RANKS} are known; put the model's tokenizer.json beside it",
            ranks.len()
        )));
    }
    vocabulary("llama-bpe", ranks)
}

/// The tokens in order of their ranks.
fn ranks(bytes: &[u8]) -> Result<Vec<Cow<'static, str>>> {
    let wrong = |line: usize| {
        Error::invalid(format!(
            "tokenizer.model is neither a SentencePiece model nor a list of ranks (line {line})"
        ))
    };
    let text = std::str::from_utf8(bytes).map_err(|_| wrong(1))?;
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let parsed = line.split_once(' ').and_then(|(token, rank)| {
            let token = base64::decode(token).ok().filter(|token| !token.is_empty())?;
            (rank.parse() == Ok(tokens.len())).then_some(token)
        });
        let token = parsed.ok_or_else(|| wrong(number + 1))?;
        tokens.push(token.into_iter().map(byte_character).collect());
    }
    Ok(tokens)
}

/// The byte-level BPE of these tokens: the pair whose result has the lowest rank is merged.
fn vocabulary(pre: &str, tokens: Vec<Cow<'static, str>>) -> Result<Vocabulary> {
    let all: Vec<usize> = (0..tokens.len()).collect();
    let merges = merges::from_scores(&tokens, &all, |rank| -(rank as f32))?;
    let merges = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
    Ok(Vocabulary {
        pre: Some(pre.to_owned()),
        merges,
        tokens: tokens.into_iter().map(Cow::into_owned).collect(),
        ..Vocabulary::default()
    })
}

/// GPT-2's printable character for a byte: itself if it is printable, else one from U+0100.
fn byte_character(byte: u8) -> char {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(&byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or_default()
}
