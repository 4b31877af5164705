//! What the server says about itself and its models: `/health`, `/metrics`, `/v1/models`, `/stb/info`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::metrics::memory;
use super::models::Loaded;
use super::respond;

/// The state of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`.
    status: &'static str,
}

/// The models of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    object: &'static str,
    data: Vec<ModelEntry>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelEntry {
    id: String,
    /// `model`.
    object: &'static str,
    /// When the server was started, in seconds since 1970.
    created: i64,
    owned_by: &'static str,
}

/// Which model.
#[derive(Debug, Deserialize)]
pub(crate) struct ModelQuery {
    model: Option<String>,
}

/// A model file and what is known about it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelInfo {
    name: String,
    /// The family, such as `llama`.
    architecture: Option<String>,
    /// The recipe that the file was converted with.
    recipe: Option<String>,
    parameters: u64,
    file_bytes: u64,
    /// Bits per parameter of the whole file.
    true_bits: f64,
    /// The most tokens of a prompt with its answer.
    context: usize,
    /// Whether the model has a chat template.
    has_template: bool,
    /// What the converter measured; null for files that do not say.
    quality: Option<QualityInfo>,
    /// Values of absent sampling fields.
    sampling: SamplingDefaults,
    /// Where the model is computed, and with how many threads.
    device: String,
    threads: usize,
    /// Memory of the process in bytes, with the mapped parts of the file; null where the system does not say.
    memory_bytes: Option<u64>,
    /// Slots, those in use, and the requests that wait.
    slots: usize,
    slots_busy: usize,
    queue_length: usize,
}

/// The quality of a file against its source.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct QualityInfo {
    /// `close`, `worse`, `poor`, `broken` or `unchecked`.
    verdict: &'static str,
    /// The verdict in words.
    meaning: &'static str,
    /// KL divergence in nats per token.
    kl: Option<f64>,
    /// Share of tokens with the same best prediction.
    top1: Option<f64>,
    perplexity: Option<f64>,
    source_perplexity: Option<f64>,
    /// Tokens measured.
    tokens: Option<u64>,
}

/// Values of absent sampling fields.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SamplingDefaults {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repeat_penalty: f32,
}

/// Whether the server is ready. Needs no key.
#[utoipa::path(get, path = "/health", tag = "server", security(()), responses(
    (status = 200, description = "All models are ready", body = Health),
    (status = 503, description = "A model is being loaded", body = ErrorBody),
))]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    match app.models.all_ready() {
        true => Ok(respond::json(StatusCode::OK, &Health { status: "ok" })),
        false => Err(ApiError::unavailable("Loading model")),
    }
}

/// Counts and sizes in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server", responses(
    (status = 200, description = "The figures", body = String, content_type = "text/plain"),
    (status = 401, description = "No key or a wrong one", body = ErrorBody),
))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::from(app.metrics.text(&app.models)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "The models", body = ModelList),
    (status = 401, description = "No key or a wrong one", body = ErrorBody),
))]
pub(crate) async fn list_models(State(app): State<Arc<App>>) -> Response {
    let data = app.models.iter().map(|m| entry(&m.name, &app)).collect();
    respond::json(StatusCode::OK, &ModelList { object: "list", data })
}

/// Finds a model by its name.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "models",
    params(("model" = String, Path, description = "The name")), responses(
    (status = 200, description = "The model", body = ModelEntry),
    (status = 401, description = "No key or a wrong one", body = ErrorBody),
    (status = 404, description = "No such model", body = ErrorBody),
))]
pub(crate) async fn one_model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let model = app.models.named(&name)?;
    Ok(respond::json(StatusCode::OK, &entry(&model.name, &app)))
}

fn entry(name: &str, app: &App) -> ModelEntry {
    ModelEntry {
        id: name.to_owned(),
        object: "model",
        created: app.models.created,
        owned_by: "stb",
    }
}

/// Describes a model: size, quality, and what is in use.
#[utoipa::path(get, path = "/stb/info", tag = "models", params(
    ("model" = Option<String>, Query, description = "The name; needed if there are several models"),
), responses(
    (status = 200, description = "The model", body = ModelInfo),
    (status = 400, description = "There are several models and none is named", body = ErrorBody),
    (status = 401, description = "No key or a wrong one", body = ErrorBody),
    (status = 404, description = "No such model", body = ErrorBody),
    (status = 503, description = "The model is being loaded", body = ErrorBody),
))]
pub(crate) async fn info(
    State(app): State<Arc<App>>,
    Query(query): Query<ModelQuery>,
) -> Result<Response, ApiError> {
    let model = app.models.find(query.model.as_deref())?;
    Ok(respond::json(StatusCode::OK, &describe(&model)))
}

fn describe(loaded: &Loaded) -> ModelInfo {
    let model = &loaded.engine.model;
    let statistics = loaded.scheduler.statistics();
    let defaults = &loaded.defaults;
    let quality = model.quality().map(|quality| {
        let figures = quality.figures.as_ref();
        QualityInfo {
            verdict: quality.verdict.name(),
            meaning: quality.verdict.phrase(),
            kl: figures.map(|f| f.kl.value),
            top1: figures.map(|f| f.top1.value),
            perplexity: figures.map(|f| f.perplexity.value),
            source_perplexity: figures.map(|f| f.source_perplexity.value),
            tokens: figures.map(|f| f.tokens),
        }
    });
    ModelInfo {
        name: loaded.name.clone(),
        architecture: model.architecture().map(str::to_owned),
        recipe: model.recipe().map(str::to_owned),
        parameters: model.parameters(),
        file_bytes: model.file_bytes,
        true_bits: 8.0 * model.file_bytes as f64 / model.parameters().max(1) as f64,
        context: loaded.scheduler.context(),
        has_template: loaded.template.is_some(),
        quality,
        sampling: SamplingDefaults {
            temperature: defaults.temperature,
            top_k: defaults.top_k,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repeat_penalty: defaults.repeat_penalty,
        },
        device: loaded.engine.device_name().unwrap_or_else(|| "cpu".to_owned()),
        threads: loaded.engine.pool.threads(),
        memory_bytes: memory(),
        slots: statistics.slots,
        slots_busy: statistics.busy,
        queue_length: statistics.queued,
    }
}
