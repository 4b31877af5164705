//! Checks of a vocabulary before anything is built from it.

use std::borrow::Cow;
use std::collections::HashMap;

use super::{TokenKind, Vocabulary, VocabularyKind};
use crate::error::{Error, Result};

/// The longest token in bytes. Real vocabularies stay below 1000. The tries of the tokenizer crate are
/// as deep as the longest token, and dropping them recurses.
pub(crate) const MAX_TOKEN_BYTES: usize = 2048;

/// Texts of tokens that control the model whatever the file says of them. Old GGUF files have no
/// kinds, and some newer ones have wrong ones; llama.cpp corrects the same tokens.
const CONTROL_TEXTS: [&str; 46] = [
    "</s>",
    "<EOT>",
    "<MID>",
    "<PAD>",
    "<PRE>",
    "<REPO>",
    "<SUF>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "<fim-middle>",
    "<fim-pad>",
    "<fim-prefix>",
    "<fim-repo>",
    "<fim-suffix>",
    "<fim_middle>",
    "<fim_pad>",
    "<fim_prefix>",
    "<fim_suffix>",
    "<reponame>",
    "<turn|>",
    "<|call|>",
    "<|calls|>",
    "<|code_middle|>",
    "<|code_prefix|>",
    "<|code_suffix|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|file_sep|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|fim_prefix|>",
    "<|fim_repo|>",
    "<|fim_suffix|>",
    "<|flush|>",
    "<|im_end|>",
    "<|repo_name|>",
    "<|return|>",
    TOOL_RESPONSE,
    "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜fim▁hole｜>",
];

/// Gemma 4 has this control token, and `</s>` is an ordinary tag in its texts.
const TOOL_RESPONSE: &str = "<|tool_response>";

/// Checked tokens: all different, none empty.
pub(super) struct Tokens<'v> {
    /// The text of each token.
    pub texts: Vec<Cow<'v, str>>,
    /// What each token is.
    pub kinds: Vec<TokenKind>,
}

impl Tokens<'_> {
    /// The id of each text.
    pub fn ids(&self) -> HashMap<&str, u32> {
        (0..).zip(&self.texts).map(|(id, text)| (text.as_ref(), id)).collect()
    }

    /// The first token of this kind.
    pub fn first(&self, kind: TokenKind) -> Option<u32> {
        (0..).zip(&self.kinds).find(|(_, k)| **k == kind).map(|(id, _)| id)
    }
}

/// The tokens of `vocabulary`, once its arrays fit each other.
///
/// # Errors
/// [`Error::Invalid`] if they do not.
pub(super) fn tokens(vocabulary: &Vocabulary) -> Result<Tokens<'_>> {
    let count = vocabulary.tokens.len();
    if count == 0 || u32::try_from(count).is_err() {
        return Err(Error::invalid(format!("the vocabulary has {count} tokens")));
    }
    let by_score = match vocabulary.kind {
        VocabularyKind::SentencePieceBpe | VocabularyKind::Unigram => true,
        VocabularyKind::ByteLevelBpe | VocabularyKind::CharacterBpe => false,
    };
    let lengths = [
        ("scores", vocabulary.scores.len(), !by_score),
        ("token types", vocabulary.token_kinds.len(), true),
    ];
    for (what, length, may_lack) in lengths {
        if length != count && !(may_lack && length == 0) {
            return Err(Error::invalid(format!(
                "the vocabulary has {count} tokens, but {length} {what}"
            )));
        }
    }
    if let Some(id) = vocabulary.scores.iter().position(|score| !score.is_finite()) {
        return Err(Error::invalid(format!("the score of token {id} is not a number")));
    }
    for (what, id) in [("unknown", vocabulary.unknown), ("begin", vocabulary.bos)] {
        if let Some(id) = id.filter(|id| *id as usize >= count) {
            return Err(Error::invalid(format!(
                "the {what} token is {id}, but the vocabulary has {count} tokens"
            )));
        }
    }
    let texts = texts(&vocabulary.tokens)?;
    let kinds = kinds(&vocabulary.token_kinds, &texts);
    Ok(Tokens { texts, kinds })
}

/// The tokens, with names for empty ones.
fn texts(tokens: &[String]) -> Result<Vec<Cow<'_, str>>> {
    let mut seen = HashMap::with_capacity(tokens.len());
    let mut texts = Vec::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Error::invalid(format!(
                "token {id} has {} bytes, at most {MAX_TOKEN_BYTES} are possible",
                token.len()
            )));
        }
        let text = match token.as_str() {
            // A slot that nothing produces.
            "" => Cow::Owned(format!("[EMPTY_{id}]")),
            text => Cow::Borrowed(text),
        };
        if let Some(first) = seen.insert(text.clone(), id) {
            return Err(Error::invalid(format!("tokens {first} and {id} are both {text:?}")));
        }
        texts.push(text);
    }
    Ok(texts)
}

/// The kind of each token.
fn kinds(kinds: &[TokenKind], texts: &[Cow<'_, str>]) -> Vec<TokenKind> {
    let has_tag = texts.iter().any(|text| text == TOOL_RESPONSE);
    let controls = |text: &str| CONTROL_TEXTS.contains(&text) && !(has_tag && text == "</s>");
    let mut kinds = kinds.to_vec();
    kinds.resize(texts.len(), TokenKind::Normal);
    for (kind, text) in kinds.iter_mut().zip(texts) {
        if *kind == TokenKind::Normal && controls(text) {
            *kind = TokenKind::Control;
        }
    }
    kinds
}
