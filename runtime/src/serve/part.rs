//! [`Part`]: what an answer consists of.

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Text between `<think>` and `</think>` at the start of an answer.
    Reasoning(String),
    /// Text for the user.
    Content(String),
    /// A call of a tool.
    Call(ToolCall),
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// The name of the function.
    pub name: String,
    /// The arguments, JSON.
    pub arguments: String,
}

/// Adds a part unless its text is empty.
pub(crate) fn add(parts: &mut Vec<Part>, part: Part) {
    match &part {
        Part::Reasoning(text) | Part::Content(text) if text.is_empty() => {}
        _ => parts.push(part),
    }
}
