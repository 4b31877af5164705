//! The forward pass, tokenizer and evaluation on dense checkpoints equal the reference implementation
//! (transformers on PyTorch, f32), whose figures are next to the models.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;
use stb_runtime::{
    Engine, GenerateRequest, Message, OpenOptions, PerplexityOptions, PromptInput, Sampler,
    SamplerOptions, Session, SessionOptions, State, TextLayout, perplexity,
};
use stb_tests::paths::{quill, shared};
use stb_tests::programs::skip;

fn open(folder: &Path) -> (Arc<Engine>, Json) {
    let engine = Arc::new(Engine::open(folder, &OpenOptions::exact()).unwrap());
    let reference = std::fs::read_to_string(folder.join("reference.json")).unwrap();
    (engine, serde_json::from_str(&reference).unwrap())
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn floats(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Checks logits, losses and best tokens of a prompt.
fn check_prompt(engine: &Engine, prompt: &[u32], argmax: &[u32], nll: &[f64], last: &[f64]) {
    let mut state = State::new(engine, prompt.len());
    let vocab = engine.model.embeddings.rows();
    let mut rows = Vec::new();
    engine
        .forward_all(&mut state, prompt, |_, logits| {
            rows.extend(logits.chunks_exact(vocab).map(<[f32]>::to_vec));
        })
        .unwrap();
    for (t, row) in rows.iter().enumerate() {
        let best = (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        assert_eq!(best as u32, argmax[t], "position {t}");
        if let (Some(target), Some(expected)) = (prompt.get(t + 1), nll.get(t)) {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
            let loss = sum.ln() + f64::from(max - row[*target as usize]);
            assert!((loss - expected).abs() < 1e-4, "loss {loss} at {t}, reference {expected}");
        }
    }
    for (found, expected) in rows.last().unwrap().iter().zip(last) {
        assert!((f64::from(*found) - expected).abs() < 2e-4, "logit {found}, reference {expected}");
    }
}

/// Checks the greedy continuation. The reference may end with an end token, which is not part of an answer.
fn check_greedy(engine: &Arc<Engine>, prompt: &[u32], expected: &[u32]) {
    let count = expected.len();
    let options = SessionOptions { context: Some(prompt.len() + count + 1), template: false };
    let mut session = Session::new(Arc::clone(engine), options).unwrap();
    let mut sampler =
        Sampler::new(SamplerOptions { temperature: 0.0, ..SamplerOptions::default() });
    let request = GenerateRequest {
        max_tokens: Some(count),
        ..GenerateRequest::new(PromptInput::Tokens(prompt))
    };
    let mut streamed = Vec::new();
    let answer = session.generate(&request, &mut sampler, |piece| {
        streamed.extend(piece.token);
        ControlFlow::Continue(())
    });
    let found = answer.unwrap().tokens;
    assert_eq!(streamed, found);
    assert_eq!(found, expected[..found.len()]);
    let end = expected.get(found.len()).is_none_or(|t| session.tokenizer().eos.contains(t));
    assert!(end, "ended after {} of {count} tokens", found.len());
}

#[test]
fn quill_equals_its_reference() {
    let (engine, reference) = open(&quill());
    let prompt = ids(&reference["prompt_ids"]);
    check_prompt(
        &engine,
        &prompt,
        &ids(&reference["argmax"]),
        &floats(&reference["nll"]),
        &floats(&reference["last_logits_first64"]),
    );
    let expected = ids(&reference["greedy_ids"]);
    assert_eq!(&expected[..prompt.len()], prompt);
    check_greedy(&engine, &prompt, &expected[prompt.len()..]);
    let tokenizer = engine.model.tokenizer().unwrap();
    let text = reference["greedy_text"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&expected).unwrap(), text);
    assert_eq!(tokenizer.encode_prompt(&tokenizer.decode(&prompt).unwrap()).unwrap(), prompt);
}

#[test]
fn quill_chats_like_its_reference() {
    let (engine, reference) = open(&quill());
    let tokenizer = engine.model.tokenizer().unwrap();
    let template = engine.model.chat_template(&tokenizer).unwrap().unwrap();
    let user = "Tell me a story that begins: One day, a cat found a red ball.";
    let prompt = tokenizer.encode(&template.render(&[Message::new("user", user)]).unwrap());
    let prompt = prompt.unwrap();
    let expected = ids(&reference["chat_prompt_ids"]);
    assert_eq!(prompt, expected);
    let expected = ids(&reference["chat_greedy_ids"]);
    check_greedy(&engine, &prompt, &expected[prompt.len()..]);
}

#[test]
fn third_party_models_equal_their_references() {
    for name in ["stories260k", "babyllama-105"] {
        let Some(folder) = shared(&format!("data/models/{name}")) else {
            return skip("third-party models are not here");
        };
        let (engine, reference) = open(&folder);
        let forward = &reference["forward"];
        check_prompt(
            &engine,
            &ids(&forward["ids"]),
            &ids(&forward["argmax"]),
            &floats(&forward["nll_next"]),
            &floats(&forward["last_logits"]),
        );
        let expected = ids(&reference["greedy"]["output_ids"]);
        check_greedy(&engine, &ids(&reference["greedy"]["prompt_ids"]), &expected);
    }
}

/// Perplexities on WikiText-2 are within 0.1 % of the reference.
#[test]
fn perplexities_equal_the_reference() {
    let Some(text) = shared("data/text/wikitext-2/wiki.test.joined.txt") else {
        return skip("WikiText-2 is not here");
    };
    let text = std::fs::read_to_string(text).unwrap();
    for (name, context, expected) in [("stories260k", 512, 122.334), ("babyllama-105", 256, 24.210)]
    {
        let Some(folder) = shared(&format!("data/models/{name}")) else {
            return skip("third-party models are not here");
        };
        let (engine, reference) = open(&folder);
        let tokenizer = engine.model.tokenizer().unwrap();
        let options = PerplexityOptions { context, windows: None, layout: TextLayout::Whole };
        let result = perplexity(&engine, None, &tokenizer, &text, &options, &|_, _| {
            ControlFlow::Continue(())
        })
        .unwrap();
        let tokens = reference["wikitext2_raw_test"]["tokens"].as_u64().unwrap();
        assert_eq!(result.tokens as u64, tokens, "{name}");
        let found = result.perplexity.value;
        assert!((found / expected - 1.0).abs() < 1e-3, "{name}: {found}, reference {expected}");
    }
}
