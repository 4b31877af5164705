//! `/openapi.json`: the description of the API for programs.

use std::sync::LazyLock;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{chat, chat_reply, completions, embeddings, error, info, tokens};

#[derive(OpenApi)]
#[openapi(
    info(title = "stb", description = "Language models below one bit per weight, through OpenAI's API."),
    paths(
        chat::chat_completions,
        completions::completions,
        embeddings::embeddings,
        info::list_models,
        info::one_model,
        info::info,
        info::health,
        info::metrics,
        tokens::tokenize,
        tokens::detokenize,
        document,
    ),
    components(schemas(chat_reply::ChatChunk, error::ErrorBody, error::ErrorFields)),
    modifiers(&Key),
    security((), ("key" = [])),
)]
struct Api;

/// Adds the API key.
struct Key;

impl Modify for Key {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses(
    (status = 200, description = "The description of the API", body = Object),
    (status = 401, description = "No key or a wrong one", body = error::ErrorBody),
))]
pub(crate) async fn document() -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(|| Api::openapi().to_json().unwrap_or_default());
    let mut response = Response::new(Body::from(TEXT.as_str()));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
