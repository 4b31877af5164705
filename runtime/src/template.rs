//! Chat templates: Jinja programs from the model file, executed with a step limit.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, merge_maps};
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The step limit of a template. Real templates take far fewer steps. The data that a template creates counts, too: a
/// step for 64 bytes.
const FUEL: u64 = 2_000_000;
/// The date of [`ChatTemplate::at_fixed_date`], in seconds since 1970.
const FIXED_DATE: i64 = 1_735_689_600;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` with this text.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// What a chat template renders beyond plain turns.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// The messages, each an object with `role`, `content` and whatever else the template reads.
    pub messages: &'a [serde_json::Value],
    /// The functions that the model may call, in OpenAI's format.
    pub tools: Option<&'a [serde_json::Value]>,
    /// More variables of the template, such as `enable_thinking`.
    pub variables: &'a serde_json::Map<String, serde_json::Value>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos", &self.bos).field("eos", &self.eos).finish()
    }
}

impl ChatTemplate {
    /// Compiles `source` with the settings of transformers. `bos` and `eos` are the texts of the begin
    /// and end tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `source` is not a valid template.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| Error::Internal { what: e.to_string() })?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: String| {
            strftime(&chrono::Local::now(), &format)
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(|e| Error::invalid(format!("the chat template does not compile: {e:#}")))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The same template at midnight of 1 January 2025, for texts that must not depend on the day.
    #[must_use]
    pub fn at_fixed_date(mut self) -> Self {
        let date = chrono::DateTime::from_timestamp(FIXED_DATE, 0).unwrap_or_default();
        self.environment
            .add_function("strftime_now", move |format: String| strftime(&date, &format));
        self
    }

    /// The prompt for `messages`, up to the start of the assistant's answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the template fails, rejects the messages or exceeds the step limit.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.run(messages, true)
    }

    /// The text of a conversation that is over.
    ///
    /// # Errors
    /// The errors of [`ChatTemplate::render`].
    pub fn render_finished(&self, messages: &[Message]) -> Result<String> {
        self.run(messages, false)
    }

    /// The prompt for a conversation with tools, up to the start of the assistant's answer.
    ///
    /// # Errors
    /// The errors of [`ChatTemplate::render`].
    pub fn render_chat(&self, input: ChatInput<'_>) -> Result<String> {
        let own = minijinja::context! {
            messages => Value::from(Serde(input.messages)),
            tools => input.tools.map(|tools| Value::from(Serde(tools))),
        };
        // The last map with a name wins: a client cannot change the variables of every template.
        let more = Value::from(Serde(input.variables));
        self.evaluate(merge_maps([more, self.context(true), own]))
    }

    /// Whether the source of the template contains `text`, such as the name of a variable.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        self.environment.get_template("chat").is_ok_and(|template| template.source().contains(text))
    }

    fn run(&self, messages: &[Message], prompt: bool) -> Result<String> {
        let messages = Value::from(Serde(messages));
        self.evaluate(merge_maps([self.context(prompt), minijinja::context! { messages }]))
    }

    /// The variables of every template.
    fn context(&self, prompt: bool) -> Value {
        minijinja::context! {
            add_generation_prompt => prompt,
            bos_token => &self.bos,
            eos_token => &self.eos,
        }
    }

    fn evaluate(&self, context: Value) -> Result<String> {
        let fail = |e: minijinja::Error| Error::invalid(format!("the chat template failed: {e:#}"));
        self.environment.get_template("chat").and_then(|t| t.render(context)).map_err(fail)
    }
}

/// A date in the `strftime` format of a template.
fn strftime<Zone: chrono::TimeZone<Offset: std::fmt::Display>>(
    date: &chrono::DateTime<Zone>,
    format: &str,
) -> std::result::Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut out = String::new();
    write!(out, "{}", date.format(format)).map_err(|_| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("invalid date format {format:?}"),
        )
    })?;
    Ok(out)
}

/// The filter `tojson` of transformers: JSON without HTML escapes.
fn tojson(value: Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let fail =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let text = match indent {
        None => python_json(&value).map_err(fail)?,
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut out = Vec::new();
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut serializer).map_err(fail)?;
            String::from_utf8(out).unwrap_or_default()
        }
    };
    Ok(Value::from_safe_string(text))
}

/// JSON with the separators of Python's `json.dumps`: `", "` and `": "`.
fn python_json(value: &Value) -> std::result::Result<String, serde_json::Error> {
    struct Spaced;
    impl serde_json::ser::Formatter for Spaced {
        fn begin_array_value<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            if first { Ok(()) } else { w.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(
            &mut self,
            w: &mut W,
        ) -> std::io::Result<()> {
            w.write_all(b": ")
        }
    }
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))?;
    Ok(String::from_utf8(out).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages)
    }

    #[test]
    fn llama_2_style() {
        let source = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + \
            m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + \
            m['content'] + ' ' + eos_token }}{% else %}{{ raise_exception('no ' + m['role']) }}\
            {% endif %}{% endfor %}";
        let turns = [
            Message::new("user", " Hi "),
            Message::new("assistant", "Hello <b>"),
            Message::new("user", "Bye"),
        ];
        let text = render(source, &turns).unwrap();
        assert_eq!(text, "<s>[INST] Hi [/INST] Hello <b> </s><s>[INST] Bye [/INST]");
        let error = render(source, &[Message::new("tool", "x")]).unwrap_err();
        assert!(error.to_string().contains("no tool"), "{error}");
    }

    #[test]
    fn tools_and_variables_reach_the_template() {
        let source = "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ x }} \
            {{ messages[0].tool_calls[0].function.arguments | tojson }}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        let json = |text: &str| serde_json::from_str::<Vec<serde_json::Value>>(text).unwrap();
        let messages = json(
            r#"[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]}]"#,
        );
        let tools = json(r#"[{"type": "function", "function": {"name": "f"}}]"#);
        let mut variables = serde_json::Map::new();
        variables.insert("x".into(), true.into());
        variables.insert("messages".into(), "no".into());
        let input = ChatInput { messages: &messages, tools: Some(&tools), variables: &variables };
        assert_eq!(template.render_chat(input).unwrap(), r#"f True {"b": 1, "a": 2}"#);
        assert!(template.mentions("tools") && !template.mentions("ipython"));
    }

    #[test]
    fn finished_conversations_have_no_prompt_and_a_fixed_date() {
        let source = "{{ strftime_now('%d %b %Y') }}:{% for m in messages %} {{ m.content }}{% endfor %}\
            {% if add_generation_prompt %} >{% endif %}";
        let template = ChatTemplate::new(source, "", "").unwrap().at_fixed_date();
        let turns = [Message::new("user", "Hi"), Message::new("assistant", "Hello")];
        assert_eq!(template.render_finished(&turns).unwrap(), "01 Jan 2025: Hi Hello");
        assert_eq!(template.render(&turns[..1]).unwrap(), "01 Jan 2025: Hi >");
    }

    #[test]
    fn json_matches_python() {
        let text = render("{{ messages | tojson }}", &[Message::new("user", "<a & 'b'> é")]);
        assert_eq!(text.unwrap(), r#"[{"role": "user", "content": "<a & 'b'> é"}]"#);
    }

    #[test]
    fn endless_and_broken_templates_are_errors() {
        let endless =
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}";
        assert!(render(endless, &[]).is_err());
        let growing = "{% set n = namespace(x='0123456789') %}{% for i in range(64) %}\
            {% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}";
        assert!(render(growing, &[]).is_err());
        assert!(render("{% if %}", &[]).is_err());
        assert!(render("{{ strftime_now('%') }}", &[]).is_err());
        assert_eq!(render("{{ strftime_now('%Y') | length }}", &[]).unwrap(), "4");
    }
}
