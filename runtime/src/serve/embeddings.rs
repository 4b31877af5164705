//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::app::App;
use super::error::ApiError;
use super::models::Loaded;
use super::prompt::Prompts;
use super::trace::Trace;
use super::{json, respond};
use crate::error::Result as RuntimeResult;
use crate::scheduler::SubmitError;

/// The most texts of a request.
const MAX_TEXTS: usize = 64;

/// A request for embeddings.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct EmbeddingRequest {
    /// The model; see `/v1/models`. A server with one model takes every name.
    model: Option<String>,
    /// The texts.
    input: Prompts,
    /// How the numbers are written.
    encoding_format: Option<EncodingFormat>,
    /// Only the width of the model is supported.
    dimensions: Option<usize>,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EncodingFormat {
    /// An array of numbers.
    Float,
    /// Base64 of little-endian 32-bit floats.
    Base64,
}

/// Embeddings.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingReply {
    /// `list`.
    object: &'static str,
    data: Vec<EmbeddingEntry>,
    model: String,
    usage: EmbeddingUsage,
}

/// The embedding of a text: the mean of the hidden states after the last norm, with length 1.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingEntry {
    /// `embedding`.
    object: &'static str,
    index: usize,
    embedding: EmbeddingValues,
}

/// The numbers of an embedding.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum EmbeddingValues {
    Float(Vec<f32>),
    Base64(String),
}

/// Token counts.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Computes embeddings of texts.
#[utoipa::path(post, path = "/v1/embeddings", tag = "embeddings", request_body = EmbeddingRequest, responses(
    (status = 200, description = "The embeddings", body = EmbeddingReply),
    ApiError,
))]
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Arc<Trace>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = json::read(request).await?;
    let shared = Arc::clone(&app);
    let (model, texts, format) = app
        .prepare(move || {
            let fields: EmbeddingRequest = json::parse(&body)?;
            let model = shared.models.find(fields.model.as_deref())?;
            let texts = check(&fields, &model)?;
            Ok((model, texts, fields.encoding_format.unwrap_or(EncodingFormat::Float)))
        })
        .await?;
    let tokens = texts.iter().map(Vec::len).sum();
    let deadline = tokio::time::Instant::now() + app.timeout;
    let mut data = Vec::new();
    // One after the other, so that a request with many texts does not fill the queue.
    for (index, text) in texts.into_iter().enumerate() {
        let values = tokio::time::timeout_at(deadline, embed(&model, text));
        let mut values = values.await.map_err(|_| ApiError::timeout())??;
        normalize(&mut values);
        let embedding = match format {
            EncodingFormat::Float => EmbeddingValues::Float(values),
            EncodingFormat::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                EmbeddingValues::Base64(base64::encode(bytes))
            }
        };
        data.push(EmbeddingEntry { object: "embedding", index, embedding });
    }
    trace.complete((tokens, 0));
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
    let reply = EmbeddingReply { object: "list", data, model: model.name.clone(), usage };
    Ok(respond::json(StatusCode::OK, &reply))
}

/// The token ids of the texts.
fn check(fields: &EmbeddingRequest, model: &Loaded) -> Result<Vec<Vec<u32>>, ApiError> {
    let width = model.engine.model.hidden_size();
    if fields.dimensions.is_some_and(|n| n != width) {
        let message = format!("`dimensions` has to be {width}, the width of the model");
        return Err(ApiError::field("dimensions", message));
    }
    let texts = fields.input.tokens("input", &model.tokenizer)?;
    if texts.len() > MAX_TEXTS {
        let message = format!("`input` has {} texts, but may have {MAX_TEXTS}", texts.len());
        return Err(ApiError::field("input", message));
    }
    let context = model.scheduler.context();
    match texts.iter().find(|text| text.len() > context) {
        Some(text) => Err(ApiError::too_long("input", text.len(), context)),
        None => Ok(texts),
    }
}

async fn embed(model: &Loaded, tokens: Vec<u32>) -> Result<Vec<f32>, ApiError> {
    let (sender, receiver) = oneshot::channel::<RuntimeResult<Vec<f32>>>();
    let sink = Box::new(move |result| {
        // The request may be over.
        let _ = sender.send(result);
    });
    model.scheduler.embed(tokens, sink).map_err(|e| match e {
        SubmitError::Busy => ApiError::busy(),
        SubmitError::Closed => ApiError::unavailable("The server is shutting down."),
        SubmitError::Invalid(e) => ApiError::from(e).with_param("input"),
    })?;
    let result = receiver.await;
    let result = result.map_err(|_| ApiError::internal("The model has stopped answering."))?;
    result.map_err(|e| ApiError::of_job(&e))
}

fn normalize(values: &mut [f32]) {
    let length = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    }
}
