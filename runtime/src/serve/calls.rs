//! Reads calls of tools in the formats that models write.

use serde_json::Value;

use super::markers::{Found, Pending};
use super::part::{Part, ToolCall};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Begins the calls of Llama 3, if it does not answer with the bare object.
const PYTHON_TAG: &str = "<|python_tag|>";
/// Begins the calls of Mistral's models.
const TOOL_CALLS: &str = "[TOOL_CALLS]";
/// Between the name and the arguments in newer ones.
const ARGS: &str = "[ARGS]";

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallFormat {
    /// Hermes and Qwen: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
    Hermes,
    /// Llama 3: `{"name": …, "parameters": …}`, also after `<|python_tag|>`.
    Llama3,
    /// Mistral: `[TOOL_CALLS][{"name": …, "arguments": …}]`, or `[TOOL_CALLS]name[ARGS]{…}`.
    Mistral,
}

impl CallFormat {
    /// The format by a chat template, of which `mentions` says whether it contains a text.
    pub fn of(mentions: impl Fn(&str) -> bool) -> Self {
        if mentions(TOOL_CALLS) {
            Self::Mistral
        } else if mentions(PYTHON_TAG) || (mentions("ipython") && !mentions(OPEN)) {
            Self::Llama3
        } else {
            Self::Hermes
        }
    }

    /// Marker texts that are special tokens in the vocabularies of some models. They do not end an answer.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[OPEN, CLOSE],
            Self::Llama3 => &[PYTHON_TAG],
            Self::Mistral => &[TOOL_CALLS, ARGS],
        }
    }

    /// The name of the arguments in the object of a call.
    pub fn arguments_key(self) -> &'static str {
        if self == Self::Llama3 { "parameters" } else { "arguments" }
    }

    /// What stands before and after the object of a call that a grammar forces.
    pub fn around(self) -> (&'static str, &'static str) {
        match self {
            Self::Hermes => ("<tool_call>\n", "\n</tool_call>"),
            Self::Llama3 | Self::Mistral => ("", ""),
        }
    }
}

/// Reads the calls in one answer. What looks like a call and is none becomes content.
#[derive(Debug)]
pub(crate) struct CallReader {
    format: CallFormat,
    /// The tools that the client offers.
    names: Vec<String>,
    pending: Pending,
    phase: CallPhase,
    /// Whether the last part was a call: white space after it is dropped.
    after_call: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallPhase {
    /// It is open whether the answer begins with a bare object.
    Start,
    Text,
    /// After a marker, or in an answer that begins with an object.
    Call,
}

impl CallReader {
    /// For an answer of a model that writes calls in this format, of the tools `names`.
    pub fn new(format: CallFormat, names: Vec<String>) -> Self {
        let phase = if format == CallFormat::Hermes { CallPhase::Text } else { CallPhase::Start };
        Self { format, names, pending: Pending::default(), phase, after_call: false }
    }

    /// The parts that `text` completes.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.pending.push(text);
        let mut parts = Vec::new();
        if self.phase == CallPhase::Start {
            self.start();
        }
        while self.phase != CallPhase::Start {
            let marker = match (self.phase, self.format) {
                (CallPhase::Call, CallFormat::Hermes) => CLOSE,
                // The calls end with the answer.
                (CallPhase::Call, _) => break,
                (_, format) => format.markers()[0],
            };
            match self.pending.until(&[marker]) {
                Found::Marker(before, _) if self.phase == CallPhase::Text => {
                    self.text(&mut parts, before.trim_end().to_owned());
                    self.phase = CallPhase::Call;
                }
                Found::Marker(call, _) => {
                    self.phase = CallPhase::Text;
                    self.calls(&mut parts, &call);
                }
                Found::Text(text) if self.phase == CallPhase::Text => {
                    // White space before a call is not shown.
                    let shown = text.trim_end();
                    let rest = text[shown.len()..].to_owned() + &self.pending.take();
                    self.pending.push(&rest);
                    self.text(&mut parts, shown.to_owned());
                    break;
                }
                Found::Text(text) => {
                    let rest = text + &self.pending.take();
                    self.pending.push(&rest);
                    break;
                }
            }
        }
        parts
    }

    /// The rest, when the answer is complete.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = self.pending.take();
        let mut parts = Vec::new();
        match self.phase {
            CallPhase::Call => self.calls(&mut parts, &rest),
            CallPhase::Start | CallPhase::Text => self.text(&mut parts, rest),
        }
        parts
    }

    /// Decides whether an answer of Llama 3 or Mistral begins with a bare object or array.
    fn start(&mut self) {
        let text = self.pending.text().trim_start();
        let bare = if self.format == CallFormat::Llama3 { "{" } else { "[{" };
        if text.starts_with(bare) {
            self.phase = CallPhase::Call;
        } else if !bare.starts_with(text) {
            self.phase = CallPhase::Text;
        }
    }

    fn text(&mut self, parts: &mut Vec<Part>, text: String) {
        let text = if self.after_call { text.trim_start().to_owned() } else { text };
        if !text.is_empty() {
            self.after_call = false;
            parts.push(Part::Content(text));
        }
    }

    /// Reads what stands between the markers of a call.
    fn calls(&mut self, parts: &mut Vec<Part>, text: &str) {
        let calls = match self.format {
            CallFormat::Hermes => objects(text),
            CallFormat::Llama3 => objects(text)
                .filter(|calls| calls.iter().all(|call| self.names.contains(&call.name))),
            CallFormat::Mistral => objects(text).or_else(|| named(text)),
        };
        match calls {
            Some(calls) => {
                parts.extend(calls.into_iter().map(Part::Call));
                self.after_call = true;
            }
            None => {
                // The markers of Hermes are text that the model wrote.
                let tags = if self.format == CallFormat::Hermes { (OPEN, CLOSE) } else { ("", "") };
                self.text(parts, format!("{}{text}{}", tags.0, tags.1));
            }
        }
    }
}

/// The calls in JSON objects, or arrays of them, with separators; `None` if there is something else.
fn objects(text: &str) -> Option<Vec<ToolCall>> {
    let mut calls = Vec::new();
    let separator = |c: char| c.is_whitespace() || c == ';' || c == ',';
    let mut rest = text.trim_matches(separator);
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(values) => {
                for value in &values {
                    calls.push(call(value)?);
                }
            }
            value => calls.push(call(&value)?),
        }
        rest = rest[values.byte_offset()..].trim_start_matches(separator);
    }
    Some(calls).filter(|calls| !calls.is_empty())
}

/// The call that an object describes.
fn call(value: &Value) -> Option<ToolCall> {
    let object = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
    let name = object.get("name")?.as_str()?.to_owned();
    let arguments = match object.get("arguments").or_else(|| object.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(arguments) => arguments.to_string(),
    };
    Some(ToolCall { name, arguments })
}

/// The calls `name[ARGS]{…}`, with `[TOOL_CALLS]` between them.
fn named(text: &str) -> Option<Vec<ToolCall>> {
    let one = |text: &str| {
        let brace = text.find('{')?;
        let arguments: Value = serde_json::from_str(text[brace..].trim()).ok()?;
        let name = text[..brace].trim().trim_end_matches(ARGS).trim();
        let is_name =
            !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c));
        is_name.then(|| ToolCall { name: name.to_owned(), arguments: arguments.to_string() })
    };
    text.split(TOOL_CALLS).map(str::trim).filter(|t| !t.is_empty()).map(one).collect()
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
