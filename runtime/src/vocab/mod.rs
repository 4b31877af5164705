//! Vocabularies that are not a `tokenizer.json`: those of GGUF files, SentencePiece models and pairs
//! of `vocab.json` and `merges.txt`. [`tokenizer_json`] turns each into the text of a
//! `tokenizer.json`.

mod charsmap;
mod check;
mod folder;
mod json;
mod merges;
mod pre_tokenizer;
mod sentencepiece;
mod tiktoken;

use crate::error::{Error, Result};

pub(crate) use charsmap::longest_replacement;
pub(crate) use check::MAX_TOKEN_BYTES;
pub use folder::from_folder;

/// A vocabulary with the rules that split text into its tokens. The fields are those of
/// `tokenizer.ggml.*` in a GGUF file; the index of a token is its id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// The algorithm.
    pub kind: VocabularyKind,
    /// The name of the pre-tokenizer (`tokenizer.ggml.pre`). Only byte-level BPE uses it; `None` is
    /// `default`.
    pub pre: Option<String>,
    /// The tokens. Byte-level BPE writes bytes as GPT-2's printable characters; the other kinds write a
    /// space as `▁`, but not in user-defined and control tokens.
    pub tokens: Vec<String>,
    /// One score per token: the higher, the earlier it is merged (SentencePiece BPE), or the logarithm
    /// of its probability (unigram). The other kinds have none and ignore them.
    pub scores: Vec<f32>,
    /// What each token is; empty if all are normal.
    pub token_kinds: Vec<TokenKind>,
    /// Merges in their order, each two tokens with a space between them. SentencePiece kinds derive
    /// theirs from the scores.
    pub merges: Vec<String>,
    /// Whether a space is put before a text and after a special token (SentencePiece only). A GGUF file
    /// that does not say means `true`.
    pub add_space_prefix: bool,
    /// Whether spaces at both ends and repeated spaces are removed (SentencePiece only). A GGUF file
    /// that does not say means `false`.
    pub remove_extra_whitespaces: bool,
    /// SentencePiece's rules of normalization in their binary form; empty for none.
    pub charsmap: Vec<u8>,
    /// Whether white space after a special token is dropped. Phi-3 needs it; GGUF files do not say, so
    /// llama.cpp tells by `general.name`, which contains `phi-3` or `phi3` in any case.
    pub strip_after_special: bool,
    /// The token of characters that the vocabulary lacks; `None` for the first token of kind
    /// [`TokenKind::Unknown`], if there is one.
    pub unknown: Option<u32>,
    /// The begin token; `None` for the usual one: 1 for SentencePiece BPE, else none.
    pub bos: Option<u32>,
    /// Whether texts start with the begin token; `None` for what is usual: they do for SentencePiece
    /// BPE and for the pre-tokenizers of Llama 3 and Tekken.
    pub add_bos: Option<bool>,
}

/// The algorithm that splits text into tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VocabularyKind {
    /// BPE over bytes, with a pre-tokenizer and a list of merges (GPT-2, Llama 3, Qwen).
    #[default]
    ByteLevelBpe,
    /// BPE over characters with a list of merges; `▁` is a space and bytes are the fallback (Gemma 4).
    CharacterBpe,
    /// SentencePiece BPE: the pair whose concatenation has the highest score is merged (Llama 2, Gemma).
    SentencePieceBpe,
    /// SentencePiece unigram: the most probable sequence of tokens.
    Unigram,
}

impl VocabularyKind {
    /// The kind that `tokenizer.ggml.model` of a GGUF file names.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other names.
    pub fn from_gguf(model: &str) -> Result<Self> {
        match model {
            "gpt2" => Ok(Self::ByteLevelBpe),
            "gemma4" => Ok(Self::CharacterBpe),
            "llama" => Ok(Self::SentencePieceBpe),
            "t5" => Ok(Self::Unigram),
            other => Err(Error::unsupported(format!(
                "tokenizer model {other:?} is not supported, only gpt2, gemma4, llama and t5; use \
                 the model's Hugging Face folder with tokenizer.json"
            ))),
        }
    }
}

/// What a token is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    #[default]
    Normal,
    /// Stands for what is not in the vocabulary.
    Unknown,
    /// Controls the model, such as `<s>`; not part of the text.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// Never used.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// The kind with this number in `tokenizer.ggml.token_type` and in SentencePiece models. Other
    /// numbers are normal tokens.
    #[must_use]
    pub fn from_number(number: i64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// The text of the `tokenizer.json` that gives the ids of `vocabulary`.
///
/// # Errors
/// [`Error::Invalid`] for arrays that do not fit each other, repeated tokens, merges of unknown tokens
/// and tokens of more than 2048 bytes; [`Error::Unsupported`] for an unknown pre-tokenizer.
pub fn tokenizer_json(vocabulary: &Vocabulary) -> Result<String> {
    let tokens = check::tokens(vocabulary)?;
    json::write(vocabulary, &tokens)
}

#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod tests;
