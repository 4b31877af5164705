//! [`TextLayout`]: tokenizes an evaluation text.

use rayon::prelude::*;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// The layout of an evaluation text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TextLayout {
    /// One document: a begin token, if the model uses one, then the whole text.
    #[default]
    Whole,
    /// Documents separated by this text. Each document is trimmed and starts with the begin token.
    /// Empty documents are skipped.
    Documents(String),
    /// One row of a data set per line, as in `wiki.test.raw`. Rows are joined by two newlines into one
    /// document, and a blank line is an empty row, as in the evaluations of GPTQ and STBLLM.
    Rows,
}

impl TextLayout {
    /// All tokens of `text`.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::encode_prompt`].
    pub fn tokenize(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Whole => tokenizer.encode_prompt(text),
            Self::Rows => tokenizer.encode_prompt(&join_rows(text)),
            Self::Documents(separator) if separator.is_empty() => tokenizer.encode_prompt(text),
            Self::Documents(separator) => {
                let documents: Vec<&str> =
                    text.split(separator).map(str::trim).filter(|d| !d.is_empty()).collect();
                let ids: Vec<Vec<u32>> = documents
                    .par_iter()
                    .map(|d| tokenizer.encode_prompt(d))
                    .collect::<Result<_>>()?;
                Ok(ids.concat())
            }
        }
    }

    /// A short description for reports.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Documents(s) if !s.is_empty() => {
                format!("documents split at {s:?}, each after a begin token")
            }
            Self::Rows => "lines as rows, joined by two newlines".into(),
            _ => "one document".into(),
        }
    }
}

/// The rows of the Hugging Face data set, joined by two newlines. A row is a line with its newline, or
/// empty for a blank line.
fn join_rows(text: &str) -> String {
    let mut lines: Vec<&str> = text.split('\n').collect();
    if lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    let row = |line: &str| if line.trim().is_empty() { String::new() } else { format!("{line}\n") };
    lines.into_iter().map(row).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::join_rows;

    #[test]
    fn rows_match_the_data_set() {
        assert_eq!(join_rows(" \n = A = \n \nText .\n"), "\n\n = A = \n\n\n\n\nText .\n");
        assert_eq!(join_rows(""), "");
        assert_eq!(join_rows("no newline at the end"), "no newline at the end\n");
    }
}
