//! Families of models beside LLaMA.

use std::path::Path;

use serde_json::{Value, json};
use stb_format::arch::Family;
use stb_runtime::{Engine, ErrorKind, OpenOptions, State};
use stb_tests::paths::{quill, root};
use tempfile::TempDir;

/// A copy of the bundled model, with `fields` in its `config.json`; null removes a field.
fn changed_quill(fields: &[(&str, Option<Value>)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "tokenizer.json"] {
        std::fs::copy(quill().join(name), folder.path().join(name)).unwrap();
    }
    let config = std::fs::read_to_string(quill().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (name, value) in fields {
        let config = config.as_object_mut().unwrap();
        match value {
            Some(value) => config.insert((*name).to_owned(), value.clone()),
            None => config.remove(*name),
        };
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// A Mistral model without sliding window computes what a LLaMA model of the same weights does.
#[test]
fn mistral_without_its_window_is_llama() {
    let mistral = changed_quill(&[
        ("model_type", Some(json!("mistral"))),
        ("sliding_window", Some(json!(null))),
    ]);
    let logits = |path: &Path| {
        let engine = Engine::open(path, &OpenOptions::exact()).unwrap();
        let mut state = State::new(&engine, 64);
        engine.forward(&mut state, &[1, 17, 200, 5]).unwrap().to_vec()
    };
    assert_eq!(logits(mistral.path()), logits(&quill()));
}

/// A missing field of Mistral means a window of 4096 tokens, null means none.
#[test]
fn a_missing_window_of_mistral_is_that_of_its_first_version() {
    let window = |fields: &[(&str, Option<Value>)]| {
        let model_type = ("model_type", Some(json!("mistral")));
        let context = ("max_position_embeddings", Some(json!(32_768)));
        let mistral = changed_quill(&[&[model_type, context], fields].concat());
        let engine = Engine::open(mistral.path(), &OpenOptions::exact()).unwrap();
        engine.model.spec.block(0).attention.window
    };
    assert_eq!(window(&[]), Some(4096));
    assert_eq!(window(&[("sliding_window", Some(json!(null)))]), None);
    assert_eq!(window(&[("sliding_window", Some(json!(64)))]), Some(64));
}

/// A family that this version lacks is refused with the list of those it has.
#[test]
fn other_families_are_refused_by_name() {
    for fields in [[("model_type", Some(json!("mamba")))], [("model_type", None)]] {
        let error = Engine::open(changed_quill(&fields).path(), &OpenOptions::exact()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("llama, mistral"), "{error}");
    }
}

/// The README names every family that the code reads.
#[test]
fn readme_lists_the_families() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let row =
        readme.lines().find(|line| line.starts_with("| architecture (`model_type`)")).unwrap();
    let supported = row.split('|').nth(2).unwrap();
    for model_type in Family::supported_model_types() {
        assert!(supported.contains(&format!("`{model_type}`")), "{model_type}: {supported}");
    }
    let named = supported.matches('`').count() / 2;
    assert_eq!(named, Family::supported_model_types().len(), "{supported}");
}
