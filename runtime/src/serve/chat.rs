//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, body::Bytes};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::app::App;
use super::calls::{CallFormat, CallReader};
use super::chat_reply::{ChatAssembler, ChatCompletion};
use super::error::ApiError;
use super::generation::{Generation, Order};
use super::grammar::{GrammarFields, Rule};
use super::messages::spelled_out;
use super::models::Loaded;
use super::sampling::{SamplingFields, alternatives};
use super::splitter::Splitter;
use super::tools::{ToolFields, Tools};
use super::trace::Trace;
use super::{json, respond, streaming};
use crate::messages::{ChatMessage, ChatRole, for_template, without_template};
use crate::template::ChatInput;

/// The fields that only chats have.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The model; see `/v1/models`. A server with one model takes every name.
    model: Option<String>,
    /// The conversation.
    messages: Vec<ChatMessage>,
    /// Report the log probability of each token.
    logprobs: Option<bool>,
    /// And those of so many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    /// More variables of the chat template, such as `{"enable_thinking": false}`.
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// A request for answers to a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[expect(
    dead_code,
    reason = "describes the request; its parts are parsed one by one, so that errors name the field"
)]
pub(crate) struct ChatRequest {
    #[serde(flatten)]
    chat: ChatFields,
    #[serde(flatten)]
    tools: ToolFields,
    #[serde(flatten)]
    grammar: GrammarFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// A request that is ready to be queued.
struct PreparedChat {
    model: Arc<Loaded>,
    rule: Option<Rule>,
    order: Order,
    splitters: Vec<Splitter>,
    stream: bool,
    include_usage: bool,
}

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "chat", request_body = ChatRequest, responses(
    (status = 200, description = "The answers; with `stream`, server-sent events of ChatChunk", body = ChatCompletion),
    ApiError,
))]
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Arc<Trace>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = json::read(request).await?;
    let shared = Arc::clone(&app);
    let prepared = app.prepare(move || prepare(&shared, &body)).await?;
    let PreparedChat { model, rule, mut order, splitters, stream, include_usage } = prepared;
    order.constraint = app.compile(&model, rule).await?;
    let generation = Generation::start(&model, order, app.timeout)?;
    let mut assembler = ChatAssembler::new(model, splitters, include_usage);
    if stream {
        return Ok(streaming::respond(generation, assembler, trace));
    }
    let chunks = streaming::collect(generation, &mut assembler, &trace).await?;
    let reply = assembler.whole(chunks);
    app.log_answer(|| serde_json::to_string(&reply).unwrap_or_default());
    Ok(respond::json(StatusCode::OK, &reply))
}

fn prepare(app: &App, body: &Bytes) -> Result<PreparedChat, ApiError> {
    let chat: ChatFields = json::parse(body)?;
    let sampling_fields: SamplingFields = json::parse(body)?;
    let tools = json::parse::<ToolFields>(body)?.check()?;
    let rule = json::parse::<GrammarFields>(body)?.rule()?;
    let model = app.models.find(chat.model.as_deref())?;
    let sampling = sampling_fields.check(&model.defaults, model.vocabulary())?;
    let logprobs = logprobs(&chat)?;
    let (prompt, format) = render(&model, &chat, &tools)?;
    app.log_prompt(&prompt);
    let tokens = model.tokenizer.encode_prompt(&prompt)?;
    let forced = tools.grammar(format).map(Rule::of_tools);
    if forced.is_some() && rule.is_some() {
        let message = "`tool_choice` demands a call, which cannot follow another format";
        return Err(ApiError::field("tool_choice", message));
    }
    let rule = forced.or(rule);
    let constrained = rule.is_some();
    let splitter = |_| {
        let calls = (!tools.is_empty()).then(|| CallReader::new(format, tools.names()));
        match constrained {
            true => Splitter::without_reasoning(calls),
            false => Splitter::new(&prompt, calls),
        }
    };
    let splitters = (0..sampling.answers).map(splitter).collect();
    let order = Order {
        field: "messages",
        prompts: vec![tokens],
        sampling,
        logprobs,
        chat: model.template.is_some(),
        calls: (!tools.is_empty()).then_some(format),
        constraint: None,
    };
    let (stream, include_usage) = (sampling_fields.streams(), sampling_fields.reports_usage());
    Ok(PreparedChat { model, rule, order, splitters, stream, include_usage })
}

fn logprobs(chat: &ChatFields) -> Result<Option<usize>, ApiError> {
    let top = alternatives("top_logprobs", chat.top_logprobs)?;
    match chat.logprobs.unwrap_or(false) {
        true => Ok(Some(top)),
        false if top > 0 => {
            let message = "`top_logprobs` needs `logprobs`: true";
            Err(ApiError::field("top_logprobs", message))
        }
        false => Ok(None),
    }
}

/// The prompt, and the format in which calls of tools are expected.
fn render(
    model: &Loaded,
    chat: &ChatFields,
    tools: &Tools,
) -> Result<(String, CallFormat), ApiError> {
    let knows = |text| model.template.as_ref().is_some_and(|template| template.mentions(text));
    let developer = knows("developer");
    let uses_tools = !tools.is_empty()
        || chat.messages.iter().any(|m| m.role == ChatRole::Tool || m.tool_calls.is_some());
    let spell = uses_tools && !knows("tools");
    let (messages, format) = match spell {
        true => (spelled_out(&chat.messages, tools, developer)?, CallFormat::Hermes),
        false => (for_template(&chat.messages, developer)?, model.calls),
    };
    let Some(template) = &model.template else {
        return Ok((without_template(&messages), format));
    };
    let variables = chat.chat_template_kwargs.clone().unwrap_or_default();
    let values = tools.values();
    let offered = (!spell && !values.is_empty()).then_some(&values[..]);
    let input = ChatInput { messages: &messages, tools: offered, variables: &variables };
    let prompt = template.render_chat(input).map_err(|e| {
        let text = e.to_string();
        // The first line says what is wrong; the rest are the source and the variables.
        ApiError::field("messages", text.lines().next().unwrap_or_default())
    });
    Ok((prompt?, format))
}
