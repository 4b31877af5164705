//! The messages of a chat: from the request to what a chat template reads.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::error::ApiError;
use super::tools::{Tools, function};

/// A message of a chat.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ChatMessage {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ChatRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// A text, or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string or an array of parts {\"type\": \"text\", \"text\": …}"
)]
pub(crate) enum MessageContent {
    /// One text.
    Text(String),
    /// Several texts, which are joined.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ContentPart {
    /// `text`; models here read nothing else.
    #[serde(rename = "type")]
    kind: String,
    /// The text.
    text: Option<String>,
}

/// A call of a tool in a message of the assistant.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct MessageCall {
    /// Names the call in the message of the tool.
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    pub function: CalledFunction,
}

/// A function with its arguments.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct CalledFunction {
    pub name: String,
    /// The arguments, JSON.
    #[serde(default)]
    pub arguments: String,
}

impl ChatMessage {
    /// The text of message `index`.
    ///
    /// # Errors
    /// 400 for parts that are not text.
    pub fn text(&self, index: usize) -> Result<String, ApiError> {
        let parts = match &self.content {
            None => return Ok(String::new()),
            Some(MessageContent::Text(text)) => return Ok(text.clone()),
            Some(MessageContent::Parts(parts)) => parts,
        };
        let text = |(i, part): (usize, &ContentPart)| match (part.kind.as_str(), &part.text) {
            ("text", Some(text)) => Ok(text.clone()),
            (kind, _) => {
                let field = format!("messages[{index}].content[{i}]");
                let message =
                    format!("`{field}` has the type {kind:?}, but this server reads only text");
                Err(ApiError::field(field, message))
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

    fn role_name(&self, developer: bool) -> &'static str {
        match self.role {
            ChatRole::Developer if developer => "developer",
            ChatRole::System | ChatRole::Developer => "system",
            ChatRole::User => "user",
            ChatRole::Assistant => "assistant",
            ChatRole::Tool => "tool",
        }
    }
}

impl MessageCall {
    /// What a template reads: the arguments as an object, as transformers has it.
    fn value(&self) -> Value {
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
/// 400 if there are no messages, or for parts that are not text.
pub(crate) fn for_template(
    messages: &[ChatMessage],
    developer: bool,
) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "`messages` is empty"));
    }
    let value = |(i, message): (usize, &ChatMessage)| {
        Ok(message.value(message.role_name(developer), message.text(i)?))
    };
    messages.iter().enumerate().map(value).collect()
}

/// The same for a template that knows no tools: they are described in the instructions, and calls and their results
/// become text, all in the format of Hermes.
///
/// # Errors
/// As for [`for_template`].
pub(crate) fn spelled_out(
    messages: &[ChatMessage],
    tools: &Tools,
    developer: bool,
) -> Result<Vec<Value>, ApiError> {
    let mut plain = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        let mut text = message.text(i)?;
        for call in message.tool_calls.iter().flatten() {
            let call = call.value();
            text.push_str(&format!("\n<tool_call>\n{}\n</tool_call>", call["function"]));
        }
        let is_result = message.role == ChatRole::Tool;
        if is_result {
            text = format!("<tool_response>\n{text}\n</tool_response>");
        }
        let role = if is_result { "user" } else { message.role_name(developer) };
        plain.push(json!({"role": role, "content": text.trim_start_matches('\n')}));
    }
    if plain.is_empty() {
        return Err(ApiError::field("messages", "`messages` is empty"));
    }
    let Some(description) = tools.description() else { return Ok(plain) };
    if plain[0]["role"] == "system" {
        let own = plain[0]["content"].as_str().unwrap_or_default();
        plain[0]["content"] = format!("{own}\n\n{description}").into();
    } else {
        plain.insert(0, json!({"role": "system", "content": description}));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::tools::ToolFields;

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

        let tools = r#"{"tools": [{"type": "function", "function": {"name": "f"}}]}"#;
        let tools = serde_json::from_str::<ToolFields>(tools).unwrap().check().unwrap();
        let plain = spelled_out(&messages, &tools, false).unwrap();
        assert!(plain[0]["content"].as_str().unwrap().starts_with("ab\n\n"));
        assert!(plain[0]["content"].as_str().unwrap().contains(r#""name":"f""#));
        let call = "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"a\":1}}\n</tool_call>";
        assert_eq!(plain[1], json!({"role": "assistant", "content": call}));
        assert_eq!(plain[2]["content"], "<tool_response>\n3\n</tool_response>");
        assert_eq!(plain[2]["role"], "user");
    }

    #[test]
    fn other_parts_and_no_messages_are_refused() {
        let image = messages(r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#);
        let body = serde_json::to_value(for_template(&image, false).unwrap_err().body()).unwrap();
        assert_eq!(body["error"]["param"], "messages[0].content[0]");
        assert!(for_template(&[], false).is_err());
    }
}
