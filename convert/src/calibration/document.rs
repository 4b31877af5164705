//! Documents of a calibration text, and their tokens.

use serde::Deserialize;
use stb_runtime::{ChatTemplate, Error, Message, Model, Result, Tokenizer};

/// A piece of a calibration text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Document<'a> {
    /// A text, or a part of one.
    Text {
        text: &'a str,
        /// Whether the text begins here.
        begins: bool,
        /// Whether it ends here.
        ends: bool,
    },
    /// A conversation.
    Chat(&'a [Message]),
    /// A text as tokens of the model that wrote it.
    Tokens(&'a [u32]),
}

impl<'a> Document<'a> {
    /// A whole text.
    pub(super) fn text(text: &'a str) -> Self {
        Self::Text { text, begins: true, ends: true }
    }

    /// Its size in bytes of text, or in tokens if there is no text.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Text { text, .. } => text.len(),
            Self::Chat(messages) => messages.iter().map(|m| m.content.len()).sum(),
            Self::Tokens(tokens) => tokens.len(),
        }
    }

    /// Splits a text after about `at` bytes, at the end of a line or else of a word. `None` if it cannot be split there.
    pub(super) fn split(self, at: usize) -> Option<(Self, Self)> {
        let Self::Text { text, begins, ends } = self else { return None };
        let at = text.floor_char_boundary(at);
        let head = &text[..at];
        let recent = text.floor_char_boundary(at.saturating_sub(at / 8));
        let line = head[recent..].rfind('\n').map(|i| recent + i + 1);
        let word = || head.rfind(' ').filter(|i| *i > 0);
        let at = line.or_else(word).unwrap_or(at);
        if at == 0 || at == text.len() {
            return None;
        }
        let (head, tail) = text.split_at(at);
        Some((
            Self::Text { text: head, begins, ends: false },
            Self::Text { text: tail, begins: false, ends },
        ))
    }
}

/// The documents of `text`, which are trimmed; empty ones are left out. One document without a separator.
pub(super) fn split_text<'a>(text: &'a str, separator: Option<&str>) -> Vec<Document<'a>> {
    match separator.filter(|s| !s.is_empty()) {
        None => vec![Document::text(text)],
        Some(separator) => {
            let parts = text.split(separator).map(str::trim).filter(|d| !d.is_empty());
            parts.map(Document::text).collect()
        }
    }
}

/// A line of a `.jsonl` file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Line {
    /// `[{"role": …, "content": …}, …]`
    Chat(Vec<Message>),
    /// `{"messages": [{"role": …, "content": …}, …]}`
    Messages { messages: Vec<Message> },
    /// `{"text": …}`
    Text { text: String },
}

impl Line {
    /// Parses the lines of the `.jsonl` file `name`; empty lines are skipped.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the number of a line that is neither a chat nor a text.
    pub(super) fn parse(text: &str, name: &str) -> Result<Vec<Self>> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(i, line)| {
                serde_json::from_str(line).map_err(|_| {
                    Error::invalid(format!(
                        "line {} of {name} is no calibration document: use \
                         [{{\"role\": \"user\", \"content\": \"…\"}}, …], {{\"messages\": […]}} or {{\"text\": \"…\"}}",
                        i + 1
                    ))
                })
            })
            .collect()
    }

    pub(super) fn document(&self) -> Document<'_> {
        match self {
            Self::Chat(messages) | Self::Messages { messages } => Document::Chat(messages),
            Self::Text { text } => Document::text(text),
        }
    }
}

/// Encodes documents for a model.
pub(crate) struct DocumentEncoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// A paragraph break between documents where no begin token separates them.
    separator: Vec<u32>,
}

impl DocumentEncoder {
    /// The encoder of `model`. Chats are plain text if its chat template is missing or does not compile.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer is missing or broken.
    pub(crate) fn new(model: &Model) -> Result<Self> {
        let tokenizer = model.tokenizer()?;
        let template = model.chat_template(&tokenizer).ok().flatten();
        let template = template.map(ChatTemplate::at_fixed_date);
        let separator = match tokenizer.bos {
            Some(_) => Vec::new(),
            None => tokenizer.encode("\n\n").unwrap_or_default(),
        };
        Ok(Self { tokenizer, template, separator })
    }

    /// The tokens of a document. One that begins has the begin token that the tokenizer adds.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub(super) fn encode(&self, document: Document<'_>) -> Result<Vec<u32>> {
        match document {
            Document::Text { text, begins: true, .. } => self.tokenizer.encode_prompt(text),
            Document::Text { text, begins: false, .. } => self.tokenizer.encode(text),
            Document::Chat(messages) => {
                let text = self.rendered(messages, true).unwrap_or_else(|| plain(messages));
                self.tokenizer.encode_prompt(&text)
            }
            Document::Tokens(tokens) => Ok(tokens.to_vec()),
        }
    }

    /// Like [`Self::encode`], with a paragraph break after a text that ends, unless a begin token separates documents.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub(super) fn encode_separated(&self, document: Document<'_>) -> Result<Vec<u32>> {
        let mut tokens = self.encode(document)?;
        if matches!(document, Document::Text { ends: true, .. } | Document::Chat(_)) {
            tokens.extend_from_slice(&self.separator);
        }
        Ok(tokens)
    }

    /// The tokens with which the model is to continue: the first `words` tokens of a text, or a chat up to its first
    /// question and the start of the answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub(super) fn opening(&self, document: Document<'_>, words: usize) -> Result<Vec<u32>> {
        let Document::Chat(messages) = document else {
            let mut tokens = self.encode(document)?;
            tokens.truncate(words + usize::from(self.tokenizer.bos.is_some()));
            return Ok(tokens);
        };
        let turns = messages.iter().position(|m| m.role == "user").map_or(0, |i| i + 1);
        let question = &messages[..turns];
        let text = self
            .rendered(question, false)
            .unwrap_or_else(|| format!("{}\n\nAssistant:", plain(question)));
        self.tokenizer.encode_prompt(&text)
    }

    /// Whether a text of the model ends with `token`.
    pub(crate) fn is_end(&self, token: u32) -> bool {
        self.tokenizer.eos.contains(&token)
    }

    /// A chat in the model's own format; `None` if the model has no template, or one that refuses the chat.
    fn rendered(&self, messages: &[Message], finished: bool) -> Option<String> {
        let template = self.template.as_ref()?;
        let text = match finished {
            true => template.render_finished(messages),
            false => template.render(messages),
        };
        text.ok().filter(|text| !text.is_empty())
    }
}

/// A chat as plain text.
fn plain(messages: &[Message]) -> String {
    let turn = |m: &Message| match m.role.as_str() {
        "user" => format!("User: {}", m.content),
        "assistant" => format!("Assistant: {}", m.content),
        _ => m.content.clone(),
    };
    messages.iter().map(turn).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chats_or_texts() {
        let text =
            "[{\"role\":\"user\",\"content\":\"Hi\"}]\n\n{\"messages\":[]}\n{\"text\":\"a\\nb\"}\n";
        let lines = Line::parse(text, "x.jsonl").unwrap();
        let hi = [Message::new("user", "Hi")];
        let documents: Vec<Document<'_>> = lines.iter().map(Line::document).collect();
        let expected = [Document::Chat(&hi), Document::Chat(&[]), Document::text("a\nb")];
        assert_eq!(documents, expected);
        for broken in ["{\"text\":\"a\"}\nplain", "{}\n{\"prompt\":\"a\"}"] {
            let error = Line::parse(broken, "x.jsonl").unwrap_err().to_string();
            assert!(error.contains("line") && error.contains("x.jsonl"), "{error}");
        }
    }

    #[test]
    fn texts_are_split_between_lines_or_words() {
        let halves = |text: &'static str, at| {
            Document::text(text).split(at).map(|(a, b)| match (a, b) {
                (Document::Text { text: a, .. }, Document::Text { text: b, .. }) => (a, b),
                _ => panic!("not texts"),
            })
        };
        assert_eq!(halves("one two three", 9), Some(("one two", " three")));
        assert_eq!(
            halves("twenty letters here\nand more", 21),
            Some(("twenty letters here\n", "and more"))
        );
        assert_eq!(halves("ééé", 3), Some(("é", "éé")));
        assert_eq!(halves("word", 0), None);
        assert_eq!(Document::Chat(&[]).split(1), None);
    }

    #[test]
    fn chats_without_a_template_are_plain_text() {
        let turns = ["system", "user", "assistant"].map(|role| Message::new(role, role));
        assert_eq!(plain(&turns), "system\n\nUser: user\n\nAssistant: assistant");
    }
}
