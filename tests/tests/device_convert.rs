//! Compares a conversion with its large products on an emulated CUDA device with that of the CPU.

#[path = "../../kernels/tests/common/mod.rs"]
mod common;

use std::path::Path;

use common::machine::device;
use serde_json::json;
use stb_convert::report::Report;
use stb_format::File;
use stb_format::encoding::Dense;
use stb_kernels::cuda::Device;
use stb_tests::conversion::converted;
use stb_tests::random_model::letters;
use stb_tests::tiny;

/// Converts to `target`. Returns the report and the decoded weights by name.
fn convert(
    folder: &Path,
    target: &Path,
    recipe: &str,
    device: Option<Device>,
) -> (Report, Vec<(String, Vec<f32>)>) {
    let (source, text) = (folder.join("source"), folder.join("calibration.txt"));
    let report = converted(&source, target, recipe, &text, 10, 24, device).unwrap();
    let bytes = std::fs::read(target).unwrap();
    let file = File::open(&bytes).unwrap();
    let tensors = file.tensors().iter();
    (report, tensors.map(|t| (t.name().to_owned(), t.decode().unwrap())).collect())
}

/// The pipeline gives the same file size and errors as on the CPU; decisions differ only by rounding.
fn same_as_on_the_cpu(recipes: &[&str]) {
    let Some(device) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny::config();
    // Several blocks of columns in a row, ragged; both more inputs than outputs and fewer.
    config["hidden_size"] = json!(152);
    config["intermediate_size"] = json!(300);
    config["num_hidden_layers"] = json!(2);
    tiny::write(&folder.path().join("source"), &config, Dense::Bf16, |_, _| {});
    std::fs::write(folder.path().join("calibration.txt"), letters(2000)).unwrap();
    for recipe in recipes {
        let (host, expected) =
            convert(folder.path(), &folder.path().join("host.stb"), recipe, None);
        let target = folder.path().join("device.stb");
        let (on_device, found) = convert(folder.path(), &target, recipe, Some(device.clone()));
        assert_eq!(host.file_bytes, on_device.file_bytes, "{recipe}");
        // Sums are rounded differently, which shows that the device computed the products.
        let mut same = host.tensors.iter().zip(&on_device.tensors);
        assert!(same.any(|(a, b)| a.relative_error != b.relative_error), "{recipe}");
        for (a, b) in host.tensors.iter().zip(&on_device.tensors) {
            let (a, b, name) = (a.relative_error, b.relative_error, &a.name);
            assert!((a - b).abs() <= 0.05 * a + 1e-9, "{recipe} {name}: error {b} instead of {a}");
        }
        for ((name, a), (_, b)) in expected.iter().zip(&found) {
            let most = a.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            let differ = a.iter().zip(b).filter(|(a, b)| (*a - *b).abs() > 0.01 * most).count();
            // A decision that rounding changes affects later layers, and with them other decisions.
            let is_first = ["layers.0.self_attn", "embed", "head"].iter().any(|p| name.contains(p));
            let most = if is_first { a.len() / 100 } else { a.len() };
            assert!(differ <= most, "{recipe} {name}: {differ} of {} differ", a.len());
        }
    }
}

#[test]
fn nm() {
    let folder = tempfile::tempdir().unwrap();
    // Blocks of scales that do not divide the quantizer's blocks of columns.
    let odd = folder.path().join("odd.toml");
    let text = "name = 'odd'\ndescription = ''\n[calibration]\ninputs = 'refreshed'\ntarget = 'dense'\n\
                [body]\nmethod = 'nm'\nn = 2\nm = 8\nblock = 96\nscale-bits = 4\nsweeps = 2\n";
    std::fs::write(&odd, text).unwrap();
    same_as_on_the_cpu(&["nm-2of8", odd.to_str().unwrap()]);
}

#[test]
fn stbllm() {
    same_as_on_the_cpu(&["stbllm-4of8", "stbllm-published-strict"]);
}

#[test]
fn integers_and_partial_binarization() {
    same_as_on_the_cpu(&["int3", "gptq-4bit", "pb-llm"]);
}
