//! Conversions of small random models of every family: the files open, and errors are ordered as those of trained
//! models are.

use std::path::Path;

use stb_convert::calibration::CalibrationText;
use stb_convert::prepare::{Order, prepare};
use stb_convert::recipe::{Calibration, RecipeFile};
use stb_convert::{Progress, Recipe};
use stb_runtime::{Checkpoint, Engine, OpenOptions, State};
use tempfile::TempDir;

/// Calibration sequences.
const SAMPLES: usize = 12;
/// Tokens of a calibration sequence.
const LENGTH: usize = 64;

/// Shows no progress.
struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: u64, _: u64, _: &str) {}
    fn layer(&self, _: usize, _: usize, _: f64, _: &str, _: f64) {}
    fn note(&self, _: &str) {}
}

/// A small model and what its conversions are compared with.
struct Example {
    name: String,
    /// The checkpoint, and the files made of it.
    folder: TempDir,
    checkpoint: Checkpoint,
    /// The calibration sequences, with the logarithms of the dense model's probabilities, [tokens, vocab].
    sequences: Vec<(Vec<u32>, Vec<f64>)>,
}

impl Example {
    fn new(source: &Path) -> Self {
        let name = source.file_name().unwrap().to_str().unwrap().to_owned();
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
        }
        let tokenizer = source.with_file_name("tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
        let checkpoint = Checkpoint::open(folder.path(), true).unwrap();
        let dense = Engine::from_checkpoint(&checkpoint).unwrap();
        let options = Calibration { samples: SAMPLES, length: LENGTH, ..Calibration::default() };
        let windows = calibration().windows(&dense.model, &options, LENGTH).unwrap();
        let with_targets = |tokens: Vec<u32>| {
            let targets = log_probabilities(&dense, &tokens);
            (tokens, targets)
        };
        let sequences = windows.into_iter().map(with_targets).collect();
        Self { name, folder, checkpoint, sequences }
    }

    /// Converts the model by a shipped recipe with `change`, and embeddings and lm_head of 8 bits. Returns the mean KL
    /// divergence from the dense model on the calibration text, in nats per token, and the true bits per parameter.
    fn convert(&self, recipe: &str, change: impl FnOnce(&mut RecipeFile)) -> (f64, f64) {
        let recipe = Recipe::load(recipe).unwrap().changed(|file| {
            (file.calibration.samples, file.calibration.length) = (SAMPLES, LENGTH);
            (file.embeddings.bits, file.head.bits) = (8, 8);
            change(file);
            // The divergence is measured on the calibration text, so that fitting it closely is right here.
            if file.calibration.target.is_some() {
                file.calibration.ridge = Some(0.1);
            }
        });
        let recipe = recipe.unwrap();
        let (target, calibration) = (self.folder.path().join("model.stb"), calibration());
        let prepared = prepare(&self.checkpoint, &recipe, &calibration, false).unwrap();
        let order = Order {
            checkpoint: &self.checkpoint,
            calibration: &calibration,
            target: &target,
            force: true,
            device: None,
        };
        let report =
            prepared.convert(&order, &Quiet).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let options = OpenOptions { threads: Some(1), ..OpenOptions::exact() };
        let engine = Engine::open(&target, &options).unwrap();
        (self.divergence(&engine), report.true_bits_per_parameter)
    }

    fn divergence(&self, engine: &Engine) -> f64 {
        let mut sum = 0.0;
        for (tokens, dense) in &self.sequences {
            for (p, q) in dense.iter().zip(log_probabilities(engine, tokens)) {
                assert!(q.is_finite(), "{}", self.name);
                sum += p.exp() * (p - q);
            }
        }
        sum / (SAMPLES * LENGTH) as f64
    }
}

/// A short text: the built-in one takes longer to tokenize than these models to convert.
fn calibration() -> CalibrationText {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE-APACHE");
    CalibrationText::file(&path).unwrap()
}

/// The logarithms of the probabilities after each of `tokens`, [tokens, vocab].
fn log_probabilities(engine: &Engine, tokens: &[u32]) -> Vec<f64> {
    let mut state = State::new(engine, tokens.len());
    let mut all = Vec::new();
    engine
        .forward_all(&mut state, tokens, |_, logits| {
            for logits in logits.chunks_exact(engine.model.embeddings.rows()) {
                let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
                all.extend(logits.iter().map(|z| f64::from(*z) - sum.ln()));
            }
        })
        .unwrap();
    all
}

/// The models, by the names of their folders.
fn examples() -> impl Iterator<Item = Example> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/families");
    let names = [
        "opt-post",
        "opt",
        "qwen3",
        "phi3",
        "smollm3",
        "qwen2",
        "mistral",
        "gpt2",
        "gemma2",
        "gemma3",
        "llama",
        "llama-biases",
        "mixtral",
        "olmoe",
        "qwen3_moe",
    ];
    names.into_iter().map(move |name| Example::new(&folder.join(name)))
}

/// Error compensation and targets from the dense model help as they do on trained models.
#[test]
fn calibrated_methods_are_better_than_rounding() {
    for example in examples() {
        let name = &example.name;
        let (rounded, _) = example.convert("rtn-4bit", |_| {});
        let (int4, bits) = example.convert("int4", |_| {});
        assert!(int4 < 0.6 * rounded, "{name}: {int4} with compensation, {rounded} without");
        let (budget, spent) = example.convert("int4", |file| file.set_budget(bits));
        assert!(
            spent <= bits && budget <= int4,
            "{name}: {budget} at {spent} of {bits} bits, int4 {int4}"
        );
        let (coarse, _) = example.convert("rtn-2bit", |_| {});
        let (signs, _) = example.convert("nm-2of8", |_| {});
        let (own, _) = example.convert("nm-2of8", |file| file.calibration.target = None);
        assert!(signs < 0.8 * coarse, "{name}: {signs}, {coarse} by rounding to 2 bits");
        assert!(signs < own, "{name}: {signs}, {own} without targets from the dense model");
        let (stbllm, _) = example.convert("stbllm-4of8", |_| {});
        assert!(int4 < stbllm && stbllm < signs, "{name}: {int4} {stbllm} {signs}");
    }
}

/// Distillation of the whole model lowers the divergence, which it minimizes. That of layers minimizes another error.
#[test]
fn distillation_brings_models_closer() {
    for example in examples() {
        let name = &example.name;
        let (plain, _) = example.convert("nm-2of8", |_| {});
        let (layers, _) =
            example.convert("nm-2of8", |file| file.calibration.distill_layers = Some(2));
        let (whole, _) = example.convert("nm-2of8", |file| file.calibration.distill = Some(8));
        assert!(layers < 1.05 * plain, "{name}: {layers} after distillation of layers, {plain}");
        assert!(whole < 0.95 * plain, "{name}: {whole} after distillation, {plain} before");
    }
}
