//! Text to token ids and back.

mod checked;
mod steps;
#[cfg(test)]
mod tests;

use self::checked::CheckedTokenizer;
use crate::error::{Error, Result};
use crate::token_bytes::ByteStyle;

/// The tokenizer of a model, with its begin and end tokens.
pub struct Tokenizer {
    inner: CheckedTokenizer,
    /// The begin token, if texts of this model start with one.
    pub bos: Option<u32>,
    /// End tokens.
    pub eos: Vec<u32>,
    special: Vec<u32>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Parses the text of a `tokenizer.json`. `vocab_size` is the model's number of embeddings.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `json` is not a tokenizer, exceeds a limit, or has a token id without an embedding.
    pub fn new(json: &str, bos: Option<u32>, eos: Vec<u32>, vocab_size: usize) -> Result<Self> {
        let checked = CheckedTokenizer::new(json)?.without_post_processor();
        let inner = checked.inner();
        let highest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= vocab_size {
            return Err(Error::invalid(format!(
                "tokenizer.json has token id {highest}, the model has {vocab_size} embeddings"
            )));
        }
        let added = inner.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, t)| t.special).map(|(id, _)| id).collect();
        Ok(Self { inner: checked, bos, eos, special, vocab_size })
    }

    /// The ids of `text` without a begin token. Special tokens in the text are recognized.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.inner.encode(text, false)
    }

    /// The ids of a text at the start of a context: the begin token, if the model uses one and the
    /// text does not start with it, then the text.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        // A begin token in the text is not repeated (spec, metadata §2.3).
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The text of `ids` without special tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids)
    }

    /// The written form of a token, such as `<s>`.
    #[must_use]
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.inner().id_to_token(id)
    }

    /// Whether a token is a special token, such as `<s>`.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The id of a token by its written form, such as `<s>`.
    #[must_use]
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.inner().token_to_id(text)
    }

    /// The bytes that each token stands for, by id; empty for ids without a token. A special token has the bytes of
    /// its written form.
    #[must_use]
    pub fn token_bytes(&self) -> Vec<Vec<u8>> {
        let style = ByteStyle::of(self.inner.inner());
        let added = self.inner.inner().get_added_tokens_decoder();
        let bytes = |id: u32| match (added.get(&id), self.inner.inner().id_to_token(id)) {
            (Some(token), _) => token.content.clone().into_bytes(),
            (None, Some(text)) => style.bytes(&text),
            (None, None) => Vec::new(),
        };
        (0..self.vocab_size as u32).map(bytes).collect()
    }

    /// The number of embeddings of the model.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("bos", &self.bos).field("eos", &self.eos).finish()
    }
}

/// The begin token that the post-processor of the tokenizer adds, if it adds one.
///
/// # Errors
/// [`Error::Invalid`] if `json` is not a tokenizer.
pub(crate) fn own_begin_token(json: &str) -> Result<Option<u32>> {
    let tokenizer = CheckedTokenizer::new(json)?;
    let (plain, with_special) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let added = with_special.len() > plain.len() && with_special.get(1) == plain.first();
    Ok(with_special.first().copied().filter(|_| added))
}

/// Decodes tokens incrementally. Bytes of an incomplete character are held back until the character
/// is complete.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// The first token that is decoded again with new ones. Some tokenizers decode the first token of a
    /// text differently, so a few earlier tokens are included.
    context: usize,
    /// The number of tokens whose text has been returned.
    done: usize,
}

impl<'t> TextStream<'t> {
    /// A stream that continues `prompt`.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(8)..].to_vec();
        let done = ids.len();
        Self { tokenizer, ids, context: 0, done }
    }

    /// Appends `id` and returns the text that it completes; empty if it ends inside a character.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.context = self.done.saturating_sub(4).max(self.context);
        self.done = self.ids.len();
        Ok(text)
    }

    /// The rest of the text, with replacement characters for incomplete characters.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.pending()?;
        self.done = self.ids.len();
        Ok(text)
    }

    /// Text of the tokens after `done`.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.done])?;
        let all = self.tokenizer.decode(&self.ids[self.context..])?;
        match all.strip_prefix(&before) {
            Some(new) => Ok(new.to_owned()),
            // The context itself ended inside a character that the new tokens complete.
            None => Ok(all.get(before.len()..).unwrap_or_default().to_owned()),
        }
    }
}
