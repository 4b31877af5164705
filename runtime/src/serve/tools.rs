//! The tools that a client offers, and whether the model has to call one.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::calls::CallFormat;
use super::error::ApiError;
use super::grammar::with_options;
use crate::messages::function;

/// The most tools of a request.
const MAX_TOOLS: usize = 128;

/// The fields of a request that are about tools.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct ToolFields {
    /// The functions that the model may call.
    tools: Option<Vec<Tool>>,
    /// `none`, `auto`, `required`, or a function that has to be called.
    tool_choice: Option<ToolChoice>,
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct Tool {
    /// `function`.
    #[serde(rename = "type", default = "function")]
    kind: String,
    function: ToolFunction,
}

/// The signature of a function.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct ToolFunction {
    name: String,
    /// What the function does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    /// A JSON schema of the arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parameters: Option<Value>,
}

/// Whether a tool has to be called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}"
)]
pub(crate) enum ToolChoice {
    Mode(ToolMode),
    Function(ChosenTool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ToolMode {
    None,
    Auto,
    Required,
}

/// A tool that has to be called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ChosenTool {
    function: ChosenFunction,
}

/// The name of a function.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ChosenFunction {
    name: String,
}

/// Checked [`ToolFields`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Tools {
    /// The tools that the model is told of; empty if it is to call none.
    offered: Vec<Tool>,
    /// The tools of which one has to be called.
    forced: Vec<Tool>,
}

impl ToolFields {
    /// Checks the fields.
    ///
    /// # Errors
    /// 400 that names the wrong field.
    pub fn check(self) -> Result<Tools, ApiError> {
        let offered = self.tools.unwrap_or_default();
        if offered.len() > MAX_TOOLS {
            let message = format!("`tools` has {} tools, but may have {MAX_TOOLS}", offered.len());
            return Err(ApiError::field("tools", message));
        }
        for (i, tool) in offered.iter().enumerate() {
            if tool.kind != "function" {
                let field = format!("tools[{i}].type");
                let message =
                    format!("`{field}` is {:?}, but only functions are supported", tool.kind);
                return Err(ApiError::field(field, message));
            }
            let parameters = &tool.function.parameters;
            if !matches!(parameters, None | Some(Value::Object(_) | Value::Null)) {
                let field = format!("tools[{i}].function.parameters");
                let message = format!("`{field}` is no JSON schema");
                return Err(ApiError::field(field, message));
            }
        }
        let forced = match self.tool_choice {
            Some(ToolChoice::Mode(ToolMode::None)) => return Ok(Tools::default()),
            None | Some(ToolChoice::Mode(ToolMode::Auto)) => Vec::new(),
            Some(ToolChoice::Mode(ToolMode::Required)) if offered.is_empty() => {
                let message = "`tool_choice` is \"required\", but there are no `tools`";
                return Err(ApiError::field("tool_choice", message));
            }
            Some(ToolChoice::Mode(ToolMode::Required)) => offered.clone(),
            Some(ToolChoice::Function(choice)) => {
                let name = choice.function.name;
                match offered.iter().find(|tool| tool.function.name == name) {
                    Some(tool) => vec![tool.clone()],
                    None => {
                        let message =
                            format!("`tool_choice` names {name:?}, which is not in `tools`");
                        return Err(ApiError::field("tool_choice", message));
                    }
                }
            }
        };
        Ok(Tools { offered, forced })
    }
}

impl Tools {
    /// Whether the model is told of no tools.
    pub fn is_empty(&self) -> bool {
        self.offered.is_empty()
    }

    pub fn names(&self) -> Vec<String> {
        self.offered.iter().map(|tool| tool.function.name.clone()).collect()
    }

    /// What a template reads.
    pub fn values(&self) -> Vec<Value> {
        self.offered.iter().filter_map(|tool| serde_json::to_value(tool).ok()).collect()
    }

    /// Instructions for a model whose template knows no tools; `None` without tools.
    pub fn description(&self) -> Option<String> {
        let lines: Vec<String> = self.values().iter().map(Value::to_string).collect();
        (!lines.is_empty()).then(|| {
            format!(
                "You can call these functions:\n<tools>\n{}\n</tools>\nTo call a function, answer with its name and \
                 its arguments as JSON:\n<tool_call>\n{{\"name\": \"…\", \"arguments\": {{…}}}}\n</tool_call>",
                lines.join("\n")
            )
        })
    }

    /// A grammar, in Lark, of a call of one of the tools of which one has to be called; `None` if none has to.
    pub fn grammar(&self, format: CallFormat) -> Option<String> {
        if self.forced.is_empty() {
            return None;
        }
        let key = format.arguments_key();
        let call = |tool: &Tool| {
            let parameters = tool.function.parameters.clone().filter(Value::is_object);
            let parameters = parameters.unwrap_or_else(|| json!({"type": "object"}));
            with_options(json!({
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, key: parameters},
                "required": ["name", key],
                "additionalProperties": false,
            }))
        };
        let rules = self
            .forced
            .iter()
            .enumerate()
            .map(|(i, tool)| format!("call_{i}: %json {}\n", call(tool)));
        let names: Vec<String> = (0..self.forced.len()).map(|i| format!("call_{i}")).collect();
        let (before, after) = format.around();
        let text = |text: &str| {
            if text.is_empty() { String::new() } else { Value::from(text).to_string() }
        };
        let start = format!("start: {} ({}) {}\n", text(before), names.join(" | "), text(after));
        Some(start + &rules.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Tools, ApiError> {
        serde_json::from_str::<ToolFields>(text).unwrap().check()
    }

    #[test]
    fn choices_select_tools() {
        let of = |choice: &str| {
            check(&format!(
                r#"{{"tools": [{{"function": {{"name": "f"}}}}, {{"function": {{"name": "g"}}}}],
                "tool_choice": {choice}}}"#
            ))
        };
        assert_eq!(of("\"auto\"").unwrap().names(), ["f", "g"]);
        assert!(of("\"auto\"").unwrap().grammar(CallFormat::Hermes).is_none());
        assert!(of("\"none\"").unwrap().is_empty());
        let one = of(r#"{"type": "function", "function": {"name": "g"}}"#).unwrap();
        let grammar = one.grammar(CallFormat::Llama3).unwrap();
        assert!(grammar.contains(r#""const":"g""#) && grammar.contains("parameters"), "{grammar}");
        assert!(
            of("\"required\"").unwrap().grammar(CallFormat::Hermes).unwrap().contains("call_1")
        );
        let unknown = of(r#"{"type": "function", "function": {"name": "h"}}"#).unwrap_err();
        let body = serde_json::to_value(unknown.body()).unwrap();
        assert_eq!(body["error"]["param"], "tool_choice");
        assert!(check(r#"{"tool_choice": "required"}"#).is_err());
        assert!(check(r#"{"tools": [{"type": "web", "function": {"name": "f"}}]}"#).is_err());
        assert!(check(r#"{"tools": [{"function": {"name": "f", "parameters": 3}}]}"#).is_err());
    }
}
