//! Untrusted files: each attack ends in one error, at once.

use serde_json::{Value, json};

use super::{Tokenizer, own_begin_token};

/// A tokenizer of a few letters with this part replaced.
fn file(part: &str, value: Value) -> String {
    let mut file = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, " ": 3},
            "merges": ["a b"]
        }
    });
    file[part] = value;
    file.to_string()
}

fn refusal(part: &str, value: Value) -> String {
    let json = file(part, value);
    let error = Tokenizer::new(&json, None, Vec::new(), 100).unwrap_err().to_string();
    assert!(own_begin_token(&json).is_err(), "{json}");
    assert!(error.contains("tokenizer.json") && !error.contains('\n'), "{error}");
    error
}

fn replace(pattern: Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

fn sequence(kind: &str, steps: Vec<Value>) -> Value {
    json!({"type": "Sequence", kind: steps})
}

/// The crate panics when it splits a text into which an empty match has put something.
#[test]
fn a_replaced_empty_match_is_an_error() {
    let mut base: Value = serde_json::from_str(&file("decoder", Value::Null)).unwrap();
    base["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let mut refused = |normalizer: Value| {
        base["normalizer"] = normalizer;
        Tokenizer::new(&base.to_string(), None, Vec::new(), 100).err().map(|e| e.to_string())
    };
    let found =
        ["", "x*", "a*"].map(|regex| replace(json!({"Regex": regex}), "ab")).map(&mut refused);
    assert!(found.iter().flatten().all(|e| e.contains("is damaged")), "{found:?}");
    assert_eq!(found.iter().flatten().count(), 3, "{found:?}");
    assert!(refusal("normalizer", replace(json!({"String": ""}), "ab")).contains("the empty text"));
}

#[test]
fn texts_do_not_multiply() {
    let double = replace(json!({"String": "a"}), "aa");
    for (part, kind) in [("normalizer", "normalizers"), ("decoder", "decoders")] {
        let error = refusal(part, sequence(kind, vec![double.clone(); 40]));
        assert!(error.contains("256 times as long"), "{error}");
    }
    let long = "a".repeat(1000);
    assert!(refusal("normalizer", replace(json!({"Regex": "a"}), &long)).contains("as long"));
    let prepend = json!({"type": "Prepend", "prepend": long});
    assert!(refusal("normalizer", prepend).contains("as long"));
    let mut map = 1024u32.to_le_bytes().to_vec();
    map.extend([0; 1024]);
    map.extend(long.as_bytes());
    let map = json!({"type": "Precompiled", "precompiled_charsmap": base64::encode(map)});
    assert!(refusal("normalizer", map).contains("as long"));
    let template = json!({
        "type": "TemplateProcessing",
        "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 100],
        "pair": [],
        "special_tokens": {}
    });
    assert!(refusal("post_processor", template).contains("64 steps"));
}

#[test]
fn steps_have_a_number_and_a_depth() {
    let mut deep = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    for _ in 0..20 {
        deep = sequence("normalizers", vec![deep]);
    }
    assert!(refusal("normalizer", deep).contains("8 deep"));
    let split = json!({"type": "WhitespaceSplit"});
    let many = sequence("pretokenizers", vec![split; 100]);
    assert!(refusal("pre_tokenizer", many).contains("64 steps"));
    assert!(
        refusal("pre_tokenizer", json!({"type": "FixedLength", "length": 0})).contains("length 0")
    );
    let regex = json!({"type": "Split", "pattern": {"Regex": "a|".repeat(20_000)}, "behavior": "Isolated", "invert": false});
    assert!(refusal("pre_tokenizer", regex).contains("regular expression"));
}

#[test]
fn tokens_have_a_length() {
    let long = "a".repeat(5000);
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], [long, -1.0]]});
    assert!(refusal("model", unigram).contains("5000 bytes"));
    let added = json!([{"id": 7, "content": long, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}]);
    assert!(refusal("added_tokens", added).contains("5000 bytes"));
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for json in
        ["", "[]", "null", "{}", "{\"model\": 3}", "\u{0}", "{\"normalizer\": {\"type\": 3}}"]
    {
        assert!(Tokenizer::new(json, None, Vec::new(), 100).is_err(), "{json}");
    }
    let nested = "[".repeat(100_000);
    for part in ["normalizer", "model", "added_tokens", "other"] {
        let json = format!("{{\"{part}\": {nested}");
        assert!(Tokenizer::new(&json, None, Vec::new(), 100).is_err(), "{part}");
    }
    for bad in [
        json!({"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
        json!({"type": "Unigram", "unk_id": 0, "vocab": []}),
    ] {
        assert!(Tokenizer::new(&file("model", bad), None, Vec::new(), 100).is_err());
    }
}

#[test]
fn settings_of_training_are_dropped() {
    let padding = json!({"strategy": {"Fixed": 1_000_000_000}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    let truncation =
        json!({"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    let dropout = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, " ": 3}, "merges": ["a b"], "dropout": 1.0});
    let template = json!({
        "type": "TemplateProcessing",
        "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 3],
        "pair": [],
        "special_tokens": {}
    });
    let parts = [
        ("padding", padding),
        ("truncation", truncation),
        ("model", dropout),
        ("post_processor", template),
    ];
    for (part, value) in parts {
        let json = file(part, value);
        let tokenizer = Tokenizer::new(&json, None, Vec::new(), 100).unwrap();
        assert_eq!(tokenizer.encode("ab a").unwrap(), [2, 3, 0], "{part}");
        assert_eq!(own_begin_token(&json).unwrap(), None, "{part}");
    }
}
