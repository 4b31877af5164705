//! What the server answers.

use std::io::Read;

use serde_json::{Value as Json, json};
use stb_tests::paths::quill;
use stb_tests::programs::run;
use stb_tests::server::{Reply, Server, read_reply};

use super::{CHAT, TEXT, chat, continuation, quill_server};

const STORY: &str = "Once upon a time, there was a little dog who";

/// The chunks of a stream, which has to end as OpenAI's do.
fn chunks(reply: &Reply) -> Vec<Json> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.head.to_ascii_lowercase().contains("content-type: text/event-stream"));
    let mut events = reply.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[test]
fn chats_are_answered_whole_and_in_pieces() {
    let server = quill_server(&[]);
    let whole = server.post(CHAT, &chat("Tell me a story.", json!({}))).success();
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["model"], "quill-4m");

    let fields = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = chunks(&server.post(CHAT, &chat("Tell me a story.", fields)));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let deltas = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), text);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    assert_eq!(last["timings"]["completion_tokens"], 12);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");
    assert!(chunks.iter().all(|chunk| chunk["id"] == last["id"]));
}

#[test]
fn the_server_writes_what_the_terminal_writes() {
    let server = quill_server(&[]);
    let reply = server.post(TEXT, &continuation(STORY, json!({}))).success();
    let model = quill();
    let args = [
        model.to_str().unwrap(),
        "--no-template",
        "--temp",
        "0",
        "-n",
        "12",
        "--quiet",
        "--prompt",
        STORY,
    ];
    let terminal = run("stb-run", &args).success();
    assert_eq!(reply["choices"][0]["text"].as_str().unwrap(), terminal.trim_end_matches('\n'));
    // As text and as tokens.
    let tokens =
        server.post("/tokenize", &json!({"content": STORY, "add_special": true})).success();
    let fields = json!({"prompt": tokens["tokens"], "echo": true});
    let again = server.post(TEXT, &continuation("", fields)).success();
    let text = again["choices"][0]["text"].as_str().unwrap();
    assert!(text.ends_with(terminal.trim_end_matches('\n')) && text.contains(STORY), "{text}");
}

#[test]
fn stop_texts_seeds_and_several_answers() {
    let server = quill_server(&[]);
    let whole = server.post(TEXT, &continuation(STORY, json!({}))).success();
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let word = text.split_whitespace().nth(2).unwrap();
    let fields = json!({"stop": [word, "never"]});
    let stopped = server.post(TEXT, &continuation(STORY, fields)).success();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["text"].as_str().unwrap(), &text[..text.find(word).unwrap()]);

    let sampled = |seed: i64, n: u32| {
        let fields = json!({"temperature": 1, "seed": seed, "n": n});
        let reply = server.post(TEXT, &continuation(STORY, fields)).success();
        let choices = reply["choices"].as_array().unwrap().clone();
        assert_eq!(reply["usage"]["completion_tokens"].as_u64().unwrap() % u64::from(n), 0);
        choices.iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let three = sampled(7, 3);
    assert_eq!(sampled(7, 3), three);
    assert_ne!(three[0], three[1]);
    // The answers are those of the seeds one by one.
    assert_eq!([sampled(7, 1), sampled(8, 1), sampled(9, 1)].concat(), three);

    let two = json!({"prompt": ["One day", "The end"], "temperature": 0, "max_tokens": 3});
    let reply = server.post(TEXT, &two).success();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 2);
}

#[test]
fn log_probabilities_and_biases() {
    let server = quill_server(&[]);
    let fields = json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 4});
    let reply = server.post(CHAT, &chat("Hello", fields)).success();
    let entries = reply["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(entries.len(), 4);
    let mut bytes = Vec::new();
    for entry in &entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the chosen token is the most likely one.
        assert_eq!(entry["token"], top[0]["token"]);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        assert!(top[0]["logprob"].as_f64().unwrap() >= top[1]["logprob"].as_f64().unwrap());
        bytes.extend(entry["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
    }
    let text = reply["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), text.trim_start());

    let legacy = server.post(TEXT, &continuation(STORY, json!({"logprobs": 2}))).success();
    let logprobs = &legacy["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(logprobs["text_offset"][0], 0);

    let first =
        server.post("/tokenize", &json!({"content": " cat"})).success()["tokens"][0].clone();
    let fields = json!({"logit_bias": {first.to_string(): 100}, "max_tokens": 3});
    let biased = server.post(TEXT, &continuation(STORY, fields)).success();
    let text = biased["choices"][0]["text"].as_str().unwrap();
    let once = server.post("/detokenize", &json!({"tokens": [first]})).success();
    assert_eq!(text.trim(), [once["content"].as_str().unwrap().trim(); 3].join(" "), "{text}");
}

#[test]
fn answers_follow_schemas_grammars_and_tools() {
    let server = quill_server(&[]);
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    });
    let fields = json!({
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        "max_tokens": 100,
    });
    let reply = server.post(CHAT, &chat("Who?", fields)).success();
    let text = reply["choices"][0]["message"]["content"].as_str().unwrap();
    let person: Json = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(["Ann", "Bob"].contains(&person["name"].as_str().unwrap()), "{text}");
    assert!((1..=99).contains(&person["age"].as_u64().unwrap()), "{text}");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");

    let fields = json!({"grammar": "start: (\"yes\" | \"no\") \"!\"", "max_tokens": 20, "n": 2});
    let reply = server.post(CHAT, &chat("Really?", fields)).success();
    for choice in reply["choices"].as_array().unwrap() {
        assert!(["yes!", "no!"].contains(&choice["message"]["content"].as_str().unwrap()));
    }

    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "required": ["city"], "additionalProperties": false,
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    }}});
    let fields = json!({"tools": [tool], "tool_choice": "required", "max_tokens": 200});
    let reply = server.post(CHAT, &chat("Weather?", fields.clone())).success();
    let message = &reply["choices"][0]["message"];
    assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls", "{reply}");
    assert_eq!(message["content"], Json::Null);
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"]["name"], "weather");
    let arguments: Json =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()));

    let mut streamed = fields;
    streamed["stream"] = true.into();
    let chunks = chunks(&server.post(CHAT, &chat("Weather?", streamed)));
    let calls: Vec<&Json> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"].get("tool_calls")).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["index"], 0);
    assert_eq!(calls[0][0]["function"], call["function"]);

    // The conversation goes on with the result.
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]);
    let reply = server.post(CHAT, &json!({"messages": messages, "tools": [tool], "max_tokens": 5}));
    assert_eq!(reply.status, 200, "{}", reply.body);
}

#[test]
fn models_have_the_names_that_they_are_given() {
    let model = quill();
    let model = model.to_str().unwrap();
    let server = Server::start(&[model, model, "-a", "cat", "--alias", "dog"]);
    let models = server.get("/v1/models").success();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][1]["id"]),
        (&"cat".into(), &"dog".into())
    );
    let ask = |name: &str| server.post(TEXT, &continuation(STORY, json!({"model": name})));
    assert_eq!(ask("dog").success()["model"], "dog");
    assert_eq!(server.get("/stb/info?model=cat").success()["name"], "cat");
    let error = ask("quill-4m").error(404);
    assert!(error["message"].as_str().unwrap().contains("cat, dog"), "{error}");
}

#[test]
fn models_tokens_embeddings_and_descriptions() {
    let server = quill_server(&[]);
    let models = server.get("/v1/models").success();
    assert_eq!(models["data"][0]["id"], "quill-4m");
    assert_eq!(server.get("/v1/models/quill-4m").success()["object"], "model");
    assert_eq!(server.get("/v1/models/other").error(404)["code"], "model_not_found");

    let info = server.get("/stb/info").success();
    assert_eq!(info["context"], 512);
    assert_eq!(info["has_template"], true);
    assert_eq!(info["architecture"], "llama");
    assert!(info["true_bits"].as_f64().unwrap() > 15.0);

    let text = "The café is open, 日本.";
    let tokens = server.post("/tokenize", &json!({"content": text})).success();
    assert_eq!(server.post("/detokenize", &tokens).success()["content"], text);
    let pieces =
        server.post("/tokenize", &json!({"content": "The end", "with_pieces": true})).success();
    let pieces = pieces["tokens"].as_array().unwrap().clone();
    assert_eq!(pieces.iter().map(|p| p["piece"].as_str().unwrap()).collect::<String>(), "The end");

    let input = json!({"input": ["a dog", "a dog", "the sky"]});
    let reply = server.post("/v1/embeddings", &input).success();
    let data = reply["data"].as_array().unwrap();
    assert_eq!(data[0]["embedding"], data[1]["embedding"]);
    assert_ne!(data[0]["embedding"], data[2]["embedding"]);
    let values = data[0]["embedding"].as_array().unwrap();
    assert_eq!(values.len(), 256);
    let length: f64 = values.iter().map(|v| v.as_f64().unwrap().powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-3);
    let base64 = json!({"input": "a dog", "encoding_format": "base64"});
    assert!(server.post("/v1/embeddings", &base64).success()["data"][0]["embedding"].is_string());

    let api = server.get("/openapi.json").success();
    for path in [CHAT, TEXT, "/v1/embeddings", "/tokenize", "/health", "/stb/info"] {
        assert!(api["paths"].get(path).is_some(), "{path}");
    }
    let page = server.get("/");
    assert_eq!(page.status, 200);
    let policy =
        page.head.lines().find(|l| l.to_ascii_lowercase().starts_with("content-security-policy"));
    assert!(policy.unwrap().contains("default-src 'none'") && !policy.unwrap().contains("unsafe"));
    assert!(server.metric("stb_http_requests_total") > 5.0);
}

#[test]
fn several_models_are_chosen_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small.stb");
    stb_tests::programs::convert(&quill(), &file, &["--recipe", "source"]);
    let server = Server::start(&[
        quill().to_str().unwrap(),
        "-m",
        file.to_str().unwrap(),
        "-c",
        "64",
        "-np",
        "2",
    ]);
    let ask = |model: Json| server.post(TEXT, &continuation("One day", json!({"model": model})));
    assert_eq!(ask("small".into()).success()["model"], "small");
    assert_eq!(ask("quill-4m".into()).success()["model"], "quill-4m");
    let error = ask("gpt-4".into()).error(404);
    assert!(error["message"].as_str().unwrap().contains("quill-4m, small"), "{error}");
    assert_eq!(ask(Json::Null).error(400)["param"], "model");
    assert_eq!(server.get("/stb/info?model=small").success()["context"], 64);
}

#[test]
fn sigterm_finishes_streams() {
    let server = quill_server(&[]);
    let fields = json!({"stream": true, "max_tokens": 200, "ignore_eos": true});
    let mut stream = server.begin(TEXT, &continuation(STORY, fields));
    stream.read_exact(&mut [0]).unwrap();
    server.signal("TERM");
    let chunks = chunks(&read_reply(stream));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    let (code, log) = server.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("completion_tokens=200") && !log.contains("little dog"), "{log}");
}
