//! Grammars and JSON schemas as constraints of the scheduler, by llguidance.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::error::ApiError;
use crate::error::{Error, Result};
use crate::scheduler::{Constraint, TokenMask};
use crate::tokenizer::Tokenizer;

/// The most bytes of a grammar or schema.
const MAX_GRAMMAR: usize = 256 << 10;
/// Limits of llguidance: work of the compilation (about 20 ms) and states of the lexer (about 2 kB each).
const COMPILE_FUEL: u64 = 1_000_000;
const LEXER_STATES: usize = 25_000;
/// The most significant digits of `multipleOf`: a divisor has as many states as it is large, and finding them is not
/// covered by the limits of llguidance.
const DIVISOR_DIGITS: usize = 3;
/// The longest token that a grammar can use, in bytes.
const MAX_TOKEN: usize = 1024;

/// The fields of a request that restrict the answer.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct GrammarFields {
    /// The format of the answer, as OpenAI has it.
    response_format: Option<ResponseFormat>,
    /// A JSON schema of the answer, as llama-server has it.
    json_schema: Option<Value>,
    /// A grammar of the answer in the Lark syntax of llguidance.
    grammar: Option<String>,
}

/// The format of an answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object. `schema` is what older clients of llama-server send.
    JsonObject { schema: Option<Value> },
    /// JSON that follows a schema.
    JsonSchema { json_schema: NamedSchema },
}

/// A JSON schema with a name.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct NamedSchema {
    /// The schema.
    schema: Option<Value>,
}

/// What an answer has to follow.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// The field that it comes from.
    field: &'static str,
    text: RuleText,
}

#[derive(Clone, Debug)]
enum RuleText {
    Schema(Value),
    Lark(String),
}

impl GrammarFields {
    /// The rule of the request, if it has one.
    ///
    /// # Errors
    /// 400 for more than one, and for a grammar in the syntax of llama.cpp.
    pub fn rule(self) -> std::result::Result<Option<Rule>, ApiError> {
        let schema = |field, schema| Rule { field, text: RuleText::Schema(schema) };
        let any = || json!({"type": "object"});
        let format = match self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject { schema }) => Some(schema.unwrap_or_else(any)),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(json_schema.schema.unwrap_or_else(any))
            }
        };
        let format = format.map(|value| schema("response_format", value));
        let own = self.json_schema.map(|value| schema("json_schema", value));
        let grammar = self.grammar.filter(|text| !text.is_empty());
        if grammar.as_ref().is_some_and(|text| text.contains("::=")) {
            let message = "`grammar` is in the GBNF syntax of llama.cpp, but this server reads the Lark syntax of \
                llguidance: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md";
            return Err(ApiError::field("grammar", message));
        }
        let grammar = grammar.map(Rule::lark);
        let mut rules = [format, own, grammar].into_iter().flatten();
        match (rules.next(), rules.next()) {
            (_, Some(second)) => {
                let message = "give one of `response_format`, `json_schema` and `grammar`";
                Err(ApiError::field(second.field, message))
            }
            (first, None) => Ok(first),
        }
    }
}

impl Rule {
    /// The rule of a grammar in Lark.
    pub fn lark(text: String) -> Self {
        Self { field: "grammar", text: RuleText::Lark(text) }
    }

    /// The field that the rule comes from.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// The rule of a tool that has to be called.
    pub fn of_tools(text: String) -> Self {
        Self { field: "tools", text: RuleText::Lark(text) }
    }
}

/// Compiles grammars for the tokens of a model.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// For the tokens of `tokenizer`, whose bytes are `tokens`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model has no end token.
    pub fn new(tokenizer: &Tokenizer, tokens: &[Vec<u8>]) -> Result<Self> {
        let ends: Vec<u32> =
            tokenizer.eos.iter().copied().filter(|id| (*id as usize) < tokens.len()).collect();
        let Some(first) = ends.first() else {
            return Err(Error::unsupported("this model has no end token, which grammars need"));
        };
        let word = |(id, bytes): (usize, &Vec<u8>)| match bytes.len() {
            _ if tokenizer.is_special(id as u32) => {
                [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat()
            }
            0..=MAX_TOKEN => bytes.clone(),
            _ => Vec::new(),
        };
        let words: Vec<Vec<u8>> = tokens.iter().enumerate().map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, *first), &words);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&ends)));
        let internal = |e: anyhow::Error| Error::Internal { what: format!("grammars: {e}") };
        let mut factory =
            ParserFactory::new(&tokens, InferenceCapabilities::default(), &[]).map_err(internal)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.max_lexer_states = LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Self { factory })
    }

    /// Compiles a rule.
    ///
    /// # Errors
    /// 400 that names the field if the rule is invalid or too large.
    pub fn compile(&self, rule: Rule) -> std::result::Result<GrammarConstraint, ApiError> {
        let Rule { field, text } = rule;
        let written = match &text {
            RuleText::Schema(schema) => schema.to_string(),
            RuleText::Lark(text) => text.clone(),
        };
        if written.len() > MAX_GRAMMAR {
            let message =
                format!("`{field}` has {} bytes, but may have {MAX_GRAMMAR}", written.len());
            return Err(ApiError::field(field, message));
        }
        if written.split("\"multipleOf\"").skip(1).any(is_long_number) {
            let message =
                format!("`multipleOf` in `{field}` has more than {DIVISOR_DIGITS} digits");
            return Err(ApiError::field(field, message));
        }
        let grammar = match text {
            RuleText::Schema(schema) => TopLevelGrammar::from_json_schema(with_options(schema)),
            RuleText::Lark(text) => TopLevelGrammar::from_lark(text),
        };
        let wrong = |e: anyhow::Error| {
            ApiError::field(field, format!("`{field}` cannot be used: {}", first_line(&e)))
        };
        let parser = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.factory.create_parser(grammar)
        }));
        let mut matcher = Matcher::new(parser);
        // The first mask takes longest, and finds out what cannot begin. It is kept for the scheduler.
        let _ = matcher.compute_mask_or_eos().map_err(wrong)?;
        let may_end = matcher.is_accepting().map_err(wrong)?;
        Ok(GrammarConstraint { matcher, may_end })
    }
}

/// Whether a text begins, after a colon, with a number of more significant digits than a divisor may have.
fn is_long_number(text: &str) -> bool {
    let number = text.trim_start().strip_prefix(':').unwrap_or_default().trim_start();
    let end = number.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(number.len());
    let digits: String = number[..end].chars().filter(char::is_ascii_digit).collect();
    digits.trim_start_matches('0').len() > DIVISOR_DIGITS
}

/// An answer that follows a grammar.
pub(crate) struct GrammarConstraint {
    matcher: Matcher,
    may_end: bool,
}

impl GrammarConstraint {
    /// The same for another answer.
    pub fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), may_end: self.may_end }
    }
}

/// What may stand between the parts of JSON. Models that are small or unsure would otherwise write blanks without end.
const WHITESPACE: &str = r"( |\n[ \t]{0,20})";

/// A schema with the options of llguidance that every schema here has: `oneOf` is read as `anyOf`, and there is little
/// white space.
pub(crate) fn with_options(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let options = json!({"coerce_one_of": true, "whitespace_pattern": WHITESPACE});
        object.insert("x-guidance".into(), options);
    }
    schema
}

fn failed(error: &anyhow::Error) -> Error {
    Error::invalid(format!("the grammar failed: {}", first_line(error)))
}

/// The first line of a message of llguidance says what is wrong; the rest is a stack of callers.
fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Constraint for GrammarConstraint {
    fn mask(&mut self, allowed: &mut TokenMask) -> Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| failed(&e))?;
        let from = mask.as_slice();
        for (i, word) in allowed.words_mut().iter_mut().enumerate() {
            *word = from.get(i).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|e| failed(&e))?;
        self.may_end =
            self.matcher.is_stopped() || self.matcher.is_accepting().map_err(|e| failed(&e))?;
        Ok(())
    }

    fn may_end(&self) -> bool {
        self.may_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_divisors_are_found() {
        for (text, long) in [
            (": 1000}", true),
            (":0.0125,", false),
            (" : 99", false),
            (": 1.2345", true),
            (": \"x\"", false),
        ] {
            assert_eq!(is_long_number(text), long, "{text}");
        }
    }

    #[test]
    fn one_rule_of_one_kind() {
        let rule = |text: &str| serde_json::from_str::<GrammarFields>(text).unwrap().rule();
        assert!(rule(r#"{"response_format": {"type": "text"}, "grammar": ""}"#).unwrap().is_none());
        assert!(rule(r#"{"response_format": {"type": "json_object"}}"#).unwrap().is_some());
        assert!(
            rule(r#"{"response_format": {"type": "json_object"}, "grammar": "start: \"a\""}"#)
                .is_err()
        );
        assert!(rule(r#"{"grammar": "root ::= \"a\""}"#).is_err());
    }
}
