//! The check of a converted file: its verdict is found wherever a user may look, and sizes can be asked for by it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use stb_convert::calibration::CalibrationText;
use stb_convert::recipe::Calibration;
use stb_format::encoding::Dense;
use stb_format::{File, Quality, Verdict};
use stb_tests::paths::{quill, root};
use stb_tests::programs::{Run, command, convert, run};
use stb_tests::tiny;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Options of a quick conversion of the bundled model.
const QUICK: [&str; 4] = ["--calib-samples", "16", "--calib-len", "128"];

/// Converts the bundled model.
fn convert_quill(out: &Path, options: &[&str]) -> Run {
    let source = quill();
    run("stb-convert", &[options, &QUICK, &[text(&source), text(out)]].concat())
}

fn quality(file: &Path) -> Option<Quality> {
    let bytes = std::fs::read(file).unwrap();
    Quality::read(File::open(&bytes).unwrap().meta())
}

fn kl(file: &Path) -> f64 {
    quality(file).unwrap().figures.unwrap().kl.value
}

fn json(run: Run) -> Json {
    serde_json::from_str(&run.success()).unwrap()
}

/// The first line that `stb-run` prints to standard error with this file.
fn first_line(file: &Path) -> String {
    let args = [text(file), "--prompt", "Once", "-n", "1", "--no-template"];
    let run = run("stb-run", &args);
    let line = run.err.lines().find(|line| !line.is_empty()).unwrap_or_default().to_owned();
    let _ = run.success();
    line
}

#[test]
fn a_broken_file_is_called_broken_everywhere() {
    let folder = folder();
    let (file, report) = (folder.path().join("m.stb"), folder.path().join("report.json"));
    let stories = root().join("tests/data/stories.txt");
    let options = ["--bits", "1.35", "--calib", text(&stories), "--report", text(&report)];
    let converted = convert_quill(&file, &options);
    let err = converted.err.clone();
    let _ = converted.success();

    let stated = quality(&file).unwrap();
    assert_eq!(stated.verdict, Verdict::Broken, "{stated:?}");
    let figures = stated.figures.unwrap();
    assert!(figures.kl.value > 1.0 && figures.kl.error.unwrap() > 0.0, "{figures:?}");
    // Which one is larger says nothing: the text is not of the kind that this model knows.
    let perplexities = [figures.perplexity.value, figures.source_perplexity.value];
    assert!(
        perplexities.iter().all(|p| *p > 1.0) && perplexities[0] != perplexities[1],
        "{figures:?}"
    );
    assert!((0.0..1.0).contains(&figures.top1.value), "{figures:?}");
    assert!(figures.text.starts_with("built-in sha256:"), "{figures:?}");
    assert!(figures.tokens >= 3500 && figures.windows >= 8, "{figures:?}");

    // On the terminal, with what to do.
    let shown = format!("broken: KL divergence {:.4} ±", figures.kl.value);
    assert!(err.contains(&shown), "{err}");
    let advice = err.lines().find(|line| line.contains("--bits")).unwrap();
    let word = advice.split("--bits ").nth(1).unwrap().split(';').next().unwrap();
    let bits: f64 = word.parse().unwrap();
    assert!(bits > 1.35 && bits < 4.0, "{advice}");

    // In the report, and in both forms of `inspect`.
    let report: Json = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let inspection = json(run("stb-convert", &["inspect", "--json", text(&file)]));
    for found in [&report["quality"], &inspection["quality"]] {
        assert_eq!(found["verdict"], "broken");
        assert_eq!(found["kl"].as_f64(), Some(figures.kl.value));
        assert_eq!(found["tokens"].as_u64(), Some(figures.tokens));
    }
    assert_eq!(inspection["metadata"]["quality.verdict"], "broken");
    let bytes = std::fs::metadata(&file).unwrap().len();
    assert_eq!(report["file_bytes"].as_u64(), Some(bytes));
    let table = run("stb-convert", &["inspect", text(&file)]).success();
    assert!(table.contains(&shown), "{table}");
    let _ = run("stb-convert", &["verify", text(&file)]).success();

    // Where the file is used.
    let line = first_line(&file);
    assert!(line.contains("m.stb is broken") && line.contains("nats per token"), "{line}");
    let sample = folder.path().join("sample.txt");
    std::fs::write(&sample, "Once upon a time there was a dog. ".repeat(40)).unwrap();
    let evaluated = run("stb-run", &["perplexity", text(&file), "--text", text(&sample)]);
    assert!(evaluated.err.contains("is broken"), "{}", evaluated.err);

    // The estimate of the size is one: such a file is not broken.
    let larger = folder.path().join("larger.stb");
    let _ = convert_quill(&larger, &["--bits", &format!("{:.2}", bits * 1.1)]).success();
    assert!(kl(&larger) < 1.0, "{}", kl(&larger));
    assert!(!first_line(&larger).contains("broken"));
}

#[test]
fn the_figures_are_those_of_an_independent_evaluation() {
    let folder = folder();
    let file = folder.path().join("m.stb");
    let _ = convert_quill(&file, &["--recipe", "int3"]).success();
    let stated = quality(&file).unwrap();
    let figures = stated.figures.unwrap();
    // The same windows by `stb-run`; it does not round activations.
    let windows = held_out_text(&folder);
    let source = quill();
    let args = [
        "perplexity",
        text(&file),
        "--text",
        text(&windows),
        "--reference",
        text(&source),
        "--json",
        "--ctx",
        "512",
    ];
    let found = json(run("stb-run", &args));
    let near = |value: &Json, stated: f64, tolerance: f64| {
        let value = value.as_f64().unwrap();
        assert!((value / stated - 1.0).abs() < tolerance, "{value} {stated}");
    };
    near(&found["reference"]["perplexity"], figures.source_perplexity.value, 0.15);
    near(&found["perplexity"], figures.perplexity.value, 0.15);
    near(&found["reference"]["kl"], figures.kl.value, 0.3);
}

/// The part of the built-in text that is held out, special tokens of chats included.
fn held_out_text(folder: &TempDir) -> std::path::PathBuf {
    let engine = stb_runtime::Engine::open(&quill(), &stb_runtime::OpenOptions::default()).unwrap();
    let tokenizer = engine.model.tokenizer().unwrap();
    let text = CalibrationText::built_in();
    let held_out = text.held_out(&engine.model, &Calibration::default(), 512, 8).unwrap();
    let mut all = String::new();
    for part in held_out.windows.concat().split_inclusive(|token| tokenizer.is_special(*token)) {
        all += &tokenizer.decode(part).unwrap();
        let last = part.last().filter(|token| tokenizer.is_special(**token));
        all += &last.and_then(|token| tokenizer.token_text(*token)).unwrap_or_default();
    }
    let path = folder.path().join("held-out.txt");
    std::fs::write(&path, all).unwrap();
    path
}

#[test]
fn a_file_that_is_not_checked_says_so() {
    let folder = folder();
    let source = folder.path().join("model");
    tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
    let (file, report) = (folder.path().join("m.stb"), folder.path().join("report.json"));
    let options = ["--recipe", "source", "--no-check", "--report", text(&report)];
    let converted = run("stb-convert", &[&options[..], &[text(&source), text(&file)]].concat());
    assert!(converted.err.contains("not checked"), "{}", converted.err);
    let _ = converted.success();
    assert_eq!(quality(&file), Some(Quality::unchecked()));
    let report: Json = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["quality"]["verdict"], "unchecked");
    assert!(first_line(&file).contains("has not been checked"), "{}", first_line(&file));

    // A file that is as good as its source gives no line.
    convert(&source, &file, &["--recipe", "source", "--force"]);
    let stated = quality(&file).unwrap();
    assert!(stated.figures.unwrap().kl.value < 1e-4);
    assert_eq!(stated.verdict, Verdict::Close);
    assert!(!first_line(&file).contains("m.stb"), "{}", first_line(&file));
}

/// The check does not depend on threads or on interruptions.
#[test]
fn the_check_gives_the_same_bytes() {
    let folder = folder();
    let convert = |name: &str, options: &[&str]| {
        let file = folder.path().join(name);
        let _ = convert_quill(&file, &[&["--recipe", "nm-2of4"], options].concat()).success();
        std::fs::read(file).unwrap()
    };
    let whole = convert("whole.stb", &[]);
    assert!(convert("one.stb", &["-t", "1"]) == whole, "other bytes with one thread");
    assert!(convert("three.stb", &["-t", "3"]) == whole, "other bytes with three threads");
    let (out, source) = (folder.path().join("killed.stb"), quill());
    let unfinished = folder.path().join(".killed.stb.unfinished");
    for file in ["layer-00001", "layer-00003"] {
        let args = [&["--recipe", "nm-2of4"], &QUICK[..], &[text(&source), text(&out)]].concat();
        kill_when(&args, || unfinished.join(file).exists() || out.exists());
    }
    if !out.exists() {
        convert("killed.stb", &[]);
    }
    assert!(std::fs::read(&out).unwrap() == whole, "other bytes after interruptions");
}

/// Runs a conversion until `ready`, then kills it without warning.
fn kill_when(args: &[&str], ready: impl Fn() -> bool) {
    let mut command = command("stb-convert", args);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !ready() && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(300), "it is never ready");
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    child.wait().unwrap();
}

/// `--max-kl` finds a file that satisfies it, with the bytes of the `--bits` that it names, and a file a little
/// smaller does not satisfy it. A killed search resumes after its finished conversions.
#[test]
fn the_smallest_file_within_a_divergence_is_found() {
    let folder = folder();
    let (file, report) = (folder.path().join("m.stb"), folder.path().join("report.json"));
    let options = ["--max-kl", "0.3", "--report", text(&report)];
    let found = convert_quill(&file, &options);
    let err = found.err.clone();
    let _ = found.success();
    assert!(kl(&file) <= 0.3, "{err}");
    assert!(err.contains("conversion 1 of the search"), "{err}");
    let report: Json = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let search = report["search"].as_array().unwrap();
    assert!(!search.is_empty() && search.len() <= 5, "{search:?}");
    let kept = search.iter().find(|a| a["kl"].as_f64() == Some(kl(&file))).unwrap();
    let bits = kept["bits"].as_f64().unwrap();
    let same = folder.path().join("same.stb");
    let _ = convert_quill(&same, &["--bits", &bits.to_string()]).success();
    assert!(std::fs::read(&same).unwrap() == std::fs::read(&file).unwrap(), "other bytes");
    let smaller = folder.path().join("smaller.stb");
    let _ = convert_quill(&smaller, &["--bits", &format!("{:.3}", bits * 0.92)]).success();
    assert!(kl(&smaller) > 0.3, "{} at 0.92 of {bits}", kl(&smaller));

    let (out, source) = (folder.path().join("killed.stb"), quill());
    let unfinished = folder.path().join(".killed.stb.unfinished");
    let args = [&["--max-kl", "0.3"], &QUICK[..], &[text(&source), text(&out)]].concat();
    let finished = || {
        let entries = std::fs::read_dir(&unfinished).into_iter().flatten().flatten();
        entries.map(|e| e.path()).any(|path| path.extension().is_some_and(|e| e == "json"))
    };
    kill_when(&args, || finished() || out.exists());
    if !out.exists() {
        let _ = run("stb-convert", &args).success();
    }
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&file).unwrap(), "other bytes");
    assert!(!unfinished.exists(), "the folder was left");
}

#[test]
fn a_divergence_that_no_file_has_is_an_error() {
    let folder = folder();
    let source = folder.path().join("model");
    tiny::write(&source, &tiny::config(), Dense::F32, |_, _| {});
    let sample = folder.path().join("sample.txt");
    std::fs::write(&sample, "the quick brown fox jumps over the lazy dog ".repeat(40)).unwrap();
    let file = folder.path().join("m.stb");
    let calib = ["--calib", text(&sample), "--calib-samples", "6", "--calib-len", "40"];
    let args = [&calib[..], &["--max-kl", "1e-14", text(&source), text(&file)]].concat();
    let error = run("stb-convert", &args).failure(2);
    assert!(error.contains("the largest") && error.contains("--max-kl"), "{error}");
    assert!(!file.exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "a folder was left");
}

#[test]
fn what_cannot_be_measured_is_an_error_that_names_the_way_out() {
    let folder = folder();
    let file = folder.path().join("m.stb");
    // Finite weights whose products are not.
    let huge = folder.path().join("huge");
    tiny::write(&huge, &tiny::config(), Dense::F32, |name, values| {
        if name.contains("mlp.down_proj") {
            values.fill(3e38);
        }
    });
    let args = [&["--recipe", "source"][..], &[text(&huge), text(&file)]].concat();
    let error = run("stb-convert", &args).failure(4);
    assert!(error.contains("not finite") && error.contains("--no-check"), "{error}");
    let _ = run("stb-convert", &[&args[..], &["--no-check"]].concat()).success();
}

/// Models with a chat template answer questions before and after.
#[test]
fn answers_of_both_models_are_shown() {
    let folder = folder();
    let source = folder.path().join("model");
    tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
    let template = r#"{"chat_template": "{{ messages[0].content }}"}"#;
    std::fs::write(source.join("tokenizer_config.json"), template).unwrap();
    let (file, report) = (folder.path().join("m.stb"), folder.path().join("report.json"));
    let options = ["--recipe", "source", "--report", text(&report)];
    let converted = run("stb-convert", &[&options[..], &[text(&source), text(&file)]].concat());
    assert!(converted.err.contains("capital of France?  original: "), "{}", converted.err);
    assert!(converted.err.contains("this file: "), "{}", converted.err);
    let _ = converted.success();
    let report: Json = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let answers = report["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 3);
    for answer in answers {
        assert_eq!(answer["source"], answer["file"], "nothing was quantized: {answer}");
    }
}
