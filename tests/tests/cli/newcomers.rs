//! What users meet who come from other programs, and what their programs rely on.

use serde_json::Value as Json;
use stb_format::encoding::Dense;
use stb_tests::paths::quill;
use stb_tests::programs::{Run, command, convert, run};
use stb_tests::tiny;

use super::{folder, model, text};

/// A model of the Hugging Face hub is found in the local cache by its id.
#[test]
fn ids_of_the_hub_are_understood() {
    let home = folder();
    let _ = model(&home);
    let cached = home.path().join("models--org--tiny");
    std::fs::create_dir_all(cached.join("refs")).unwrap();
    std::fs::create_dir_all(cached.join("snapshots")).unwrap();
    std::fs::write(cached.join("refs/main"), "0123abc").unwrap();
    std::fs::rename(home.path().join("model"), cached.join("snapshots/0123abc")).unwrap();
    let at_home = |program, args: &[&str]| {
        let mut command = command(program, args);
        command.env("HF_HUB_CACHE", home.path()).current_dir(home.path());
        Run::from(command.output().unwrap())
    };
    let convert = ["org/tiny", "out.stb", "--recipe", "source", "--quiet"];
    let _ = at_home("stb-convert", &convert).success();
    assert!(home.path().join("out.stb").exists());
    let _ = at_home("stb-run", &["org/tiny", "-p", "a", "-n", "1"]).success();
    for (program, args) in
        [("stb-run", &["org/other", "-p", "a"][..]), ("stb-convert", &["org/other", "new.stb"])]
    {
        let error = at_home(program, args).failure(3);
        assert!(error.contains("hf download org/other"), "{error}");
    }
}

/// Files of other programs are named, and what to do with them.
#[test]
fn files_of_other_programs_are_recognized() {
    let folder = folder();
    for (name, content, word) in [
        ("a.stb", &b"GGUF\x03\0\0\0"[..], ".gguf"),
        ("b.stb", b"\x08\0\0\0\0\0\0\0{}      ", ".safetensors"),
        ("c.stb", b"<!doctype html><html>", "hf download"),
        ("d.bin", b"\x80\x02}q", "pickle"),
        (
            "e.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "git lfs pull",
        ),
        ("f.gguf", b"<html>", "web page"),
        ("g.onnx", b"\x08\x08\x12\x07pytorch", "ONNX"),
    ] {
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        std::fs::write(folder.path().join("config.json"), tiny::config().to_string()).unwrap();
        let error = run("stb-run", &[text(&file), "-p", "a"]).failure(4);
        assert!(error.contains(word) && error.contains(name), "{name}: {error}");
        let out = folder.path().join("out.stb");
        if !name.ends_with(".stb") {
            let error = run("stb-convert", &[text(&file), text(&out)]).failure(4);
            assert!(error.contains(word) && error.contains(name), "{name}: {error}");
        }
    }
    let file = model(&folder);
    let out = folder.path().join("out.stb");
    let error = run("stb-convert", &[text(&file), text(&out)]).failure(4);
    assert!(error.contains("is an .stb file already"), "{error}");
}

/// An export has the type of the original model, and files that others can read as they can any new file.
#[test]
fn exports_are_what_other_programs_expect() {
    let folder = folder();
    let (source, file) = (folder.path().join("source"), folder.path().join("a.stb"));
    let mut config = tiny::config();
    config["torch_dtype"] = "bfloat16".into();
    tiny::write(&source, &config, Dense::F32, |_, _| {});
    convert(&source, &file, &["--recipe", "source"]);
    let gguf = folder.path().join("out.gguf");
    let error = run("stb-convert", &["export", text(&file), text(&gguf)]).failure(2);
    assert!(error.contains("convert_hf_to_gguf.py") && !gguf.exists(), "{error}");
    let sizes = [None, Some("f32")].map(|dtype| {
        let out = folder.path().join(dtype.unwrap_or("default"));
        let mut args = vec!["export", text(&file), text(&out)];
        if let Some(dtype) = dtype {
            args.extend(["--dtype", dtype]);
        }
        let run = run("stb-convert", &args);
        let announced = format!("MB of {} weights", dtype.unwrap_or("bf16"));
        assert!(run.err.contains(&announced), "{}", run.err);
        let _ = run.success();
        let weights = std::fs::metadata(out.join("model.safetensors")).unwrap();
        let config = std::fs::metadata(out.join("config.json")).unwrap();
        assert_eq!(weights.permissions(), config.permissions());
        weights.len()
    });
    assert!(sizes[1] > sizes[0] * 3 / 2, "{sizes:?}");
}

#[test]
fn programs_can_read_what_verify_finds() {
    let folder = folder();
    let file = model(&folder);
    let json = |text: &str| serde_json::from_str::<Json>(text).unwrap();
    let found = json(&run("stb-convert", &["verify", text(&file), "--json"]).success());
    assert_eq!((&found["valid"], &found["model"]), (&true.into(), &true.into()));
    assert!(found["tensors"].as_u64().unwrap() > 10);
    let mut bytes = std::fs::read(&file).unwrap();
    // The first tensor begins after the head.
    bytes[4100] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let broken = run("stb-convert", &["verify", text(&file), "--json"]);
    assert_eq!(broken.code, Some(4));
    assert!(broken.err.contains("download or copy it again"), "{}", broken.err);
    let found = json(&broken.out);
    assert_eq!(found["valid"], false);
    assert!(found["rule"].as_str().unwrap().starts_with("STB-R-0"), "{found}");
}

/// Rounding needs no calibration.
#[test]
fn recipes_that_only_round_compute_no_statistics() {
    let folder = folder();
    let _ = model(&folder);
    let source = folder.path().join("model");
    let report = |recipe: &str| {
        let (out, report) = (folder.path().join(recipe), folder.path().join("report.json"));
        let options = ["--recipe", recipe, "--calib-samples", "4", "--report", text(&report)];
        convert(&source, &out, &options);
        serde_json::from_slice::<Json>(&std::fs::read(&report).unwrap()).unwrap()
    };
    let rounded = report("rtn-4bit");
    assert_eq!((&rounded["calibration_tokens"], &rounded["calibration"]), (&0.into(), &"".into()));
    assert_eq!(rounded["stages"]["hessian"], 0.0);
    assert_eq!(rounded["layers"].as_array().unwrap().len(), 2);
    assert!(rounded["layers"][0]["relative_error"].as_f64().unwrap() > 0.0);
    assert!(report("gptq-4bit")["calibration_tokens"].as_u64().unwrap() > 0);
}

/// A log of a conversion says how far it is, in plain lines.
#[test]
fn conversions_without_a_terminal_report_each_layer() {
    let folder = folder();
    let _ = model(&folder);
    let (source, out) = (folder.path().join("model"), folder.path().join("out.stb"));
    let args =
        [text(&source), text(&out), "--recipe", "int4", "--no-check", "--calib-samples", "4"];
    let run = run("stb-convert", &args);
    for layer in ["layer   1 of 2  ", "layer   2 of 2  "] {
        assert_eq!(run.err.matches(layer).count(), 1, "{}", run.err);
    }
    assert!(!run.err.contains('\u{1b}') && !run.err.contains('\r'), "{:?}", run.err);
    let _ = run.success();
}

/// Options as users of llama.cpp type them.
#[test]
fn options_of_llama_cpp_are_understood() {
    let folder = folder();
    let file = model(&folder);
    let ours = ["--prompt", "a", "-n", "8", "--temp", "0", "--quiet", text(&file)];
    let ours = run("stb-run", &ours).success();
    for theirs in [
        &["-m", text(&file), "-p", "a", "-n", "8", "--temp", "0", "-c", "0", "-ngl=0", "-q"][..],
        &[
            "--model",
            text(&file),
            "-p",
            "a",
            "--n-predict",
            "8",
            "--temp",
            "0",
            "--ctx-size",
            "32",
            "-q",
        ],
        &["-m", text(&file), "-p", "a", "--predict", "8", "--temp", "0", "-ngl", "0", "-q"],
    ] {
        assert_eq!(run("stb-run", theirs).success(), ours, "{theirs:?}");
    }
    // -1 is no limit: the answer ends with the context.
    let args =
        ["-m", text(&file), "-p", "a", "-n", "-1", "-c", "24", "--ignore-eos", "--json-stats"];
    let unlimited = run("stb-run", &args);
    assert!(unlimited.err.contains("\"finish\":\"context\""), "{}", unlimited.err);
    let _ = unlimited.success();
    // Both name the same option.
    let chat = ["-m", text(&file), "-i", "-cnv", "-p", "a", "-n", "8", "--temp", "0"];
    let _ = run("stb-run", &chat).success();
    let error = run("stb-run", &["-m", text(&file), text(&file)]).failure(2);
    assert!(error.contains("--model"), "{error}");
}

/// A .jsonl file with texts measures as the same documents in a text file.
#[test]
fn texts_may_be_lines_of_json() {
    let folder = folder();
    let (plain, lines) = (folder.path().join("a.txt"), folder.path().join("a.jsonl"));
    let documents = ["Once upon a time, there was a dog.", "One day, a \"cat\" sat down."];
    std::fs::write(&plain, documents.join("<>")).unwrap();
    let json = documents.map(|text| serde_json::json!({ "text": text }).to_string());
    std::fs::write(&lines, json.join("\n")).unwrap();
    let quill = quill();
    let measure = |more: &[&str]| {
        let start = ["perplexity", text(&quill), "--ctx", "8", "--json", "--text"];
        run("stb-run", &[&start[..], more].concat())
    };
    let figure = |run: Run| {
        let json: Json = serde_json::from_str(&run.success()).unwrap();
        json["perplexity"].as_f64().unwrap()
    };
    let of_lines = figure(measure(&[text(&lines)]));
    assert_eq!(of_lines, figure(measure(&[text(&plain), "--separator", "<>"])));
    let error = measure(&[text(&lines), "--rows"]).failure(2);
    assert!(error.contains("document per line"), "{error}");
}

/// A model file that is truncated while it is in use ends the program with a reason.
#[test]
#[cfg(target_os = "linux")]
fn a_truncated_mapping_is_explained() {
    use std::io::{Read, Write};
    use std::process::Stdio;

    let folder = folder();
    let file = folder.path().join("quill.stb");
    convert(&quill(), &file, &["--recipe", "source", "--no-check"]);
    let mut command = command("stb-run", &["--interactive", "--temp", "0", "-n", "8"]);
    command.arg(&file).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = child.stdin.take().unwrap();
    lines.write_all(b"Hello\n").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(4096).unwrap();
    // The program may have ended already.
    let _ = lines.write_all(b"Tell me a story.\n");
    drop(lines);
    let error = Run::from(child.wait_with_output().unwrap()).failure(3);
    assert!(error.contains("truncated while it was in use"), "{error}");
}
