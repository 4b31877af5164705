//! Splits the text of an answer into reasoning, content and calls of tools.

use super::calls::CallReader;
use super::markers::{Found, Pending};
use super::part::{Part, add};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Where in the answer the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerPhase {
    /// Nothing but white space so far.
    Start,
    /// After `<think>`.
    Reasoning,
    /// After the reasoning.
    Content,
}

/// Splits one answer.
#[derive(Debug)]
pub(crate) struct Splitter {
    phase: AnswerPhase,
    pending: Pending,
    /// White space is dropped before the first text of the phase.
    trim: bool,
    calls: Option<CallReader>,
}

impl Splitter {
    /// For an answer to `prompt`, the rendered text; `calls` reads calls of tools.
    pub fn new(prompt: &str, calls: Option<CallReader>) -> Self {
        // Templates of some reasoning models end with the tag.
        let inside = prompt.trim_end().ends_with(OPEN);
        let phase = if inside { AnswerPhase::Reasoning } else { AnswerPhase::Start };
        Self { phase, pending: Pending::default(), trim: inside, calls }
    }

    /// For an answer that follows a grammar and has no reasoning.
    pub fn without_reasoning(calls: Option<CallReader>) -> Self {
        Self { phase: AnswerPhase::Content, pending: Pending::default(), trim: false, calls }
    }

    /// The parts that `text` completes.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.pending.push(text);
        let mut parts = Vec::new();
        if self.phase == AnswerPhase::Start {
            self.start();
        }
        if self.phase == AnswerPhase::Reasoning {
            self.reason(&mut parts);
        }
        if self.phase == AnswerPhase::Content {
            self.content(&mut parts);
        }
        parts
    }

    /// The rest, when the answer is complete.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = self.pending.take();
        let mut parts = Vec::new();
        match (self.phase, &mut self.calls) {
            (AnswerPhase::Reasoning, _) => {
                add(&mut parts, Part::Reasoning(rest.trim_end().to_owned()))
            }
            (_, Some(calls)) => {
                parts.extend(calls.push(&rest));
                parts.extend(calls.finish());
            }
            (_, None) => add(&mut parts, Part::Content(rest)),
        }
        parts
    }

    /// Decides whether the answer begins with reasoning.
    fn start(&mut self) {
        let text = self.pending.text().trim_start();
        if text.starts_with(OPEN) {
            let _ = self.pending.until(&[OPEN]);
            (self.phase, self.trim) = (AnswerPhase::Reasoning, true);
        } else if !OPEN.starts_with(text) {
            self.phase = AnswerPhase::Content;
        }
    }

    fn reason(&mut self, parts: &mut Vec<Part>) {
        self.trim_once();
        match self.pending.until(&[CLOSE]) {
            Found::Marker(before, _) => {
                add(parts, Part::Reasoning(before.trim_end().to_owned()));
                (self.phase, self.trim) = (AnswerPhase::Content, true);
            }
            Found::Text(text) => {
                // White space at the end may be the last of the reasoning, which is not shown.
                let shown = text.trim_end();
                let rest = text[shown.len()..].to_owned() + &self.pending.take();
                self.pending.push(&rest);
                add(parts, Part::Reasoning(shown.to_owned()));
            }
        }
    }

    fn content(&mut self, parts: &mut Vec<Part>) {
        self.trim_once();
        let text = self.pending.take();
        match &mut self.calls {
            Some(calls) => parts.extend(calls.push(&text)),
            None => add(parts, Part::Content(text)),
        }
    }

    fn trim_once(&mut self) {
        if self.trim {
            self.pending.trim_start();
            self.trim = self.pending.text().is_empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reasoning and the content of an answer, sent in pieces of every size.
    fn split(prompt: &str, answer: &str) -> (String, String) {
        let all = |size: usize| {
            let mut splitter = Splitter::new(prompt, None);
            let characters: Vec<char> = answer.chars().collect();
            let mut parts = Vec::new();
            for piece in characters.chunks(size) {
                parts.extend(splitter.push(&piece.iter().collect::<String>()));
            }
            parts.extend(splitter.finish());
            let (mut reasoning, mut content) = (String::new(), String::new());
            for part in parts {
                match part {
                    Part::Reasoning(text) => reasoning.push_str(&text),
                    Part::Content(text) => content.push_str(&text),
                    Part::Call(_) => panic!("no tools"),
                }
            }
            (reasoning, content)
        };
        let first = all(1);
        (2..=answer.len().max(2)).for_each(|size| assert_eq!(all(size), first, "{size}"));
        first
    }

    #[test]
    fn reasoning_is_kept_apart() {
        let of = |r: &str, c: &str| (r.to_owned(), c.to_owned());
        assert_eq!(
            split("", "<think>\nhm  so\n</think>\n\nYes </think>"),
            of("hm  so", "Yes </think>")
        );
        assert_eq!(split("…<think>\n", "hm</think>Yes"), of("hm", "Yes"));
        assert_eq!(split("", "<think>hm"), of("hm", ""));
        assert_eq!(split("", "a <think> b"), of("", "a <think> b"));
        assert_eq!(split("", " <thin"), of("", " <thin"));
        assert_eq!(split("", "<think></think>x"), of("", "x"));
        assert_eq!(split("", ""), of("", ""));
    }
}
