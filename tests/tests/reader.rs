//! The Python reader of the specification, which shares no code with ours, refuses what ours
//! refuses, by the same rule, and decodes the same weights bit for bit.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use stb_format::encoding::Dense;
use stb_format::{File, ValueRef};
use stb_tests::paths::{quill, root, shared};
use stb_tests::programs::{Run, convert, skip};
use stb_tests::tiny;

/// A Python with numpy: a virtual environment under `target/`, made once. `None`, with a message, if that fails
/// and `STB_REQUIRE_PYTHON` is not set.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON.get_or_init(find_python).as_deref()
}

fn find_python() -> Option<PathBuf> {
    let folder = root().join("target/python");
    let python = folder.join("bin/python");
    let run = |program: &Path, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
    };
    let works = || run(&python, &["-c", "import numpy"]);
    if works()
        || (run(Path::new("python3"), &["-m", "venv", "--clear", text(&folder)])
            && run(&python, &["-m", "pip", "install", "--quiet", "numpy"])
            && works())
    {
        return Some(python);
    }
    let demanded = std::env::var_os("STB_REQUIRE_PYTHON").is_some();
    assert!(!demanded, "python3 with venv and pip is needed to test the Python reader");
    skip("the Python reader: python3 with venv, pip and a package registry are needed");
    None
}

fn read(python: &Path, args: &[&str]) -> Run {
    let reader = root().join("spec/reader/read_stb.py");
    Command::new(python).args(["-B", "-W", "error"]).arg(reader).args(args).output().unwrap().into()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Compares the weights and metadata of a file as read by both readers.
fn compare(python: &Path, path: &Path) {
    let _ = read(python, &["verify", text(path)]).success();
    let found: Json =
        serde_json::from_str(&read(python, &["hashes", text(path)]).success()).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let file = File::open(&bytes).unwrap();
    assert_eq!(found["parameters"].as_u64(), Some(file.parameters()));
    assert_eq!(found["true_bits"].as_f64(), Some(file.true_bits()));
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), file.tensors().len());
    for (theirs, ours) in tensors.iter().zip(file.tensors()) {
        assert_eq!(theirs["name"].as_str(), Some(ours.name()));
        let weights: Vec<u8> =
            ours.decode().unwrap().iter().flat_map(|w| w.to_le_bytes()).collect();
        let digest: String = Sha256::digest(&weights).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(theirs["sha256_f32_le"].as_str(), Some(&*digest), "{}", ours.name());
    }
    let keys = found["metadata"].as_object().unwrap();
    assert_eq!(keys.len(), file.meta().iter().count());
    for (key, value) in file.meta().iter() {
        if let ValueRef::Text(text) = value {
            assert_eq!(keys[key]["text"].as_str(), Some(text), "{key}");
        }
    }
}

#[test]
fn all_vectors() {
    let Some(python) = python() else { return };
    let manifest = root().join("spec/vectors/manifest.json");
    let summary = read(python, &["test", text(&manifest)]).success();
    assert!(summary.contains(" 0 failures"), "{summary}");
}

#[test]
fn converted_models() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let quick = ["--calib-samples", "4", "--calib-len", "64"];
    let file = folder.path().join("model.stb");
    for recipe in ["stbllm-4of8", "nm-2of8", "int4", "source"] {
        convert(&quill(), &file, &[&quick[..], &["--force", "--recipe", recipe]].concat());
        compare(python, &file);
    }
    // Widths that are no multiples of groups or blocks.
    let ragged = folder.path().join("ragged");
    tiny::write(&ragged, &tiny::config(), Dense::F16, |_, _| {});
    let mut sources = vec![ragged];
    for name in ["stories260k", "babyllama-105"] {
        match shared(&format!("data/models/{name}")) {
            Some(source) => sources.push(source),
            None => skip("third-party models are not here"),
        }
    }
    for source in sources {
        for recipe in ["stbllm-5of8", "nm-1of8", "nm-1of4", "nm-2of4", "int8"] {
            convert(&source, &file, &[&quick[..], &["--force", "--recipe", recipe]].concat());
            compare(python, &file);
        }
    }
}

/// The reader computes what transformers computes, for models of all families.
#[test]
fn losses_of_models() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(root().join("tests/data/families")).unwrap() {
        let source = entry.unwrap().path();
        let Ok(expected) = std::fs::read_to_string(source.join("expected.json")) else { continue };
        let expected: Json = serde_json::from_str(&expected).unwrap();
        let name = source.file_name().unwrap().to_str().unwrap();
        let checkpoint = folder.path().join(name);
        std::fs::create_dir(&checkpoint).unwrap();
        for file in ["config.json", "model.safetensors", "../tokenizer.json"] {
            let path = source.join(file);
            std::fs::copy(&path, checkpoint.join(path.file_name().unwrap())).unwrap();
        }
        let file = folder.path().join(format!("{name}.stb"));
        convert(&checkpoint, &file, &["--recipe", "source"]);
        let ids = expected["ids"].as_array().unwrap().iter().map(Json::to_string);
        let args = [vec!["losses".to_owned(), text(&file).to_owned()], ids.collect()].concat();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let losses: Json = serde_json::from_str(&read(python, &args).success()).unwrap();
        let (losses, expected) =
            (losses.as_array().unwrap(), expected["losses"].as_array().unwrap());
        assert_eq!(losses.len(), expected.len(), "{name}");
        for (found, expected) in losses.iter().zip(expected) {
            let difference = (found.as_f64().unwrap() - expected.as_f64().unwrap()).abs();
            assert!(difference < 1e-3, "{name}: {found}, expected {expected}");
        }
    }
}

/// Errors are one line with the rule, and the exit status is the documented one.
#[test]
fn damaged_files() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(root().join("spec/vectors/valid/model.stb")).unwrap();
    let file = folder.path().join("damaged.stb");
    for (at, bit) in [(0, 1), (20, 1), (70, 8), (5000, 1), (good.len() - 1, 4)] {
        let mut bytes = good.clone();
        bytes[at] ^= bit;
        std::fs::write(&file, &bytes).unwrap();
        let rule = stb_tests::vectors::verdict(&bytes).expect("every byte is covered");
        let error = read(python, &["verify", text(&file)]).failure(3);
        assert!(error.contains(rule.id()) && error.lines().count() == 1, "{error}");
    }
    let _ = read(python, &["verify", text(&folder.path().join("missing.stb"))]).failure(4);
}
