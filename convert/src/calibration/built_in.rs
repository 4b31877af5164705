//! The text that is part of the program. See `data/README.md`.

use std::io::Read;
use std::sync::LazyLock;

use flate2::read::DeflateDecoder;

use super::document::{Document, Line, split_text};

/// The line before each document of a text file.
const SEPARATOR: &str = "<|document|>\n";

macro_rules! compressed {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".deflate"))
    };
}

/// The text files, compressed.
const TEXTS: [&[u8]; 6] = [
    compressed!("web.txt"),
    compressed!("reference.txt"),
    compressed!("code.txt"),
    compressed!("lists.txt"),
    compressed!("languages.txt"),
    compressed!("books.txt"),
];
/// The chats, compressed.
const CHATS: &[u8] = compressed!("chats.jsonl");

/// The text, decompressed when it is first needed.
struct BuiltIn {
    texts: Vec<String>,
    chats: Vec<Line>,
    /// The SHA-256 of all files, concatenated.
    hash: String,
}

static BUILT_IN: LazyLock<BuiltIn> = LazyLock::new(|| {
    let texts: Vec<String> = TEXTS.iter().map(|bytes| decompress(bytes)).collect();
    let chats = decompress(CHATS);
    let hash = crate::digest::digest(texts.concat() + &chats);
    // A test makes sure that all of it can be read.
    let chats = Line::parse(&chats, "chats.jsonl").unwrap_or_default();
    BuiltIn { texts, chats, hash }
});

fn decompress(bytes: &[u8]) -> String {
    let mut text = String::new();
    // A test makes sure that all of it can be read.
    let _ = DeflateDecoder::new(bytes).read_to_string(&mut text);
    text
}

/// The documents of each kind.
pub(super) fn kinds() -> Vec<Vec<Document<'static>>> {
    let BuiltIn { texts, chats, .. } = &*BUILT_IN;
    let chats = chats.iter().map(Line::document).collect();
    let texts = texts.iter().map(|text| split_text(text, Some(SEPARATOR)));
    std::iter::once(chats).chain(texts).collect()
}

/// The SHA-256 of the text.
pub(super) fn hash() -> &'static str {
    &BUILT_IN.hash
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use stb_runtime::Message;

    use super::*;

    /// Every document is readable text, none is there twice, and chats are conversations.
    #[test]
    fn the_text_is_clean() {
        let kinds = kinds();
        assert_eq!(kinds.len(), TEXTS.len() + 1);
        let mut paragraphs = HashSet::new();
        for documents in &kinds {
            let size: usize = documents.iter().map(Document::size).sum();
            assert!(documents.len() >= 30 && size > 10_000, "{} documents", documents.len());
            for document in documents {
                assert!(document.size() > 5, "{document:?}");
                let texts = match document {
                    Document::Text { text, .. } => vec![*text],
                    Document::Chat(messages) => {
                        assert_conversation(messages);
                        messages.iter().map(|m| m.content.as_str()).collect()
                    }
                    Document::Tokens(_) => panic!("tokens in the built-in text"),
                };
                for text in texts {
                    let bad = |c: &char| c.is_control() && !matches!(c, '\n' | '\t');
                    assert_eq!(text.chars().find(bad), None, "{text}");
                    assert!(!text.contains("<|") && !text.contains('\u{fffd}'), "{text}");
                    let long = text.split("\n\n").filter(|p| p.len() > 80);
                    long.for_each(|p| assert!(paragraphs.insert(p), "twice: {p}"));
                }
            }
        }
    }

    /// Users and assistants take turns, after a system message if there is one.
    fn assert_conversation(messages: &[Message]) {
        let turns = match messages {
            [first, rest @ ..] if first.role == "system" => rest,
            all => all,
        };
        assert!(turns.len() >= 2, "{messages:?}");
        for (i, turn) in turns.iter().enumerate() {
            assert_eq!(turn.role, ["user", "assistant"][i % 2], "{messages:?}");
            assert!(!turn.content.trim().is_empty(), "{messages:?}");
        }
    }
}
