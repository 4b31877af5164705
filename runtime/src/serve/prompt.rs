//! Prompts and inputs: texts or token ids, one or several.

use serde::Deserialize;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::tokenizer::Tokenizer;

/// A text, token ids, or several of one kind.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids, or an array of such arrays"
)]
pub(crate) enum Prompts {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// The token ids of one text.
    Tokens(Vec<u32>),
    /// The token ids of several texts.
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    /// The token ids of each prompt. A begin token is added to texts if the model uses one.
    ///
    /// # Errors
    /// 400 that names `field` for empty prompts and unknown tokens.
    pub fn tokens(&self, field: &str, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| {
            tokenizer.encode_prompt(text).map_err(|e| ApiError::from(e).with_param(field))
        };
        let all = match self {
            Self::Text(text) => vec![encode(text)?],
            Self::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
            Self::Tokens(ids) => vec![ids.clone()],
            Self::TokenLists(lists) => lists.clone(),
        };
        if all.is_empty() || all.iter().any(Vec::is_empty) {
            return Err(ApiError::field(field, format!("`{field}` is empty")));
        }
        let vocabulary = tokenizer.vocab_size();
        match all.iter().flatten().find(|id| **id as usize >= vocabulary) {
            Some(id) => {
                let message =
                    format!("`{field}` has the token {id}, but the model has {vocabulary} tokens");
                Err(ApiError::field(field, message))
            }
            None => Ok(all),
        }
    }

    /// The prompts, if they are texts.
    pub fn texts(&self) -> Option<Vec<String>> {
        match self {
            Self::Text(text) => Some(vec![text.clone()]),
            Self::Texts(texts) => Some(texts.clone()),
            Self::Tokens(_) | Self::TokenLists(_) => None,
        }
    }
}
