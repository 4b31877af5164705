//! The messages of a chat in OpenAI's format, and what a chat template reads of them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::Error;

/// A message of a chat.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
pub struct ChatMessage {
    /// Who wrote it.
    pub role: ChatRole,
    /// The text, or its parts. Messages of the assistant with calls of tools may have none.
    pub content: Option<MessageContent>,
    /// The calls in a message of the assistant.
    pub tool_calls: Option<Vec<MessageCall>>,
    /// The call that a message of a tool answers.
    pub tool_call_id: Option<String>,
    /// The name of the participant or the tool.
    pub name: Option<String>,
    /// The reasoning in a message of the assistant, for templates that show it to the model.
    pub reasoning_content: Option<String>,
}

/// Who wrote a message. A model without instructions of the developer takes them as those of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ChatRole {
    /// Instructions.
    System,
    /// Instructions by their newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a call.
    Tool,
}

/// A message that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageProblem {
    /// The field that is wrong, such as `messages[0].content[1]`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
}

impl MessageProblem {
    /// There are no messages.
    #[must_use]
    pub fn empty() -> Self {
        Self { field: "messages".into(), what: "`messages` is empty".into() }
    }
}

impl From<MessageProblem> for Error {
    fn from(problem: MessageProblem) -> Self {
        Self::usage(problem.what)
    }
}

/// A text, or several.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
#[serde(
    untagged,
    expecting = "expected a string or an array of parts {\"type\": \"text\", \"text\": …}"
)]
pub enum MessageContent {
    /// One text.
    Text(String),
    /// Several texts, which are joined.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
pub struct ContentPart {
    /// `text`; models here read nothing else.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    pub text: Option<String>,
}

/// A call of a tool in a message of the assistant.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
pub struct MessageCall {
    /// Names the call in the message of the tool.
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// What is called.
    pub function: CalledFunction,
}

/// A function with its arguments.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[cfg_attr(feature = "serve", derive(utoipa::ToSchema))]
pub struct CalledFunction {
    /// The name of the function.
    pub name: String,
    /// The arguments, JSON.
    #[serde(default)]
    pub arguments: String,
}

impl ChatMessage {
    /// The text of message `index`.
    ///
    /// # Errors
    /// For parts that are not text.
    pub fn text(&self, index: usize) -> Result<String, MessageProblem> {
        let parts = match &self.content {
            None => return Ok(String::new()),
            Some(MessageContent::Text(text)) => return Ok(text.clone()),
            Some(MessageContent::Parts(parts)) => parts,
        };
        let text = |(i, part): (usize, &ContentPart)| match (part.kind.as_str(), &part.text) {
            ("text", Some(text)) => Ok(text.clone()),
            (kind, _) => {
                let field = format!("messages[{index}].content[{i}]");
                let what = format!("`{field}` has the type {kind:?}, but only text is read");
                Err(MessageProblem { field, what })
            }
        };
        parts.iter().enumerate().map(text).collect()
    }

    /// What a template reads of a message with this text.
    fn value(&self, role: &str, text: String) -> Value {
        let mut object = Map::new();
        object.insert("role".into(), role.into());
        object.insert("content".into(), text.into());
        let optional = [
            ("name", &self.name),
            ("tool_call_id", &self.tool_call_id),
            ("reasoning_content", &self.reasoning_content),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                object.insert(key.into(), value.as_str().into());
            }
        }
        let calls = self.tool_calls.as_deref().unwrap_or_default();
        if !calls.is_empty() {
            object.insert("tool_calls".into(), calls.iter().map(MessageCall::value).collect());
        }
        object.into()
    }

    /// The role as a template has it; `developer` says whether it knows this role.
    #[must_use]
    pub fn role_name(&self, developer: bool) -> &'static str {
        match self.role {
            ChatRole::Developer if developer => "developer",
            ChatRole::System | ChatRole::Developer => "system",
            ChatRole::User => "user",
            ChatRole::Assistant => "assistant",
            ChatRole::Tool => "tool",
        }
    }
}

/// The value of `type` of calls and tools.
pub(crate) fn function() -> String {
    "function".to_owned()
}

impl MessageCall {
    /// What a template reads: the arguments as an object, as transformers has it.
    #[must_use]
    pub fn value(&self) -> Value {
        let text = &self.function.arguments;
        let object = serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
        let arguments = object.unwrap_or_else(|| text.as_str().into());
        let function = json!({"name": self.function.name, "arguments": arguments});
        match &self.id {
            Some(id) => json!({"id": id, "type": "function", "function": function}),
            None => json!({"type": "function", "function": function}),
        }
    }
}

/// What a template reads of the messages. `developer` says whether it knows this role.
///
/// # Errors
/// If there are no messages, or for parts that are not text.
pub fn for_template(
    messages: &[ChatMessage],
    developer: bool,
) -> Result<Vec<Value>, MessageProblem> {
    if messages.is_empty() {
        return Err(MessageProblem::empty());
    }
    let value = |(i, message): (usize, &ChatMessage)| {
        Ok(message.value(message.role_name(developer), message.text(i)?))
    };
    messages.iter().enumerate().map(value).collect()
}

/// The prompt for a model without a chat template: the texts of the messages, joined by line breaks.
#[must_use]
pub fn without_template(messages: &[Value]) -> String {
    let texts: Vec<&str> = messages.iter().filter_map(|m| m["content"].as_str()).collect();
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<ChatMessage> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn templates_get_text_and_objects() {
        let messages = messages(
            r#"[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "x", "type": "function",
             "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "x", "content": "3"}]"#,
        );
        let values = for_template(&messages, false).unwrap();
        assert_eq!(values[0], json!({"role": "system", "content": "ab"}));
        assert_eq!(values[1]["tool_calls"][0]["function"]["arguments"]["a"], 1);
        assert_eq!(values[2], json!({"role": "tool", "content": "3", "tool_call_id": "x"}));
        assert_eq!(for_template(&messages, true).unwrap()[0]["role"], "developer");
        assert_eq!(without_template(&values), "ab\n\n3");
    }

    #[test]
    fn other_parts_and_no_messages_are_refused() {
        let image = messages(r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#);
        let problem = for_template(&image, false).unwrap_err();
        assert_eq!(problem.field, "messages[0].content[0]");
        assert!(Error::from(problem).to_string().contains("only text"));
        assert!(for_template(&[], false).is_err());
    }
}
