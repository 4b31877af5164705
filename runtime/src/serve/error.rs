//! [`ApiError`]: errors in the format of OpenAI's API.

use std::collections::BTreeMap;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

use super::respond;
use crate::error::{Error, ErrorKind};

/// An error response.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// The value of `type`.
    kind: &'static str,
    message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which the client may try again.
    retry_after: Option<u32>,
}

/// The body of an error response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorFields,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorFields {
    /// The problem and what to do about it.
    message: String,
    /// The kind of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request that is wrong.
    param: Option<String>,
    /// A name for programs, such as `context_length_exceeded`.
    code: Option<&'static str>,
}

impl ApiError {
    /// An error of this status.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400: the request as a whole is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: the value of a field is wrong.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message).with_param(param)
    }

    /// 400: the prompt leaves no room in the context for an answer. `field` is where the prompt came from.
    pub fn too_long(field: &str, prompt: usize, context: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your prompt has {prompt} tokens. \
             Shorten the prompt, or start the server with a larger --ctx."
        );
        Self::field(field, message).with_code("context_length_exceeded")
    }

    /// 404: there is no such model.
    pub fn no_model(name: &str, known: &str) -> Self {
        let message = format!("The model `{name}` does not exist. This server has: {known}.");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_param("model")
            .with_code("model_not_found")
    }

    /// 429: the queue is full.
    pub fn busy() -> Self {
        let message = "The server is busy and its queue is full. Try again later.";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .with_code("queue_full")
            .retry_after(1)
    }

    /// 503: not yet, or no longer.
    pub fn unavailable(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message).retry_after(2)
    }

    /// 504: the time limit of the request has passed.
    pub fn timeout() -> Self {
        let message = "The answer took longer than the time limit of the server (--timeout).";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message)
    }

    /// 500: a fault of the server.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The error of a job that was queued. What is wrong with its request was found before: a usage error means that
    /// the server is shutting down.
    pub fn of_job(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Usage => Self::unavailable(&error.to_string()),
            ErrorKind::Invalid => Self::bad_request(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }

    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The body of the response.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorFields {
                message: self.message.clone(),
                kind: self.kind,
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

/// Wrong input of the client is 400, everything else a fault of the server.
impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::Usage | ErrorKind::Invalid => Self::bad_request(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

/// The errors of all requests that use a model.
const RESPONSES: [(&str, &str); 9] = [
    ("400", "A wrong value, or a prompt that is too long"),
    ("401", "No key or a wrong one"),
    ("403", "A page or a host name that may not use the server"),
    ("404", "No such model"),
    ("408", "The body did not arrive in time"),
    ("413", "The body is too large"),
    ("429", "The queue is full"),
    ("503", "The model is being loaded, or the server is shutting down"),
    ("504", "The answer took longer than the time limit"),
];

/// The errors in the description of the API.
impl IntoResponses for ApiError {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let response = |description: &str| {
            let body = Ref::from_schema_name("ErrorBody");
            let content = ContentBuilder::new().schema(Some(body)).build();
            ResponseBuilder::new().description(description).content("application/json", content)
        };
        RESPONSES.map(|(status, text)| (status.to_owned(), response(text).into())).into()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = respond::json(self.status, &self.body());
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let value = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        // For the log.
        response.extensions_mut().insert(self);
        response
    }
}
