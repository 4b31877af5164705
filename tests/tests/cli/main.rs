//! Error messages, and the output that pipes and scripts rely on.

mod card;
mod chat;
mod newcomers;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value as Json;
use stb_format::encoding::Dense;
use stb_tests::paths::{quill, root};
use stb_tests::programs::{Run, command, convert, run, skip};
use stb_tests::tiny;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A small valid model file.
fn model(folder: &TempDir) -> std::path::PathBuf {
    let (source, file) = (folder.path().join("model"), folder.path().join("model.stb"));
    if !file.exists() {
        tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
        convert(&source, &file, &["--recipe", "source"]);
    }
    file
}

const QUILL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/quill-4m");
const QUESTIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tasks/piqa_sample.jsonl");

/// Every command that reads an .stb file, as program and arguments around the file.
fn readers<'a>(file: &'a str, other: &'a str, new: &'a str) -> Vec<(&'static str, Vec<&'a str>)> {
    vec![
        ("stb-run", vec![file, "--prompt", "a", "-n", "2"]),
        ("stb-run", vec!["perplexity", file, "--text", other]),
        ("stb-run", vec!["perplexity", QUILL, "--text", other, "--reference", file]),
        ("stb-run", vec!["zero-shot", file, QUESTIONS]),
        ("stb-run", vec!["bench", file, "-p", "2", "-n", "1", "-r", "1"]),
        ("stb-convert", vec!["inspect", file]),
        ("stb-convert", vec!["verify", file]),
        ("stb-convert", vec!["export", file, new]),
        ("stb-convert", vec!["card", file, "-o", new]),
    ]
}

#[test]
fn bad_files_give_one_clear_error_and_the_documented_code() {
    let folder = folder();
    let good = std::fs::read(model(&folder)).unwrap();
    let other = folder.path().join("other.txt");
    std::fs::write(&other, "some text").unwrap();
    let new = folder.path().join("new");
    let bad = folder.path().join("bad.stb");
    let cases: [(&str, Option<Vec<u8>>, i32); 6] = [
        ("missing", None, 3),
        ("empty", Some(vec![]), 4),
        ("truncated", Some(good[..good.len() / 2].to_vec()), 4),
        (
            "flipped",
            Some(good.iter().enumerate().map(|(i, b)| b ^ u8::from(i == 100)).collect()),
            4,
        ),
        ("other type", Some(b"GGUF, or so they say".repeat(400)), 4),
        ("newer", Some(newer(&good)), 5),
    ];
    for (what, content, code) in cases {
        let _ = std::fs::remove_file(&bad);
        if let Some(content) = content {
            std::fs::write(&bad, content).unwrap();
        }
        for (program, args) in readers(text(&bad), text(&other), text(&new)) {
            let error = run(program, &args).failure(code);
            assert!(error.contains("bad.stb"), "{what}, {program} {args:?}: {error}");
            assert_eq!(error.trim_end().lines().count(), 1, "{what}, {program} {args:?}: {error}");
        }
        assert!(!new.exists(), "{what}: export left a folder");
    }
    // A folder instead of a file.
    let error = run("stb-convert", &["inspect", text(folder.path())]).failure(3);
    assert!(error.contains("not a regular file"), "{error}");
}

/// A copy of a file with the version number of a later format.
fn newer(good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let version = (stb_format::VERSION + 1).to_le_bytes();
    bytes[8..10].copy_from_slice(&version);
    bytes[10..12].copy_from_slice(&version);
    let sum = stb_format::checksum(&bytes[..4088]);
    bytes[4088..4096].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A file cut at each 64th of its length is refused.
#[test]
fn truncated_files_are_refused() {
    let folder = folder();
    let good = std::fs::read(model(&folder)).unwrap();
    let bad = folder.path().join("bad.stb");
    for part in 0..64 {
        std::fs::write(&bad, &good[..good.len() * part / 64]).unwrap();
        let error = run("stb-run", &[text(&bad), "--prompt", "a"]).failure(4);
        assert!(error.contains("STB-R-00"), "{part}/64: {error}");
    }
}

#[test]
fn wrong_usage_is_explained() {
    let folder = folder();
    let file = model(&folder);
    let out = folder.path().join("out.stb");
    let source = folder.path().join("model");
    let cases: Vec<(&str, Vec<&str>, &str)> = vec![
        ("stb-run", vec![], "give a model file"),
        // The input of these programs is empty.
        ("stb-run", vec![text(&file)], "there is no prompt"),
        ("stb-run", vec![text(&file), "bench"], "a command comes first: stb-run bench "),
        ("stb-run", vec!["serv", text(&file)], "did you mean stb-run serve?"),
        ("stb-run", vec!["perplexit"], "did you mean stb-run perplexity?"),
        ("stb-run", vec![text(&file), "Hello"], "a prompt is --prompt TEXT"),
        ("stb-convert", vec!["insepct", text(&file)], "did you mean stb-convert inspect?"),
        ("stb-convert", vec![text(&file), "verify"], "a command comes first: stb-convert verify "),
        ("stb-convert", vec![text(&file), text(&out), "more"], "one argument too many"),
        ("stb-run", vec![text(&file), "--temp", "-1"], "finite number"),
        ("stb-run", vec![text(&file), "--top-p", "1.5"], "between 0 and 1"),
        ("stb-run", vec![text(&file), "--no-such-flag"], "--no-such-flag"),
        ("stb-run", vec![text(&file), "--prompt", "a", "-c", "1"], "context"),
        ("stb-run", vec![text(&file), "-t", "0"], "threads"),
        ("stb-run", vec![text(&file), "--mlock", "--no-mmap"], "--no-mmap"),
        ("stb-run", vec!["bench", text(&file), "--batch", "99999999999"], "batch"),
        ("stb-run", vec!["bench", text(&file), "--depth", "18446744073709551615"], "depth"),
        ("stb-run", vec!["perplexity", text(&file), "--kv", "q8", "--text", "Cargo.toml"], "exact"),
        ("stb-convert", vec![], "give a checkpoint"),
        ("stb-convert", vec![text(&source)], "give a file to write"),
        ("stb-convert", vec![text(&source), text(&file)], "--force"),
        ("stb-convert", vec![text(&source), text(folder.path()), "--force"], "regular file"),
        ("stb-convert", vec![text(&source), text(&out), "--recipe", "nonsense"], "stbllm-4of8"),
        ("stb-convert", vec![text(&source), text(&out), "--bits", "-1"], "above 0"),
        ("stb-convert", vec![text(&source), text(&out), "--max-kl", "0"], "above 0"),
        ("stb-convert", vec![text(&source), text(&out), "--max-kl", "1", "--bits", "3"], "--bits"),
        (
            "stb-convert",
            vec![text(&source), text(&out), "--max-kl", "1", "--no-check"],
            "--no-check",
        ),
        ("stb-convert", vec![text(&source), text(&out), "--no-check"], "--recipe"),
        ("stb-convert", vec![text(&source), text(&out), "--calib-len", "1"], "calib-len"),
        (
            "stb-convert",
            vec![text(&source), text(&out), "--calib-samples", "4000000000"],
            "MB of memory",
        ),
        ("stb-convert", vec!["recipes", "nonsense"], "stbllm-4of8"),
    ];
    for (program, args, word) in cases {
        let error = run(program, &args).failure(2);
        assert!(error.contains(word), "{program} {args:?}: {error}");
    }
    assert!(!out.exists());
    let mut forced = command("stb-run", &[text(&file), "--prompt", "a"]);
    forced.env("STB_ISA", "quantum");
    let error = Run::from(forced.output().unwrap()).failure(2);
    assert!(error.contains("quantum") && error.contains("scalar"), "{error}");
}

#[test]
fn checkpoints_that_cannot_be_converted_are_refused() {
    let folder = folder();
    let base = tiny::config();
    let out = folder.path().join("out.stb");
    let mut count = 0;
    let mut refuse = |code: i32, word: &str, config: &Json, spoil: &dyn Fn(&Path)| {
        count += 1;
        let source = folder.path().join(format!("m{count}"));
        let write =
            std::panic::AssertUnwindSafe(|| tiny::write(&source, &base, Dense::F32, |_, _| {}));
        write();
        std::fs::write(source.join("config.json"), config.to_string()).unwrap();
        spoil(&source);
        let error = run("stb-convert", &[text(&source), text(&out)]).failure(code);
        assert!(error.contains(word), "{word}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        assert!(!out.exists(), "{word}: a file was left");
    };
    let with = |key: &str, value: Json| {
        let mut config = tiny::config();
        config[key] = value;
        config
    };
    let nothing = |_: &Path| {};
    refuse(5, "mamba", &with("model_type", "mamba".into()), &nothing);
    refuse(5, "mish", &with("hidden_act", "mish".into()), &nothing);
    refuse(4, "shape", &with("intermediate_size", 104.into()), &nothing);
    refuse(4, "no tensor", &with("num_hidden_layers", 3.into()), &nothing);
    refuse(5, "model.layers.1", &with("num_hidden_layers", 1.into()), &nothing);
    refuse(4, "embeddings", &with("vocab_size", 20.into()), &|source| {
        // Fewer rows of embeddings than tokens of the tokenizer.
        tiny::write(source, &with("vocab_size", 20.into()), Dense::F32, |_, _| {});
    });
    refuse(4, "tokenizer.json", &base, &|source| {
        std::fs::remove_file(source.join("tokenizer.json")).unwrap();
    });
    refuse(4, "config.json", &base, &|source| {
        std::fs::remove_file(source.join("config.json")).unwrap();
    });
    refuse(4, "NaN", &base, &|source| {
        tiny::write(source, &base, Dense::F32, |name, values| {
            if name.contains("layers.1.mlp.up") {
                values[77] = f32::NAN;
            }
        });
    });
    refuse(4, "safetensors", &base, &|source| {
        std::fs::write(source.join("model.safetensors"), b"\x08\0\0\0\0\0\0\0notjson!").unwrap();
    });
    refuse(4, "safetensors", &base, &|source| {
        let path = source.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 9]).unwrap();
    });
    refuse(4, "neither", &base, &|source| {
        std::fs::remove_file(source.join("model.safetensors")).unwrap();
    });
    let index = folder.path().join("m1/model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    let error = run("stb-convert", &[text(&index), text(&out)]).failure(4);
    assert!(error.contains("path"), "{error}");
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let folder = folder();
    let _ = model(&folder);
    let source = folder.path().join("model");
    let nowhere = folder.path().join("no/such/folder/out.stb");
    let error = run("stb-convert", &[text(&source), text(&nowhere)]).failure(3);
    assert!(error.contains("no/such/folder/out.stb: there is no folder"), "{error}");
}

/// Standard output is model text and nothing else; statistics are JSON on standard error.
#[test]
fn pipes_get_text_only() {
    let args = ["--no-template", "-n", "12", "--temp", "0", "--json-stats"];
    let mut command = command("stb-run", &args);
    command.arg(quill()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Once upon a time").unwrap();
    let run = Run::from(child.wait_with_output().unwrap());
    let stats: Json = serde_json::from_str(run.err.trim()).unwrap();
    assert_eq!(stats["decode_tokens"], 12);
    assert_eq!(stats["finish"], "length");
    let out = run.success();
    assert!(out.starts_with(", there was a little") && out.ends_with('\n'), "{out:?}");
    assert!(!out.contains('\u{1b}') && !out.contains("<|"), "{out:?}");
}

/// A machine without a GPU reports that in one line, but only if a device was requested.
#[test]
fn a_machine_without_a_device_reports_it_in_one_line() {
    let list = run("stb-run", &["--list-devices"]);
    let why = list.err.clone();
    let devices = list.success();
    assert!(devices.starts_with("cpu     "), "{devices}");
    if devices.contains("cuda:") {
        skip("this machine has a CUDA device");
        return;
    }
    assert_eq!(devices.lines().count(), 1, "{devices}");
    assert!(why.starts_with("no CUDA device: ") && why.lines().count() == 1, "{why}");

    let folder = folder();
    let file = model(&folder);
    let base = [text(&file), "--prompt", "a", "-n", "3", "--temp", "0", "--quiet"];
    let on_cpu = run("stb-run", &[&base[..], &["--device", "cpu"]].concat());
    assert_eq!(on_cpu.err, "");
    let expected = on_cpu.success();
    let auto = run("stb-run", &[&base[..], &["--device", "auto"]].concat());
    assert_eq!(auto.err, format!("{}; the CPU computes\n", why.trim_end()));
    assert_eq!(auto.success(), expected);
    let mut silent = command("stb-run", &base);
    let silent = Run::from(silent.env_remove("STB_DEVICE").output().unwrap());
    assert_eq!(silent.err, "");
    assert_eq!(silent.success(), expected);
    for device in ["cuda", "cuda:3"] {
        let error = run("stb-run", &[&base[..], &["--device", device, "-ngl", "1"]].concat());
        let error = error.failure(5);
        assert_eq!(error, format!("stb-run: {why}"), "{device}");
    }
    let with = |more: &[&str]| run("stb-run", &[&base[..], more].concat()).failure(2);
    assert!(with(&["--device", "gpu"]).contains("auto, cpu, cuda or cuda:N"));
    assert!(with(&["-ngl", "many"]).contains("gpu-layers"));
    assert!(with(&["-ngl", "1", "--device", "cpu"]).contains("--device cuda"));
    let mut layers = command("stb-run", &[&base[..], &["-ngl", "1"]].concat());
    let layers = Run::from(layers.env_remove("STB_DEVICE").output().unwrap());
    assert!(layers.err.contains("the CPU computes"), "{}", layers.err);
    assert_eq!(layers.success(), expected);
}

#[test]
fn stop_texts_end_the_answer() {
    let base = ["--no-template", "--temp", "0", "-n", "60", "--prompt", "Once upon a time"];
    let quill = quill();
    let all = run("stb-run", &[&base[..], &[text(&quill)]].concat()).success();
    let cut = run("stb-run", &[&base[..], &["--stop", ". She", text(&quill)]].concat()).success();
    assert!(all.contains(". She"));
    assert_eq!(cut.trim_end(), all.split(". She").next().unwrap());
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut command = command("stb-convert", &["recipes"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(child.wait().unwrap().success(), "{err}");
    assert_eq!(err, "");
}

/// Sends Ctrl-C when `ready` returns and waits for the end.
#[cfg(unix)]
fn interrupt(mut command: std::process::Command, ready: impl FnOnce(&mut Child)) -> Run {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    ready(&mut child);
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args(["-INT", &child.id().to_string()]).status().unwrap().success());
    Run::from(child.wait_with_output().unwrap())
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_half_written() {
    let folder = folder();
    let out = folder.path().join("out.stb");
    // More calibration than finishes during the test.
    let recipe = ["--recipe", "stbllm-4of8", "--calib-samples", "2000"];
    let source = quill();
    let options = [&recipe[..], &[text(&source), text(&out)]].concat();
    let entries = || std::fs::read_dir(folder.path()).unwrap().count();
    let run = interrupt(command("stb-convert", &options), |child| {
        while entries() == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(300));
    });
    assert_eq!(run.code, Some(130), "{}", run.err);
    assert!(run.err.contains("interrupted"), "{}", run.err);
    assert_eq!(entries(), 0, "a partial file was left");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer() {
    let args = ["--no-template", "--prompt", "Once", "--ignore-eos"];
    let mut command = command("stb-run", &args);
    command.arg(quill()).args(["-c", "100000"]);
    let run = interrupt(command, |child| {
        // Wait until an answer has begun.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 16]).unwrap();
    });
    assert_eq!(run.code, Some(130), "{}", run.err);
    assert!(run.err.contains("interrupt"), "{}", run.err);
}

/// The help texts are part of the interface. `STB_BLESS=1` accepts a deliberate change.
#[test]
fn help_texts_are_as_committed() {
    for (program, args, name) in [
        ("stb-run", vec!["--help"], "stb-run.txt"),
        ("stb-run", vec!["perplexity", "--help"], "stb-run-perplexity.txt"),
        ("stb-run", vec!["zero-shot", "--help"], "stb-run-zero-shot.txt"),
        ("stb-run", vec!["bench", "--help"], "stb-run-bench.txt"),
        ("stb-run", vec!["serve", "--help"], "stb-run-serve.txt"),
        ("stb-convert", vec!["--help"], "stb-convert.txt"),
        ("stb-convert", vec!["recipes"], "stb-convert-recipes.txt"),
        ("stb-convert", vec!["card", "--help"], "stb-convert-card.txt"),
        ("stb-convert", vec!["study", "--help"], "stb-convert-study.txt"),
        ("stb-convert", vec!["flips", "--help"], "stb-convert-flips.txt"),
    ] {
        let mut command = command(program, &args);
        command.env("COLUMNS", "100").env_remove("CLICOLOR_FORCE").env_remove("STB_DEVICE");
        let help = Run::from(command.output().unwrap()).success();
        let path = root().join("tests/golden").join(name);
        if std::env::var_os("STB_BLESS").is_some() {
            std::fs::write(&path, &help).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(help, golden, "{}", path.display());
    }
}
