//! Reads JSON bodies within limits.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// The largest body of a request in bytes.
pub(crate) const MAX_BODY: usize = 8 << 20;
/// The longest time that a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// The body of a request.
///
/// # Errors
/// 413 if it is larger than [`MAX_BODY`], before it is read where the request says so; 408 if it does not arrive in
/// time; 400 if the connection breaks.
pub(crate) async fn read(request: Request) -> Result<Bytes, ApiError> {
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|n| n > MAX_BODY as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIME, collect(request.into_body())).await {
        Ok(body) => body,
        Err(_) => {
            let message = "The body of the request did not arrive in time.";
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message))
        }
    }
}

async fn collect(body: Body) -> Result<Bytes, ApiError> {
    let mut stream = body.into_data_stream();
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|e| ApiError::bad_request(format!("The body is broken: {e}")))?;
        if all.len() + piece.len() > MAX_BODY {
            return Err(too_large());
        }
        all.extend_from_slice(&piece);
    }
    Ok(all.into())
}

fn too_large() -> ApiError {
    let message = format!("The body of a request may have {MAX_BODY} bytes.");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
}

/// Parses a body. Unknown fields are ignored.
///
/// # Errors
/// 400 that names the field with a wrong value.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner();
        let text = cause.to_string();
        // serde_json counts numbers that are too large for their type as errors of syntax.
        if !cause.is_data() && !text.starts_with("number out of range") {
            return ApiError::bad_request(format!("The body is not valid JSON: {text}"));
        }
        match missing_field(&text) {
            Some(field) => ApiError::field(inside(&path, field), text),
            None if path == "." => ApiError::bad_request(text),
            None => ApiError::field(&path, format!("`{path}`: {text}")),
        }
    })?;
    reader.end().map_err(|e| ApiError::bad_request(format!("The body is not valid JSON: {e}")))?;
    Ok(value)
}

/// The name in serde's message about a missing field.
fn missing_field(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.split('`').next()
}

fn inside(path: &str, field: &str) -> String {
    if path == "." { field.to_owned() } else { format!("{path}.{field}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        list: Vec<Inner>,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "only parsed")]
        n: u8,
    }

    fn error(text: &[u8]) -> String {
        let error = parse::<Outer>(text).unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        serde_json::to_string(&error.body()).unwrap()
    }

    #[test]
    fn errors_name_the_field() {
        assert!(parse::<Outer>(br#"{"list": [{"n": 1, "x": {}}], "y": null}"#).is_ok());
        assert!(error(br#"{"list": [{"n": 1}, {"n": 300}]}"#).contains(r#""param":"list[1].n""#));
        assert!(error(br#"{"list": [{}]}"#).contains(r#""param":"list[0].n""#));
        assert!(error(b"{}").contains(r#""param":"list""#));
        assert!(error(b"[").contains("not valid JSON"));
        assert!(error(b"{\"list\": []} x").contains("not valid JSON"));
        assert!(error(b"{\"list\": [\"\xff\"]}").contains("param"));
        let deep = format!("{{\"list\": {}", "[".repeat(100_000));
        assert!(error(deep.as_bytes()).contains("error"));
        let unknown =
            format!("{{\"list\": [], \"x\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse::<Outer>(unknown.as_bytes()).is_ok());
    }
}
