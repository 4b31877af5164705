//! `POST /tokenize` and `POST /detokenize`, as llama-server has them.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::App;
use super::error::ApiError;
use super::prompt::Prompts;
use super::{json, respond};

/// A text to split into tokens.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// The model; see `/v1/models`. A server with one model takes every name.
    model: Option<String>,
    /// The text. Special tokens in it are recognized.
    content: String,
    /// Whether to start with the begin token, if the model uses one.
    add_special: Option<bool>,
    /// Whether to return the text of each token, too.
    with_pieces: Option<bool>,
}

/// Tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizeReply {
    tokens: TokenList,
}

/// Token ids, or tokens with their texts.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum TokenList {
    Ids(Vec<u32>),
    Pieces(Vec<TokenPiece>),
}

/// A token with its text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenPiece {
    id: u32,
    piece: PieceText,
}

/// The text of a token, or its bytes if they are no text.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum PieceText {
    Text(String),
    Bytes(Vec<u8>),
}

/// Tokens to turn into text.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// The model; see `/v1/models`. A server with one model takes every name.
    model: Option<String>,
    /// The token ids.
    tokens: Vec<u32>,
}

/// A text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DetokenizeReply {
    /// The text, without special tokens.
    content: String,
}

/// Splits a text into tokens.
#[utoipa::path(post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeReply),
    ApiError,
))]
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = json::read(request).await?;
    let shared = Arc::clone(&app);
    let reply = app.prepare(move || {
        let fields: TokenizeRequest = json::parse(&body)?;
        let model = shared.models.find(fields.model.as_deref())?;
        let ids = match fields.add_special.unwrap_or(false) {
            true => model.tokenizer.encode_prompt(&fields.content)?,
            false => model.tokenizer.encode(&fields.content)?,
        };
        let piece = |id: u32| {
            let bytes = model.token_bytes().get(id as usize).cloned().unwrap_or_default();
            let piece = String::from_utf8(bytes).map(PieceText::Text);
            TokenPiece { id, piece: piece.unwrap_or_else(|e| PieceText::Bytes(e.into_bytes())) }
        };
        let tokens = match fields.with_pieces.unwrap_or(false) {
            true => TokenList::Pieces(ids.into_iter().map(piece).collect()),
            false => TokenList::Ids(ids),
        };
        Ok(TokenizeReply { tokens })
    });
    Ok(respond::json(StatusCode::OK, &reply.await?))
}

/// Turns tokens into text.
#[utoipa::path(post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeReply),
    ApiError,
))]
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = json::read(request).await?;
    let shared = Arc::clone(&app);
    let reply = app.prepare(move || {
        let fields: DetokenizeRequest = json::parse(&body)?;
        let model = shared.models.find(fields.model.as_deref())?;
        if fields.tokens.is_empty() {
            return Ok(DetokenizeReply { content: String::new() });
        }
        let ids = Prompts::Tokens(fields.tokens).tokens("tokens", &model.tokenizer)?;
        Ok(DetokenizeReply { content: model.tokenizer.decode(&ids.concat())? })
    });
    Ok(respond::json(StatusCode::OK, &reply.await?))
}
