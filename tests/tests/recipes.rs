//! Every shipped recipe, through the programs: its files are valid and have the recipe's encodings, and a
//! killed conversion resumes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use stb_convert::Recipe;
use stb_convert::recipe::PRESETS;
use stb_format::encoding::{Dense, MatrixView};
use stb_format::{Encoding, File};
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

/// A calibration text for models with 32 tokens.
fn calibration(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("calibration.txt");
    std::fs::write(&path, "the quick brown fox jumps over the lazy dog ".repeat(40)).unwrap();
    path
}

/// The linear layers of the decoder in a file: name, encoding, exported weights and row length.
fn linears(file: &Path, folder: &Path) -> Vec<(String, Encoding, Vec<f32>, usize)> {
    let _ = run("stb-convert", &["export", text(file), text(folder), "--dtype", "f32"]).success();
    let exported = std::fs::read(folder.join("model.safetensors")).unwrap();
    let exported = safetensors::SafeTensors::deserialize(&exported).unwrap();
    let bytes = std::fs::read(file).unwrap();
    let parsed = File::open(&bytes).unwrap();
    let mut found = Vec::new();
    for tensor in parsed.tensors().iter().filter(|t| t.name().ends_with("_proj.weight")) {
        let values = exported.tensor(tensor.name()).unwrap();
        let values = values.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        let cols = tensor.shape()[1] as usize;
        found.push((tensor.name().to_owned(), tensor.encoding().clone(), values.collect(), cols));
    }
    found
}

/// Zeros in each group of 8 columns, with the width of the group.
fn zeros(values: &[f32], cols: usize) -> Vec<(usize, usize)> {
    let count = |group: &[f32]| (group.iter().filter(|w| **w == 0.0).count(), group.len());
    values.chunks(cols).flat_map(|row| row.chunks(8).map(count)).collect()
}

/// Each preset writes a valid file with its encoding, or reports that no encoding fits its values.
#[test]
fn every_preset_writes_its_encoding() {
    let folder = folder();
    let (source, calib) = (folder.path().join("model"), calibration(&folder));
    tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
    let (file, report) = (folder.path().join("m.stb"), folder.path().join("report.json"));
    // Those that choose encodings have tests of their own.
    let fixed = |name: &&str| Recipe::load(name).unwrap().linear.goal().is_none();
    for name in PRESETS.iter().map(|(name, _)| *name).filter(fixed) {
        let options = [
            "--recipe",
            name,
            "--calib",
            text(&calib),
            "--calib-samples",
            "6",
            "--calib-len",
            "40",
        ];
        let output = ["--force", "--report", text(&report), text(&source), text(&file)];
        let converted = run("stb-convert", &[&options[..], &output].concat());
        let err = converted.err.clone();
        let _ = converted.success();
        let _ = run("stb-convert", &["verify", text(&file)]).success();
        let report: Json =
            serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
        let method = Recipe::load(name).unwrap().linear.method();
        let exported = folder.path().join(format!("{name}.export"));
        for (tensor, encoding, _, cols) in linears(&file, &exported) {
            match &method.map(|method| method.fitted(cols)) {
                // The allocation may give a layer another N.
                Some(method) if matches!(encoding, Encoding::Stbllm(_)) => {
                    assert!(
                        matches!(method.quantizer().encoding(), Encoding::Stbllm(_)),
                        "{name} {tensor}"
                    );
                }
                Some(method) => {
                    assert_eq!(encoding, method.quantizer().encoding(), "{name} {tensor}")
                }
                None => assert_eq!(encoding, Encoding::Dense(Dense::F16), "{name} {tensor}"),
            }
        }
        let note = method.and_then(|method| method.quantizer().note());
        assert_eq!(note.is_some(), err.contains("note: "), "{name}: {err}");
        assert_eq!(note.is_some(), report["notes"].is_array(), "{name}");
        if let Some(note) = note {
            assert!(err.contains(&note), "{name}: {err}");
            // The paper's nominal size applies only to its structure.
            assert!(report["nominal_bits_paper"].is_null(), "{name}");
        }
        let layers = report["layers"].as_array().unwrap();
        assert_eq!(layers.is_empty(), method.is_none(), "{name}");
        for layer in layers {
            let stages = layer["stages"].as_object().unwrap();
            let sum: f64 = stages.values().map(|s| s.as_f64().unwrap()).sum();
            assert!(sum > 0.0 && sum <= layer["seconds"].as_f64().unwrap(), "{name}: {layer}");
        }
    }
}

/// Strict recipes are N:8: 8 − N zeros in each group of the exported weights, and in proportion in ragged
/// groups at the ends of rows. The result of the published code is not.
#[test]
fn strict_recipes_are_n_of_8() {
    let folder = folder();
    let calib = calibration(&folder);
    let ragged = folder.path().join("ragged");
    tiny::write(&ragged, &tiny::config(), Dense::F32, |_, _| {});
    let file = folder.path().join("m.stb");
    let (mut groups, mut surplus) = (0, 0);
    for name in [
        "stbllm-4of8",
        "stbllm-5of8",
        "stbllm-6of8",
        "stbllm-si-4of8",
        "stbllm-paper-4of8",
        "stbllm-published-strict",
        "billm-4of8",
        "billm-6of8",
    ] {
        let recipe = Recipe::load(name).unwrap();
        let n = usize::from(recipe.linear.method().unwrap().quantizer().kept_by_layer().unwrap().n);
        for (source, calib) in [(&ragged, Some(&calib)), (&quill(), None)] {
            let mut options =
                vec!["--recipe", name, "--force", "--calib-samples", "6", "--calib-len", "40"];
            if let Some(calib) = calib {
                options.extend(["--calib", text(calib)]);
            }
            convert(source, &file, &options);
            let exported = tempfile::tempdir_in(folder.path()).unwrap();
            for (tensor, encoding, values, cols) in linears(&file, exported.path()) {
                let found = zeros(&values, cols);
                // The N of the recipe, unless the encoding or the first group has another.
                let kept = match encoding {
                    Encoding::Stbllm(spec) => spec.n(),
                    _ if name == "stbllm-published-strict" => 8 - found[0].0,
                    _ => n,
                };
                for (zeros, width) in found {
                    let expected = width - (kept * width).div_ceil(8);
                    assert!(zeros >= expected, "{name} {tensor}, {kept} of 8: {zeros} zeros");
                    surplus += zeros - expected;
                    groups += 1;
                }
            }
        }
    }
    // A kept weight close to zero may become zero: ±α₁ ± α₂ with scales that rounding makes equal.
    assert!(groups > 100_000 && surplus * 1000 < groups, "{surplus} zeros more in {groups}");

    convert(
        &quill(),
        &file,
        &["--recipe", "stbllm-published-code", "--force", "--calib-samples", "6"],
    );
    let exported = folder.path().join("published");
    for (tensor, _, values, _) in linears(&file, &exported) {
        let zeros = values.iter().filter(|w| **w == 0.0).count();
        assert!(zeros * 20 < values.len(), "{tensor}: {zeros} zeros");
    }
}

/// Options of a conversion that takes long enough to be killed before its end.
const SLOW: [&str; 4] = ["--calib-samples", "48", "--calib-len", "128"];

/// Converts until `ready`, then kills the process without warning.
fn killed(out: &Path, options: &[&str], ready: impl Fn() -> bool) {
    let source = quill();
    let mut command =
        command("stb-convert", &[options, &SLOW, &[text(&source), text(out)]].concat());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < Duration::from_secs(120), "it is never ready");
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!out.exists());
}

fn finished(out: &Path, options: &[&str]) -> Run {
    let source = quill();
    run("stb-convert", &[options, &SLOW, &[text(&source), text(out)]].concat())
}

#[test]
fn a_killed_conversion_resumes_and_gives_the_same_bytes() {
    let folder = folder();
    for recipe in ["stbllm-4of8", "billm-4of8"] {
        let options = ["--recipe", recipe];
        let whole = folder.path().join(format!("{recipe}-whole.stb"));
        let _ = finished(&whole, &options).success();
        let whole = std::fs::read(&whole).unwrap();
        let name = format!("{recipe}.stb");
        let out = folder.path().join(&name);
        let unfinished = folder.path().join(format!(".{name}.unfinished"));
        // Killed before the first layer and after each layer but the last two. These leave a busy machine
        // enough time to notice.
        killed(&out, &options, || unfinished.join("output").exists());
        for layer in 0..2 {
            killed(&out, &options, || unfinished.join(format!("layer-{layer:05}")).exists());
        }
        let run = finished(&out, &options);
        assert!(run.err.contains("resuming after"), "{}", run.err);
        let _ = run.success();
        assert!(std::fs::read(&out).unwrap() == whole, "{recipe}: other bytes");
        assert!(!unfinished.exists(), "{recipe}: the folder was left");
    }
}

#[test]
fn files_of_another_or_damaged_conversion_are_discarded() {
    let folder = folder();
    let (out, unfinished) = (folder.path().join("m.stb"), folder.path().join(".m.stb.unfinished"));
    let expected = |recipe: &str| {
        let out = folder.path().join(format!("{recipe}.stb"));
        let _ = finished(&out, &["--recipe", recipe]).success();
        std::fs::read(out).unwrap()
    };
    // Another recipe.
    killed(&out, &["--recipe", "nm-2of8"], || unfinished.join("states").exists());
    let run = finished(&out, &["--recipe", "nm-1of8"]);
    assert!(run.err.contains("discarding"), "{}", run.err);
    let _ = run.success();
    assert!(std::fs::read(&out).unwrap() == expected("nm-1of8"));
    std::fs::remove_file(&out).unwrap();

    // A changed byte in any of the files.
    let whole = expected("nm-2of8");
    for damaged in ["states", "layer-00000", "key"] {
        killed(&out, &["--recipe", "nm-2of8"], || unfinished.join("states").exists());
        let path = unfinished.join(damaged);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let run = finished(&out, &["--recipe", "nm-2of8"]);
        assert!(!run.err.contains("resuming"), "{damaged}: {}", run.err);
        let _ = run.success();
        assert!(std::fs::read(&out).unwrap() == whole, "{damaged}: other bytes");
        std::fs::remove_file(&out).unwrap();
    }
}

/// Distillation changes scales and norms and nothing else: no size, no encoding, no code. The divergence from
/// the dense model falls with every encoding, and a killed distillation resumes.
#[test]
fn distillation_moves_scales_and_norms_only() {
    let folder = folder();
    for recipe in ["nm-1of4", "sign"] {
        let plain = folder.path().join(format!("{recipe}.stb"));
        let _ = finished(&plain, &["--recipe", recipe]).success();
        let out = folder.path().join(format!("{recipe}-tuned.stb"));
        let options = ["--recipe", recipe, "--distill", "1"];
        let unfinished = folder.path().join(format!(".{recipe}-tuned.stb.unfinished"));
        killed(&out, &options, || unfinished.join("layer-00003").exists());
        let run = finished(&out, &options);
        assert!(run.err.contains("resuming after"), "{}", run.err);
        let divergences = divergences(&run.err);
        let _ = run.success();
        let [unseen_before, unseen_after, before, after] = divergences;
        assert!(after < 0.95 * before, "{recipe}: {divergences:?}");
        assert!(unseen_after < 0.95 * unseen_before, "{recipe}: {divergences:?}");

        let (plain, tuned) = (std::fs::read(plain).unwrap(), std::fs::read(&out).unwrap());
        let (plain, tuned) = (File::open(&plain).unwrap(), File::open(&tuned).unwrap());
        let mut moved = 0;
        for (before, after) in plain.tensors().iter().zip(tuned.tensors()) {
            assert_eq!((before.name(), before.encoding()), (after.name(), after.encoding()));
            assert_eq!(before.payload().len(), after.payload().len(), "{}", before.name());
            moved += usize::from(before.payload() != after.payload());
            match (before.view().unwrap(), after.view().unwrap()) {
                (MatrixView::Nm(before), MatrixView::Nm(after)) => {
                    assert!(before.codes == after.codes);
                }
                (MatrixView::IntGroup(before), MatrixView::IntGroup(after)) => {
                    assert!(before.codes == after.codes);
                }
                _ => {}
            }
        }
        // Seven linear layers and two norms of each decoder layer, the embeddings and the last norm.
        assert_eq!(moved, 4 * 9 + 2, "{recipe}");
    }
}

/// Embeddings and lm_head that are quantized with a Hessian have the bytes of rounded ones and lose no more.
#[test]
fn compensated_tables_lose_no_more_than_rounded_ones() {
    let folder = folder();
    let stories = root().join("tests/data/stories.txt");
    let perplexity = |model: &Path, text_file: &Path| -> f64 {
        let options = ["--ctx", "128", "--windows", "16", "--json"];
        let args = [&["perplexity", text(model), "--text", text(text_file)], &options[..]].concat();
        let found: Json = serde_json::from_str(&run("stb-run", &args).success()).unwrap();
        found["perplexity"].as_f64().unwrap()
    };
    let recipe = |bits: u8, group: u16, rounding: &str| {
        let path = folder.path().join("recipe.toml");
        let table = format!("bits = {bits}\ngroup = {group}\nrounding = '{rounding}'\n");
        let recipe =
            format!("name = 'x'\n[body]\nmethod = 'source'\n[embeddings]\n{table}[head]\n{table}");
        std::fs::write(&path, recipe).unwrap();
        path
    };
    // Tied.
    let file = folder.path().join("m.stb");
    let convert_quill = |rounding: &str| {
        let recipe = recipe(2, 64, rounding);
        let options = ["--recipe", text(&recipe), "--calib-samples", "8", "--force"];
        convert(&quill(), &file, &options);
        let bytes = std::fs::read(&file).unwrap();
        let parsed = File::open(&bytes).unwrap();
        let table = parsed.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!(table.encoding().to_string(), "int2/g64");
        (table.payload().len(), perplexity(&file, &stories))
    };
    let (rounded, compensated) = (convert_quill("nearest"), convert_quill("compensated"));
    assert_eq!(rounded.0, compensated.0);
    assert!(compensated.1 < 1.02 * rounded.1, "{compensated:?}, rounded {rounded:?}");
    // Two tables, which are not tied.
    let source = folder.path().join("untied");
    tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
    let sample = calibration(&folder);
    let recipe = recipe(3, 32, "compensated");
    let options = ["--recipe", text(&recipe), "--calib", text(&sample), "--force"];
    convert(
        &source,
        &file,
        &[&options[..], &["--calib-samples", "6", "--calib-len", "40"]].concat(),
    );
    let _ = run("stb-convert", &["verify", text(&file)]).success();
    let [dense, packed] = [&source, &file].map(|model| perplexity(model, &sample));
    assert!((packed / dense).ln().abs() < 0.5, "{dense} became {packed}");
}

/// The divergences from the dense model that a distilled conversion prints: before and after on held-out text,
/// then on the training text.
fn divergences(err: &str) -> [f64; 4] {
    let line = err.lines().find(|line| line.contains("distillation: from")).unwrap();
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().unwrap()
}

/// A second conversion to the same file is refused while the first one runs.
#[test]
fn one_conversion_at_a_time() {
    let folder = folder();
    let (out, unfinished) = (folder.path().join("m.stb"), folder.path().join(".m.stb.unfinished"));
    let source = quill();
    let options = ["--recipe", "stbllm-4of8"];
    let all = [&options[..], &SLOW, &[text(&source), text(&out)]].concat();
    let mut first = command("stb-convert", &all);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !unfinished.join("output").exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    let error = finished(&out, &options).failure(2);
    assert!(error.contains("running"), "{error}");
    first.kill().unwrap();
    first.wait().unwrap();
}
