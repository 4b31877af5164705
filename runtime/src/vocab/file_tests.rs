//! Hand-made files of a tokenizer, and hostile ones.

use std::path::Path;

use proptest::prelude::*;

use super::sentencepiece;
use super::*;
use crate::tokenizer::{Tokenizer, own_begin_token};

/// A field with a length.
fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend(content);
    out
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let mut content = bytes(1, text.as_bytes());
    content.push(2 << 3 | 5);
    content.extend(score.to_le_bytes());
    content.extend([3 << 3, kind]);
    bytes(1, &content)
}

/// A SentencePiece model with the merge of `▁` and `a`, and a user-defined token of two spaces.
fn model(kind: u8, normalizer: &[u8]) -> Vec<u8> {
    let pieces = [
        piece("<unk>", 0.0, 2),
        piece("<s>", 0.0, 3),
        piece("</s>", 0.0, 3),
        piece("▁a", -1.0, 1),
        piece("▁", -2.0, 1),
        piece("a", -2.0, 1),
        piece("▁▁", 0.0, 4),
    ];
    let mut model = pieces.concat();
    model.extend(bytes(2, &[3 << 3, kind]));
    model.extend(bytes(3, normalizer));
    model
}

/// A normalizer that removes no spaces and has these rules.
fn rules(map: &[u8]) -> Vec<u8> {
    let mut spec = bytes(2, map);
    spec.extend([4 << 3, 0]);
    spec
}

/// A map that turns `A` into `a`: a root, a unit for `A`, and its value, each in a block of 256.
fn lower_case_a() -> Vec<u8> {
    let mut units = vec![0u32; 0x300];
    units[0] = 0x100 << 10;
    units[0x141] = (0x141 ^ 0x200) << 10 | 1 << 8 | u32::from(b'A');
    units[0x200] = 1 << 31;
    let mut map = (4 * units.len() as u32).to_le_bytes().to_vec();
    map.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    map.extend(b"a\0");
    map
}

fn write(folder: &Path, files: &[(&str, &[u8])]) {
    for (name, content) in files {
        std::fs::write(folder.join(name), content).unwrap();
    }
}

/// The tokenizer of a folder with these files, and its begin token.
fn open(files: &[(&str, &[u8])], config: Option<&str>) -> Result<(Tokenizer, Option<u32>)> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), files);
    let json = from_folder(folder.path(), config)?.expect("there are files of a tokenizer");
    Ok((Tokenizer::new(&json, None, Vec::new(), 1000).unwrap(), own_begin_token(&json)?))
}

#[test]
fn a_sentence_piece_model() {
    let model = model(2, &rules(&[]));
    let (tokenizer, begin) = open(&[("tokenizer.model", &model)], None).unwrap();
    assert_eq!(begin, Some(1));
    // The user-defined token is found before a space is put in front.
    assert_eq!(tokenizer.encode("a a").unwrap(), [3, 3]);
    assert_eq!(tokenizer.encode("a  a").unwrap(), [3, 6, 3]);
    assert_eq!(tokenizer.decode(&[3, 6, 5]).unwrap(), "a  a");

    let config = r#"{"add_bos_token": false, "added_tokens_decoder": {
        "7": {"content": "<|user|>", "special": true}, "8": {"content": "tool", "special": false}}}"#;
    let more = br#"{"bye": 9}"#;
    let files = [("tokenizer.model", &model[..]), ("added_tokens.json", more)];
    let (tokenizer, begin) = open(&files, Some(config)).unwrap();
    assert_eq!(begin, None);
    assert_eq!(tokenizer.encode("<|user|>atoolbye").unwrap(), [7, 3, 8, 9]);
    assert!(tokenizer.is_special(7) && !tokenizer.is_special(8));

    let gap = r#"{"added_tokens_decoder": {"70": {"content": "x"}}}"#;
    let error = open(&[("tokenizer.model", &model)], Some(gap)).unwrap_err().to_string();
    assert!(error.contains("has id 70"), "{error}");
}

#[test]
fn options_of_the_normalizer() {
    let ids = |spec: &[u8], text: &str| {
        let model = model(2, spec);
        open(&[("tokenizer.model", &model)], None).unwrap().0.encode(text).unwrap()
    };
    assert_eq!(ids(&rules(&lower_case_a()), "A a"), [3, 3]);
    assert_eq!(ids(&rules(&[]), "A a"), [4, 0, 3]);
    // The defaults of SentencePiece: surplus spaces vanish, one is put in front.
    assert_eq!(ids(&[], " a "), [3]);
    assert_eq!(ids(&[3 << 3, 0, 4 << 3, 0], "a "), [5, 4]);
}

#[test]
fn models_that_cannot_be_expressed_are_refused() {
    let error = |model: &[u8]| open(&[("tokenizer.model", model)], None).unwrap_err();
    assert_eq!(error(&model(3, &[])).exit_code(), 5);
    assert_eq!(error(&model(2, &[5 << 3, 0])).exit_code(), 5);
    let cut = model(2, &[]);
    assert_eq!(error(&cut[..cut.len() - 1]).exit_code(), 4);
    assert_eq!(error(b"IQ== 0\nIg== 1\n").exit_code(), 5);
    assert_eq!(error(b"IQ== 0\nIg== 7\n").exit_code(), 4);
    assert_eq!(error(b"\xff").exit_code(), 4);
}

#[test]
fn vocab_json_and_merges_of_gpt2() {
    let vocab = br#"{"a": 0, "b": 1, "ab": 2, "<pad>": 3}"#;
    let files: [(&str, &[u8]); 3] = [
        ("vocab.json", vocab),
        ("merges.txt", b"#version: 0.2\na b\n"),
        ("special_tokens_map.json", br#"{"pad_token": {"content": "<pad>"}}"#),
    ];
    let class = r#"{"tokenizer_class": "GPT2Tokenizer"}"#;
    let (tokenizer, begin) = open(&files, Some(class)).unwrap();
    assert_eq!(begin, None);
    assert_eq!(tokenizer.encode("ab<pad>b").unwrap(), [2, 3, 1]);
    assert!(tokenizer.is_special(3));

    let model: [(&str, &[u8]); 1] = [("config.json", br#"{"model_type": "opt"}"#)];
    assert!(open(&[&files[..], &model[..]].concat(), None).is_ok());
    let refused = |config| open(&files, Some(config)).unwrap_err().exit_code();
    assert_eq!(refused(r#"{"tokenizer_class": "Qwen2Tokenizer"}"#), 5);
    assert_eq!(refused(r#"{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}"#), 5);
    assert_eq!(refused("{}"), 5);

    let twice = [("vocab.json", &br#"{"a": 0, "b": 0}"#[..]), files[1]];
    assert_eq!(open(&twice, Some(class)).unwrap_err().exit_code(), 4);
    let far = [("vocab.json", &br#"{"a": 0, "b": 99999999999}"#[..]), files[1]];
    assert_eq!(open(&far, Some(class)).unwrap_err().exit_code(), 4);
}

#[test]
fn a_folder_without_files_of_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(from_folder(folder.path(), None).unwrap(), None);
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_a_model(content in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = sentencepiece::parse(&content).and_then(|v| tokenizer_json(&v));
    }

    #[test]
    fn a_damaged_model_is_refused_or_works(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        kind in 1u8..3,
        text in "[Aa ▁é]{0,12}",
    ) {
        let mut model = model(kind, &rules(&lower_case_a()));
        for (at, byte) in damage {
            let length = model.len();
            model[at.index(length)] = byte;
        }
        if cut.index(4) == 0 {
            model.truncate(cut.index(model.len()));
        }
        if let Ok(json) = sentencepiece::parse(&model).and_then(|v| tokenizer_json(&v)) {
            let tokenizer = Tokenizer::new(&json, None, Vec::new(), 1 << 20).unwrap();
            if let Ok(ids) = tokenizer.encode(&text) {
                tokenizer.decode(&ids).unwrap();
            }
        }
    }

    /// Damage to the trie itself, where most damage of a whole model would be lost in zeros.
    #[test]
    fn damaged_rules_are_refused_or_work(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 1..3),
        text in "[A-Da é]{1,12}",
    ) {
        let mut map = lower_case_a();
        for (at, unit) in damage {
            let used = [4, 4 + 4 * 0x141, 4 + 4 * 0x200, 0];
            let start = *at.get(&used);
            map[start..start + 4].copy_from_slice(&unit.to_le_bytes());
        }
        let model = model(2, &rules(&map));
        if let Ok(json) = sentencepiece::parse(&model).and_then(|v| tokenizer_json(&v)) {
            Tokenizer::new(&json, None, Vec::new(), 1 << 20).unwrap().encode(&text).unwrap();
        }
    }
}
