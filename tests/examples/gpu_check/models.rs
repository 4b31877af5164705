//! Whole models: output on the GPU and the CPU, tokens per second, memory.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stb_convert::Recipe;
use stb_kernels::cuda::Device;
use stb_runtime::{
    DeviceChoice, Engine, OpenOptions, Sampler, SamplerInput, SamplerOptions, State,
};
use stb_tests::choices::compared;
use stb_tests::random_model::{shape, write};

use crate::report::Report;
use crate::speed::time;

/// Tokens that are compared.
const COMPARED: usize = 200;

/// Opens a model on a device.
fn open(file: &Path, device: DeviceChoice, exact: bool) -> anyhow::Result<Engine> {
    let base = if exact { OpenOptions::exact() } else { OpenOptions::default() };
    Ok(Engine::open_stb(file, &OpenOptions { device, ..base })?)
}

fn best(logits: &[f32]) -> u32 {
    let most = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    most.map_or(0, |(i, _)| i as u32)
}

/// A small random model, for a comparison without a file.
pub(crate) fn small(folder: &Path) -> anyhow::Result<PathBuf> {
    let file = folder.join("small.stb");
    let out = BufWriter::new(File::create(&file)?);
    write(&shape("llama-1b", Some(2))?, &Recipe::load("nm-2of8")?, out)?;
    Ok(file)
}

/// Checks that tokens chosen from the top-k of the device are those chosen from all of its logits.
fn compare_choices(report: &mut Report, gpu: &Engine) -> anyhow::Result<()> {
    let mut wrong = 0;
    let cases = [(0.0, 0), (1.0, 40), (0.7, 128)];
    for (temperature, top_k) in cases {
        let options = SamplerOptions {
            temperature,
            top_k,
            repeat_penalty: 1.2,
            repeat_last: 16,
            ..SamplerOptions::default()
        };
        let (differ, _) = compared(gpu, &options, &[1], &[2, 3], 40)?;
        wrong += differ;
    }
    if wrong > 0 {
        report.wrong("candidates", &format!("{wrong} tokens are not those of all logits"));
    }
    report.put("candidates", json!({"tokens": 40 * cases.len(), "wrong": wrong}))
}

/// Compares the greedy text of `file` on the CPU, in f32, with the GPU's choice at each of its positions, in f32 and
/// with rounded activations. Rounding may only change a choice between two tokens that are almost equally likely.
pub(crate) fn compare(report: &mut Report, file: &Path, device: usize) -> anyhow::Result<()> {
    let cpu = open(file, DeviceChoice::Cpu, true)?;
    for (name, exact, allowed) in [("exact", true, 1e-3), ("rounded", false, 0.05)] {
        let gpu = open(file, DeviceChoice::Cuda(device), exact)?;
        compare_choices(report, &gpu)?;
        let mut tokens = vec![1];
        let context = cpu.model.spec.context_length.min(1024) as usize;
        let steps = COMPARED.min(context - tokens.len());
        let (mut on_cpu, mut on_gpu) = (State::new(&cpu, context), State::new(&gpu, context));
        let (mut same, mut gap, mut worst) = (0, 0.0f32, 0.0f32);
        for _ in 0..steps {
            let expected = cpu.forward(&mut on_cpu, &tokens)?.to_vec();
            let found = gpu.forward(&mut on_gpu, &tokens)?;
            let (a, b) = (best(&expected), best(found));
            same += usize::from(a == b);
            // The difference between the best logit and that of the GPU's choice, both from the CPU.
            gap = gap.max(expected[a as usize] - expected[b as usize]);
            let span = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            for (x, y) in expected.iter().zip(found) {
                let error = (x - y).abs() / span;
                worst = if error.is_nan() { f32::INFINITY } else { worst.max(error) };
            }
            tokens = vec![a];
        }
        report.line(&format!(
            "  {}, {name}: {same} of {steps} tokens are the same; largest error of a logit {worst:.1e} of the \
             largest logit; another choice was at most {gap:.3} less likely (logits)",
            file.display()
        ));
        report.put(
            &format!("output {}, {name}", file.display()),
            json!({"tokens": steps, "same": same, "largest_error": worst, "largest_gap": gap}),
        )?;
        if worst > allowed {
            report.wrong("output", &format!("{name}: logits differ by more than {allowed}"));
        }
    }
    Ok(())
}

/// Tokens per second of models with random weights, end to end.
pub(crate) fn measure(
    report: &mut Report,
    device: &Device,
    name: &str,
    recipes: &[String],
) -> anyhow::Result<()> {
    let spec = shape(name, None)?;
    let folder = tempfile::tempdir()?;
    let mut all: Vec<Value> = Vec::new();
    for recipe in recipes {
        let file = folder.path().join("model.stb");
        write(&spec, &Recipe::load(recipe)?, BufWriter::new(File::create(&file)?))?;
        let bytes = file.metadata()?.len();
        let before = device.free_memory()?;
        let engine = open(&file, DeviceChoice::Cuda(device.info().ordinal), false)?;
        let context = 2048;
        let mut state = State::new(&engine, context);
        let prompt: Vec<u32> = (0..512).map(|i| i % 1000).collect();
        let [prefill, ..] = time(3, || {
            state.truncate(0);
            engine.forward(&mut state, &prompt)?;
            Ok(())
        })?;
        let generated = 64;
        // As in generation, the sampler requests the most likely tokens.
        let mut sampler = Sampler::new(SamplerOptions::default());
        let mut next = SamplerInput::default();
        let [decode, low, high] = time(5, || {
            state.truncate(prompt.len());
            for i in 0..generated {
                engine.forward_sampled(&mut state, &[i], &mut sampler, &[], &mut next)?;
                sampler.choose(&mut next, &[]);
            }
            Ok(())
        })?;
        let used = before.saturating_sub(device.free_memory()?);
        let rate = |s: f64| f64::from(generated) / s;
        report.line(&format!(
            "  {name} {recipe}: {} MB file, {} MB on the device; prompt of {}: {:.0} tokens/s; generation: {:.0} tokens/s ({:.0} to {:.0})",
            bytes / 1_000_000,
            used / 1_000_000,
            prompt.len(),
            prompt.len() as f64 / prefill,
            rate(decode),
            rate(high),
            rate(low)
        ));
        all.push(json!({
            "shape": name, "recipe": recipe, "file_bytes": bytes, "device_bytes": used,
            "prompt_tokens": prompt.len(), "prompt_tokens_per_s": prompt.len() as f64 / prefill,
            "generated_tokens_per_s": rate(decode), "slowest": rate(high), "fastest": rate(low),
        }));
        report.put("models", all.clone().into())?;
    }
    Ok(())
}

/// Computes Figure 11 of the paper: bytes of weights, of the KV cache of 2048 tokens (f16) and of the activations of 512
/// tokens of a prompt.
pub(crate) fn memory(report: &mut Report) -> anyhow::Result<()> {
    let mut all: Vec<Value> = Vec::new();
    for name in ["llama-7b", "llama-13b"] {
        let spec = shape(name, None)?;
        let parameters: u64 = spec.tensors().map(|t| t.shape.iter().product::<u64>()).sum();
        let cache = 2 * spec.layers * spec.kv_heads * spec.head_dim * 2048 * 2;
        // The buffers of a step in f32, and the widest GEMM input as two 16-bit floats.
        let (q, k) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let wide = spec.intermediate_size;
        let step = 512 * 4 * (spec.hidden_size + 2 * q + 2 * k + 2 * wide + wide);
        let activations = step + 16 * 4 * (spec.vocab_size + spec.hidden_size);
        let mut put = |report: &Report, kind: &str, bytes: u64| {
            report.line(&format!(
                "  {name:<9} {kind:<12} {:6} MB of weights, {:5} MB of keys and values, {:3} MB of \
                 activations, {:5.2} bits per parameter",
                bytes / 1_000_000,
                cache / 1_000_000,
                activations / 1_000_000,
                8.0 * bytes as f64 / parameters as f64
            ));
            all.push(json!({"shape": name, "kind": kind, "weights": bytes, "cache": cache, "activations": activations}));
        };
        put(report, "fp16", 2 * parameters);
        put(report, "W8A8", parameters);
        put(report, "2 bits", parameters / 4);
        for recipe in ["nm-1of8", "nm-1of4", "nm-2of8", "nm-2of4", "stbllm-4of8"] {
            // A file is loaded as a whole.
            let file = write(&spec, &Recipe::load(recipe)?, tempfile::tempfile()?)?;
            put(report, recipe, file.metadata()?.len());
        }
    }
    report.put("memory", all.into())?;
    Ok(())
}
