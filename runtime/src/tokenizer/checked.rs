//! The tokenizer of the crate `tokenizers`, which trusts its file: some files make it panic, others make it take any
//! amount of memory. A `tokenizer.json` may come from anyone, so it is checked first, and a panic is an error.

use tokenizers::{ModelWrapper, Tokenizer};

use super::steps;
use crate::error::{Error, Result};
use crate::panics;

/// Texts that every tokenizer encodes: it is better to refuse a broken file than the first prompt.
const PROBES: [&str; 4] =
    ["", " ", "a", "Hello, world! 123\r\n\n  \u{e9}\u{301} \u{4e2d}\u{6587} \u{1f600}\u{0}"];

/// A tokenizer whose file has been checked.
pub(super) struct CheckedTokenizer {
    inner: Tokenizer,
}

impl CheckedTokenizer {
    /// Parses the text of a `tokenizer.json`. Settings that would change what was asked for are dropped: padding,
    /// truncation, the dropout of merges.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `json` is not a tokenizer, exceeds the limits of [`steps::check`], or makes the crate panic on a
    /// short text.
    pub fn new(json: &str) -> Result<Self> {
        steps::check(json)?;
        let mut inner =
            caught("the file", || Tokenizer::from_bytes(json.as_bytes()))?.map_err(failed)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(failed)?;
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        let tokenizer = Self { inner };
        for probe in PROBES {
            // A text that a vocabulary has no tokens for is an error of the text.
            if let Ok(ids) = tokenizer.try_encode(probe, true)? {
                let _ = tokenizer.try_decode(&ids)?;
            }
        }
        Ok(tokenizer)
    }

    /// Drops the post-processor: it adds tokens, and can repeat the text.
    pub fn without_post_processor(mut self) -> Self {
        self.inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        self
    }

    /// The ids of `text`; `special` asks for the tokens that a post-processor adds.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.try_encode(text, special)?.map_err(failed)
    }

    /// The text of `ids` without special tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.try_decode(ids)?.map_err(failed)
    }

    fn try_encode(&self, text: &str, special: bool) -> Result<tokenizers::Result<Vec<u32>>> {
        let encoding = caught("a text", || self.inner.encode(text, special))?;
        Ok(encoding.map(|encoding| encoding.get_ids().to_vec()))
    }

    fn try_decode(&self, ids: &[u32]) -> Result<tokenizers::Result<String>> {
        caught("its tokens", || self.inner.decode(ids, true))
    }

    /// For reading the vocabulary.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }
}

/// Calls the crate. Its panics are errors of the file.
fn caught<T>(what: &str, call: impl FnOnce() -> T) -> Result<T> {
    panics::catch(call).map_err(|panic| {
        Error::invalid(format!(
            "tokenizer.json is damaged: it cannot process {what} ({panic}). Take the file from the publisher of the model"
        ))
    })
}

fn failed(error: tokenizers::Error) -> Error {
    Error::invalid(format!("tokenizer.json: {error}"))
}
