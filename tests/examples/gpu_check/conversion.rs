//! Conversion with its large products on the GPU: compares the errors with those of the CPU, and measures the
//! time of a decoder layer of a large model.

use std::path::Path;

use anyhow::ensure;
use serde_json::{Value, json};
use stb_convert::report::Report as Conversion;
use stb_kernels::cuda::Device;
use stb_tests::conversion::converted;
use stb_tests::random_model::{checkpoint, letters, shape};

use crate::report::Report;

/// Converts the checkpoint `folder`/source.
fn convert(
    folder: &Path,
    recipe: &str,
    samples: usize,
    length: usize,
    device: Option<Device>,
) -> anyhow::Result<Conversion> {
    let text = folder.join("calibration.txt");
    std::fs::write(&text, letters(2 * samples * length))?;
    let (source, target) = (folder.join("source"), folder.join("out.stb"));
    converted(&source, &target, recipe, &text, samples, length, device)
}

/// Compares the errors of a small random model converted on the GPU and on the CPU.
pub(crate) fn compare(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    checkpoint(&folder.path().join("source"), &shape("tiny", None)?);
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for recipe in ["nm-2of8", "stbllm-4of8", "stbllm-published-strict", "int3", "pb-llm"] {
        let host = convert(folder.path(), recipe, 16, 64, None)?;
        let here = convert(folder.path(), recipe, 16, 64, Some(device.clone()))?;
        let pairs = host.tensors.iter().zip(&here.tensors);
        let differences = pairs
            .map(|(a, b)| (a.relative_error - b.relative_error).abs() / a.relative_error.max(1e-9));
        // NaN counts as an infinite difference.
        let most =
            differences.fold(0.0, |most, d| if d.is_nan() { f64::INFINITY } else { d.max(most) });
        let [a, b] = [&host, &here].map(|r| r.layers.iter().map(|l| l.relative_error).sum::<f64>());
        report.line(&format!(
            "  {recipe:<24} error of the layers {b:.5} (CPU {a:.5}), largest difference of a matrix {:.1} %",
            100.0 * most
        ));
        all.push(json!({"recipe": recipe, "cpu": a, "gpu": b, "largest_difference": most}));
        // Rounding may change single decisions, and later ones through them, but hardly the sum of errors.
        if !most.is_finite() || (a - b).abs() > 0.05 * a {
            failed.push(recipe);
        }
    }
    report.put("conversion", all.into())?;
    ensure!(failed.is_empty(), "other errors than on the CPU: {}", failed.join(", "));
    Ok(())
}

/// Seconds of one decoder layer of the shape `name` by stage, with `samples` calibration sequences of `length` tokens.
pub(crate) fn measure(
    report: &mut Report,
    device: &Device,
    name: &str,
    recipes: &[String],
    samples: usize,
    length: usize,
) -> anyhow::Result<()> {
    let layers = shape(name, None)?.layers as f64;
    let folder = tempfile::tempdir()?;
    checkpoint(&folder.path().join("source"), &shape(name, Some(1))?);
    let mut all: Vec<Value> = Vec::new();
    for recipe in recipes {
        let done = convert(folder.path(), recipe, samples, length, Some(device.clone()))?;
        let (s, q) = (done.stages, done.stages.quantizer);
        let quantizer = q.prune + q.search + q.quantize + q.propagate + q.refit + q.pack;
        let seconds = done.layers.iter().map(|l| l.seconds).sum::<f64>();
        report.line(&format!(
            "  {name} {recipe}, {} x {} tokens: a layer {seconds:.1} s (forward {:.1}, Hessians {:.1}, factors {:.1}, \
             quantizer {quantizer:.1}, check {:.1}, output {:.1}); {layers} layers {:.1} min",
            samples,
            length,
            s.forward,
            s.hessian,
            s.factors,
            s.check,
            s.output,
            seconds * layers / 60.0
        ));
        all.push(json!({
            "shape": name, "recipe": recipe, "sequences": samples, "tokens": length,
            "seconds": seconds, "stages": s, "minutes_of_all_layers": seconds * layers / 60.0,
        }));
        report.put("conversion of a layer", all.clone().into())?;
    }
    Ok(())
}
