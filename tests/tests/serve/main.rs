//! The server, as its clients see it.

mod answers;
mod hostile;

use serde_json::{Value as Json, json};
use stb_tests::paths::quill;
use stb_tests::server::Server;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A server with the bundled model.
fn quill_server(args: &[&str]) -> Server {
    let model = quill();
    let mut all = vec![model.to_str().unwrap()];
    all.extend(args);
    Server::start(&all)
}

/// A greedy request for a chat with one message, and more fields.
fn chat(text: &str, more: Json) -> Json {
    let mut request = json!({
        "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12,
    });
    let more = more.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(more);
    request
}

/// A greedy request to continue a text, and more fields.
fn continuation(text: &str, more: Json) -> Json {
    let mut request = json!({"prompt": text, "temperature": 0, "max_tokens": 12});
    let more = more.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(more);
    request
}
