//! llama.cpp's own test cases of tokenizers: vocabularies in GGUF files, texts (`.inp`) and the ids that
//! llama.cpp gives for them without a begin token (`.out`). Skipped where they are absent.
//!
//! `STB_GGUF_VOCAB` names another folder with such files, for example llama.cpp's `models`.

use std::path::{Path, PathBuf};

use serde_json::json;
use stb_format::gguf::Gguf;
use stb_runtime::{Tokenizer, from_folder, gguf_vocabulary, tokenizer_json};
use stb_tests::paths::shared;
use stb_tests::programs::{note, skip};

/// The texts of `FILE.inp` with the ids of `FILE.out`.
fn cases(file: &Path) -> Option<Vec<(String, Vec<u32>)>> {
    let read = |suffix: &str| {
        let name = format!("{}.{suffix}", file.file_name()?.to_str()?);
        std::fs::read_to_string(file.with_file_name(name)).ok()
    };
    let (texts, ids) = (read("inp")?, read("out")?);
    let texts = texts.split("\n__ggml_vocab_test__\n").map(str::to_owned);
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()));
    let cases: Vec<_> = texts.zip(ids.map(Iterator::collect)).collect();
    assert!(cases.len() > 40, "{} has {} cases", file.display(), cases.len());
    Some(cases)
}

fn check(file: &Path, tokenizer: &Tokenizer) {
    let Some(cases) = cases(file) else { return note(&format!("{} has no cases", file.display())) };
    for (text, ids) in &cases {
        assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{}: {text:?}", file.display());
    }
    note(&format!("{}: {} cases", file.display(), cases.len()));
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    files.sort();
    files
}

#[test]
fn vocabularies_of_gguf_files_give_the_ids_of_llama_cpp() {
    let Some(folder) = std::env::var_os("STB_GGUF_VOCAB")
        .map(PathBuf::from)
        .or_else(|| shared("data/tokenizers/gguf-vocab"))
    else {
        return skip("llama.cpp's vocabularies are not here");
    };
    let files = gguf_files(&folder);
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let gguf = Gguf::parse(&bytes).unwrap();
        let vocabulary = match gguf_vocabulary(&gguf) {
            Ok(vocabulary) => vocabulary.unwrap(),
            Err(error) => {
                // Encoders have other tokenizers.
                assert!(error.to_string().contains("\"bert\""), "{}: {error}", file.display());
                continue;
            }
        };
        let json = tokenizer_json(&vocabulary).unwrap();
        let count = vocabulary.tokens.len();
        let tokenizer = Tokenizer::new(&json, None, Vec::new(), count).unwrap();
        check(&file, &tokenizer);
    }
}

/// The same cases for Llama 3's ranks.
#[test]
fn llama_3_from_its_ranks_gives_the_ids_of_llama_cpp() {
    let (Some(source), Some(folder)) =
        (shared("data/tokenizers/llama3"), shared("data/tokenizers/gguf-vocab"))
    else {
        return skip("Llama 3 is not here");
    };
    let config = json!({ "added_tokens_decoder": {
        "128000": { "content": "<|begin_of_text|>", "special": true },
    }});
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("tokenizer.model"), copy.path().join("tokenizer.model")).unwrap();
    let json = from_folder(copy.path(), Some(&config.to_string())).unwrap().unwrap();
    let tokenizer = Tokenizer::new(&json, None, Vec::new(), 128_001).unwrap();
    check(&folder.join("ggml-vocab-llama-bpe.gguf"), &tokenizer);
}
