//! Wrong requests, and clients that misbehave.

use std::io::{Read, Write};
use std::net::Shutdown;

use serde_json::{Value as Json, json};
use stb_tests::paths::quill;
use stb_tests::programs::run;
use stb_tests::server::{Server, read_reply, request};

use super::{CHAT, TEXT, chat, continuation, quill_server};

/// A request whose answer takes as long as the context allows.
fn long() -> Json {
    continuation("One day", json!({"stream": true, "ignore_eos": true, "max_tokens": -1}))
}

#[test]
fn wrong_values_name_the_field() {
    let server = quill_server(&["-c", "100"]);
    for (fields, param) in [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"stop": 5}), "stop"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "king", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [{"function": {}}]}), "tools[0].function.name"),
        (json!({"grammar": "root ::= \"a\""}), "grammar"),
        (json!({"grammar": "start: ("}), "grammar"),
        (json!({"json_schema": {"type": "nothing"}}), "json_schema"),
        (json!({"response_format": {"type": "xml"}}), "response_format"),
    ] {
        let error = server.post(CHAT, &chat("Hi", fields.clone())).error(400);
        let found = error["param"].as_str().unwrap_or_default();
        assert!(found.starts_with(param), "{fields}: {error}");
    }
    assert_eq!(server.post(TEXT, &json!({})).error(400)["param"], "prompt");
    assert_eq!(server.post(TEXT, &json!({"prompt": [99_999_999]})).error(400)["param"], "prompt");
    // What is not known is ignored.
    assert_eq!(
        server.post(CHAT, &chat("Hi", json!({"user": "x", "metadata": {"a": []}}))).status,
        200
    );

    let error = server.post(CHAT, &chat(&"long ".repeat(200), json!({}))).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    let numbers: Vec<u32> = message.split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(numbers[0] == 100 && numbers[1] >= 200, "{message}");

    assert_eq!(server.get("/v1/nothing").error(404)["param"], Json::Null);
    let _ = server.get(CHAT).error(405);
}

#[test]
fn broken_bodies_are_refused() {
    let server = quill_server(&[]);
    let post = |body: &[u8]| server.request("POST", CHAT, "", body);
    for body in [&b""[..], b"[1, 2]", b"{\"messages\": [", b"null", b"\xff\xfe", b"{\"a\": NaN}"] {
        let _ = post(body).error(400);
    }
    let invalid = b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xc3\x28\"}]}";
    let _ = post(invalid).error(400);
    let deep = "[".repeat(100_000);
    let _ = post(format!("{{\"messages\": {deep}").as_bytes()).error(400);
    let nested = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    let schema = format!(
        "{{\"messages\": [{{\"role\": \"user\", \"content\": \"a\"}}], \"json_schema\": {nested}}}"
    );
    let _ = post(schema.as_bytes()).error(400);
    let huge: Json = (0..5000)
        .map(|i| (format!("p{i}"), json!({"type": "string"})))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let schema = json!({"type": "object", "properties": huge, "additionalProperties": false});
    let reply = server.post(CHAT, &chat("Hi", json!({"json_schema": schema})));
    assert!(reply.status == 400 || reply.status == 200, "{}", reply.body);
    // The server is as before.
    assert_eq!(server.post(CHAT, &chat("Hi", json!({}))).status, 200);
}

#[test]
fn large_bodies_are_not_read() {
    let server = quill_server(&[]);
    // A gigabyte is announced, and not sent: the answer comes at once.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: 1073741824\r\n\r\n",
        server.address
    );
    let mut stream = server.connect();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    // Nothing is announced, and it does not end.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
        server.address
    );
    let mut stream = server.connect();
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = format!("100000\r\n{}\r\n", " ".repeat(1 << 20));
    for _ in 0..9 {
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    let headers = format!("X: {}\r\n", "x".repeat(300_000));
    assert_eq!(server.request("GET", "/health", &headers, b"").status, 431);
}

#[test]
fn a_full_queue_is_429_and_clients_that_go_free_their_slots() {
    let server = quill_server(&["--slots", "1", "--max-queue", "16"]);
    let mut many = long();
    many["n"] = 16.into();
    let running = server.begin(TEXT, &many);
    server.wait_for("stb_queue_length", |queued| queued >= 8.0);
    let refused = server.post(TEXT, &many);
    let _ = refused.error(429);
    assert!(refused.head.to_ascii_lowercase().contains("retry-after: "), "{}", refused.head);
    drop(running);
    server.wait_for("stb_queue_length", |queued| queued == 0.0);
    server.wait_for("stb_slots_busy", |busy| busy == 0.0);
    assert!(server.metric("stb_answers_canceled_total") >= 1.0);
    // All of the answers together would have 16 times the context.
    assert!(server.metric("stb_generated_tokens_total") < 8.0 * 512.0);
    assert_eq!(server.post(TEXT, &continuation("One day", json!({}))).status, 200);
}

#[test]
fn slow_readers_and_half_open_connections_disturb_nobody() {
    let server = quill_server(&["--slots", "2"]);
    // They read nothing, send half a request, or close their side.
    let slow: Vec<_> = (0..4).map(|_| server.begin(TEXT, &long())).collect();
    let mut half = server.connect();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n").unwrap();
    let mut body = server.connect();
    body.write_all(&request(&server.address, "POST", TEXT, "", b"{\"prompt\": \"a\"}")[..100])
        .unwrap();
    let closed = server.begin(TEXT, &long());
    closed.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.post(TEXT, &continuation("One day", json!({}))).status, 200);
    // The slow readers lose nothing.
    for stream in slow {
        let events = read_reply(stream).events();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn keys_hosts_and_origins_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "first\nsecond\n").unwrap();
    let args = ["--api-key-file", file.to_str().unwrap(), "--cors-origin", "https://a.example"];
    let server = quill_server(&args);
    let with = |headers: &str| server.request("GET", "/v1/models", headers, b"");
    assert_eq!(with("").error(401)["code"], "invalid_api_key");
    let _ = with("Authorization: Bearer third\r\n").error(401);
    assert_eq!(with("Authorization: Bearer second\r\n").status, 200);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/").status, 200);
    let allowed = with("Authorization: Bearer first\r\nOrigin: https://a.example\r\n");
    assert!(
        allowed
            .head
            .to_ascii_lowercase()
            .contains("access-control-allow-origin: https://a.example")
    );
    let _ = with("Authorization: Bearer first\r\nOrigin: https://b.example\r\n").error(403);
    let preflight = "Origin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n\
        Access-Control-Request-Headers: authorization\r\n";
    let reply = server.request("OPTIONS", CHAT, preflight, b"");
    assert_eq!(reply.status, 200, "{}", reply.head);
    drop(server);

    let open = quill_server(&[]);
    let _ = open.request("GET", "/v1/models", "Origin: https://b.example\r\n", b"").error(403);
    let other = open.send(&request("evil.example", "GET", "/v1/models", "", b""));
    let _ = other.error(403);
    assert!(!open.get("/v1/models").head.to_ascii_lowercase().contains("access-control"));
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let model = quill();
    let model = model.to_str().unwrap();
    let failed = |args: &[&str], code| {
        let mut all = vec!["serve", "--port", "0"];
        all.extend(args);
        run("stb-run", &all).failure(code)
    };
    let error = failed(&[model, "--host", "0.0.0.0"], 2);
    assert!(error.contains("--api-key") && error.trim_end().lines().count() == 1, "{error}");
    assert!(failed(&[model, "--host", "no such host"], 2).contains("no such host"));
    assert!(failed(&[model, model], 2).contains("quill-4m"));
    assert!(failed(&[model, model, "-a", "x", "-a", "x"], 2).contains("would both be called x"));
    assert!(failed(&[model, "-a", "x", "-a", "y"], 2).contains("2 aliases for 1 models"));
    assert!(failed(&["missing.stb"], 3).contains("missing.stb"));
    assert!(failed(&[model, "--api-key-file", "missing"], 3).contains("missing"));
    let server = quill_server(&[]);
    let port = server.address.rsplit(':').next().unwrap();
    assert!(run("stb-run", &["serve", model, "--port", port]).failure(2).contains("--port"));
}

#[test]
fn a_killed_server_can_be_started_again() {
    let home = tempfile::tempdir().unwrap();
    let model = quill();
    let model = model.to_str().unwrap();
    let server = Server::start_at_home(home.path(), &[model]);
    let port = server.address.rsplit(':').next().unwrap().to_owned();
    let prompts = ["One day", "Once upon a time", "The cat", "There was"];
    // All of them at once.
    let answers = |server: &Server| {
        let clients = prompts.map(|p| server.begin(TEXT, &continuation(p, json!({}))));
        clients.map(|client| {
            let reply = read_reply(client).success();
            reply["choices"][0]["text"].as_str().unwrap().to_owned()
        })
    };
    let before = answers(&server);
    let mut streams = prompts.map(|_| server.begin(TEXT, &long()));
    // All of them have got the beginning of their answers.
    streams.iter_mut().for_each(|stream| stream.read_exact(&mut [0; 300]).unwrap());
    server.signal("KILL");
    let _ = server.wait();
    let again = Server::start_at_home(home.path(), &[model, "--port", &port]);
    for stream in streams {
        let rest = read_to_end(stream);
        assert!(!rest.contains("[DONE]"), "{rest}");
    }
    let after = answers(&again);
    assert_eq!(after, before);
    drop(again);
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "a file was left");
}

/// What still comes over a connection, which may be reset.
fn read_to_end(mut stream: std::net::TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
