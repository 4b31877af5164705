//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, body::Bytes};
use serde::Deserialize;
use utoipa::ToSchema;

use super::app::App;
use super::completion_reply::{CompletionAssembler, TextCompletion};
use super::error::ApiError;
use super::generation::{Generation, Order};
use super::grammar::{GrammarFields, Rule};
use super::models::Loaded;
use super::prompt::Prompts;
use super::sampling::{SamplingFields, alternatives};
use super::trace::Trace;
use super::{json, respond, streaming};

/// The fields that only completions have.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// The model; see `/v1/models`. A server with one model takes every name.
    model: Option<String>,
    /// What to continue.
    prompt: Prompts,
    /// Repeat the prompt before the answer.
    echo: Option<bool>,
    /// Report the log probability of each token and of so many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u32>,
    /// Only the value of `n` is supported.
    best_of: Option<u32>,
    /// Not supported: the models here only continue.
    suffix: Option<String>,
}

/// A request to continue texts.
#[derive(Debug, Deserialize, ToSchema)]
#[expect(
    dead_code,
    reason = "describes the request; its parts are parsed one by one, so that errors name the field"
)]
pub(crate) struct CompletionRequest {
    #[serde(flatten)]
    completion: CompletionFields,
    #[serde(flatten)]
    grammar: GrammarFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// A request that is ready to be queued.
struct PreparedCompletion {
    model: Arc<Loaded>,
    rule: Option<Rule>,
    order: Order,
    /// What is repeated before the answers to each prompt.
    echo: Vec<String>,
    stream: bool,
    include_usage: bool,
}

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", tag = "completions", request_body = CompletionRequest, responses(
    (status = 200, description = "The answers; with `stream`, server-sent events of TextCompletion", body = TextCompletion),
    ApiError,
))]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Arc<Trace>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = json::read(request).await?;
    let shared = Arc::clone(&app);
    let prepared = app.prepare(move || prepare(&shared, &body)).await?;
    let PreparedCompletion { model, rule, mut order, echo, stream, include_usage } = prepared;
    order.constraint = app.compile(&model, rule).await?;
    let reports = order.logprobs.is_some();
    let answers = order.sampling.answers as usize;
    let generation = Generation::start(&model, order, app.timeout)?;
    let mut assembler = CompletionAssembler::new(
        model,
        generation.answers(),
        answers,
        echo,
        reports,
        include_usage,
    );
    if stream {
        return Ok(streaming::respond(generation, assembler, trace));
    }
    let chunks = streaming::collect(generation, &mut assembler, &trace).await?;
    let reply = assembler.whole(chunks);
    app.log_answer(|| serde_json::to_string(&reply).unwrap_or_default());
    Ok(respond::json(StatusCode::OK, &reply))
}

fn prepare(app: &App, body: &Bytes) -> Result<PreparedCompletion, ApiError> {
    let fields: CompletionFields = json::parse(body)?;
    let sampling_fields: SamplingFields = json::parse(body)?;
    let rule = json::parse::<GrammarFields>(body)?.rule()?;
    let model = app.models.find(fields.model.as_deref())?;
    let sampling = sampling_fields.check(&model.defaults, model.vocabulary())?;
    let logprobs = match fields.logprobs {
        None => None,
        some => Some(alternatives("logprobs", some)?),
    };
    if fields.suffix.as_deref().is_some_and(|suffix| !suffix.is_empty()) {
        let message = "`suffix` is not supported: this server only continues texts";
        return Err(ApiError::field("suffix", message));
    }
    if fields.best_of.is_some_and(|n| n != sampling.answers) {
        let message = "`best_of` is not supported, except with the value of `n`";
        return Err(ApiError::field("best_of", message));
    }
    let echoes = fields.echo.unwrap_or(false);
    if echoes && logprobs.is_some() {
        let message =
            "`echo` with `logprobs` is not supported: prompts have no log probabilities here";
        return Err(ApiError::field("echo", message));
    }
    let prompts = fields.prompt.tokens("prompt", &model.tokenizer)?;
    let echo = if echoes { echo(&fields.prompt, &prompts, &model)? } else { Vec::new() };
    prompts
        .iter()
        .for_each(|prompt| app.log_prompt(&model.tokenizer.decode(prompt).unwrap_or_default()));
    let order = Order {
        field: "prompt",
        prompts,
        sampling,
        logprobs,
        chat: false,
        calls: None,
        constraint: None,
    };
    let (stream, include_usage) = (sampling_fields.streams(), sampling_fields.reports_usage());
    Ok(PreparedCompletion { model, rule, order, echo, stream, include_usage })
}

fn echo(given: &Prompts, tokens: &[Vec<u32>], model: &Loaded) -> Result<Vec<String>, ApiError> {
    match given.texts() {
        Some(texts) => Ok(texts),
        None => tokens.iter().map(|ids| Ok(model.tokenizer.decode(ids)?)).collect(),
    }
}
