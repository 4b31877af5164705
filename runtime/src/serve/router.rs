//! Which handler answers which path, and what happens to every request before and after.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::app::App;
use super::error::ApiError;
use super::trace::Trace;
use super::{chat, completions, embeddings, info, openapi, page, tokens};

/// Paths that need no key: the page asks for it, and probes have none.
const OPEN_PATHS: [&str; 2] = ["/", "/health"];

/// All routes. `origins` are those whose pages may use the server.
pub(crate) fn router(app: Arc<App>, origins: &[String]) -> Router {
    let router = Router::new()
        .route("/", get(page::page))
        .route("/health", get(info::health))
        .route("/metrics", get(info::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/stb/info", get(info::info))
        .route("/v1/models", get(info::list_models))
        .route("/v1/models/{*model}", get(info::one_model))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        // `json::read` has a limit of its own.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(Arc::clone(&app), check));
    let router = if origins.is_empty() { router } else { router.layer(cors(origins)) };
    router.layer(from_fn_with_state(Arc::clone(&app), traced)).with_state(app)
}

fn cors(origins: &[String]) -> CorsLayer {
    let origin = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(
            origins.iter().filter_map(|o| HeaderValue::from_str(o.trim_end_matches('/')).ok()),
        ),
    };
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
}

/// Lets only those in who may use the server.
async fn check(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    app.access.check_origin(request.headers(), request.uri())?;
    if !OPEN_PATHS.contains(&request.uri().path()) {
        app.access.check_key(request.headers())?;
    }
    Ok(next.run(request).await)
}

/// Logs and counts every request. Unknown paths count together, so that a client cannot fill the memory with names.
async fn traced(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str());
    let metrics = Arc::clone(&app.metrics);
    let trace = Arc::new(Trace::new(metrics, request.method().clone(), path.to_owned()));
    request.extensions_mut().insert(Arc::clone(&trace));
    let response = next.run(request).await;
    let kind = response.headers().get(header::CONTENT_TYPE);
    let streams = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    trace.respond(response.status(), streams, response.extensions().get::<ApiError>());
    response
}

async fn unknown_path(request: Request) -> ApiError {
    let message =
        format!("There is no {} here; /openapi.json lists the paths.", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
}

async fn unknown_method(request: Request) -> ApiError {
    let message = format!("{} does not accept {}.", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
}

fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal("The server has a fault; please report it.").into_response()
}
