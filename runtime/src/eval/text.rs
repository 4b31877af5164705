//! [`TextLayout`]: tokenizes an evaluation text.

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use rayon::prelude::*;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The largest text.
const MOST_BYTES: u64 = 2 << 30;
/// The first bytes of a gzip file.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// The text of a file, decompressed if it is a gzip file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::Invalid`] if it is not UTF-8 text, is damaged or has more than 2 GiB.
pub fn read_text(path: &Path) -> Result<String> {
    let invalid = |what: &str| Error::invalid(format!("{} {what}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let bytes = match bytes.starts_with(&GZIP) {
        false => bytes,
        true => {
            let mut text = Vec::new();
            MultiGzDecoder::new(&bytes[..])
                .take(MOST_BYTES + 1)
                .read_to_end(&mut text)
                .map_err(|e| invalid(&format!("is no valid gzip file: {e}")))?;
            text
        }
    };
    if bytes.len() as u64 > MOST_BYTES {
        return Err(invalid("has more than 2 GiB of text: use a part of it"));
    }
    String::from_utf8(bytes).map_err(|_| invalid("is not UTF-8 text"))
}

/// Whether a file has one JSON object per line by its name, `.jsonl` or `.jsonl.gz`.
#[must_use]
pub fn is_json_lines(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    name.strip_suffix(".gz").unwrap_or(&name).ends_with(".jsonl")
}

/// A line with a text.
#[derive(Deserialize)]
struct TextLine {
    text: String,
}

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
    /// A JSON object per line, whose field `text` is a document that starts with the begin token.
    JsonLines,
}

impl TextLayout {
    /// The layout by the options of an evaluation and the name of the file, if the text comes from one: a `.jsonl` file
    /// has a document per line.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that exclude each other.
    pub fn of(file: Option<&Path>, separator: Option<&str>, rows: bool) -> Result<Self> {
        let is_json = file.is_some_and(is_json_lines);
        match (separator, rows) {
            (Some(_), true) => Err(Error::usage("give a separator or rows, not both")),
            (Some(_), _) | (_, true) if is_json => Err(Error::usage(
                "a .jsonl file has a document per line: leave out --rows and --separator",
            )),
            (Some(separator), false) => Ok(Self::Documents(separator.to_owned())),
            (None, true) => Ok(Self::Rows),
            (None, false) if is_json => Ok(Self::JsonLines),
            (None, false) => Ok(Self::Whole),
        }
    }

    /// All tokens of `text`.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::encode_prompt`]; [`Error::Invalid`] for a line without a text.
    pub fn tokenize(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Whole => tokenizer.encode_prompt(text),
            Self::Rows => tokenizer.encode_prompt(&join_rows(text)),
            Self::Documents(separator) if separator.is_empty() => tokenizer.encode_prompt(text),
            Self::Documents(separator) => {
                let documents: Vec<&str> =
                    text.split(separator).map(str::trim).filter(|d| !d.is_empty()).collect();
                encode_all(tokenizer, &documents)
            }
            Self::JsonLines => encode_all(tokenizer, &json_lines(text)?),
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
            Self::JsonLines => "lines of JSON, each text after a begin token".into(),
            _ => "one document".into(),
        }
    }
}

/// The tokens of documents, one after the other.
fn encode_all(tokenizer: &Tokenizer, documents: &[impl AsRef<str> + Sync]) -> Result<Vec<u32>> {
    let encode = |document: &_| tokenizer.encode_prompt(AsRef::as_ref(document));
    let ids: Vec<Vec<u32>> = documents.par_iter().map(encode).collect::<Result<_>>()?;
    Ok(ids.concat())
}

/// The texts of lines of JSON; empty ones are left out.
fn json_lines(text: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let TextLine { text } = serde_json::from_str(line).map_err(|e| {
            Error::invalid(format!("line {} of the text has no field \"text\": {e}", i + 1))
        })?;
        if !text.is_empty() {
            texts.push(text);
        }
    }
    Ok(texts)
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
    use super::{TextLayout, is_json_lines, join_rows, json_lines, read_text};

    #[test]
    fn lines_of_json_have_a_text() {
        let texts =
            json_lines("{\"text\": \"a\\nb\", \"id\": 1}\n\n{\"text\": \"\"}\n{\"text\": \"c\"}\n");
        assert_eq!(texts.unwrap(), ["a\nb", "c"]);
        let error = json_lines("{\"text\": \"a\"}\n{\"txt\": \"b\"}").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(json_lines("[").is_err());
        assert!(is_json_lines("a/b.jsonl".as_ref()) && is_json_lines("B.JSONL.GZ".as_ref()));
        assert!(!is_json_lines("a.json".as_ref()) && !is_json_lines("jsonl".as_ref()));
    }

    #[test]
    fn the_layout_follows_from_options_and_name() {
        let of = |file: &str, separator, rows| TextLayout::of(Some(file.as_ref()), separator, rows);
        assert_eq!(of("a.txt", None, false).unwrap(), TextLayout::Whole);
        assert_eq!(of("a.jsonl", None, false).unwrap(), TextLayout::JsonLines);
        assert_eq!(TextLayout::of(None, None, true).unwrap(), TextLayout::Rows);
        assert_eq!(of("a", Some("x"), false).unwrap(), TextLayout::Documents("x".into()));
        assert!(of("a", Some("x"), true).is_err());
        assert!(of("a.jsonl", Some("x"), false).is_err() && of("a.jsonl", None, true).is_err());
    }

    #[test]
    fn gzip_files_are_decompressed() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all("Größe".as_bytes()).unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(read_text(&file).unwrap(), "Größe");
        std::fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
        assert!(read_text(&file).unwrap_err().to_string().contains("gzip"));
        std::fs::write(&file, [0xff]).unwrap();
        assert!(read_text(&file).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn rows_match_the_data_set() {
        assert_eq!(join_rows(" \n = A = \n \nText .\n"), "\n\n = A = \n\n\n\n\nText .\n");
        assert_eq!(join_rows(""), "");
        assert_eq!(join_rows("no newline at the end"), "no newline at the end\n");
    }
}
