//! The messages of a chat for models whose templates know no tools.

use serde_json::{Value, json};

use super::error::ApiError;
use super::tools::Tools;
use crate::messages::{ChatMessage, ChatRole, MessageProblem};

impl From<MessageProblem> for ApiError {
    fn from(problem: MessageProblem) -> Self {
        Self::field(problem.field, problem.what)
    }
}

/// What a template that knows no tools reads of the messages: tools are described in the instructions, and calls and their results
/// become text, all in the format of Hermes.
///
/// # Errors
/// Those of [`for_template`](crate::messages::for_template).
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
        return Err(MessageProblem::empty().into());
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

    #[test]
    fn calls_and_results_become_text() {
        let messages: Vec<ChatMessage> = serde_json::from_str(
            r#"[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "x", "type": "function",
             "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "x", "content": "3"}]"#,
        ).unwrap();
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
    fn problems_of_messages_name_their_field() {
        let error = spelled_out(&[], &Tools::default(), false).unwrap_err();
        let body = serde_json::to_value(error.body()).unwrap();
        assert_eq!(body["error"]["param"], "messages");
    }
}
