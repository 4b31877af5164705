//! Conversions of small random models of every family: the files open, and errors are ordered as those of trained
//! models are.

use std::path::Path;

use stb_convert::Recipe;
use stb_convert::calibration::CalibrationText;
use stb_convert::recipe::{Calibration, RecipeFile};
use stb_runtime::{Checkpoint, Engine, OpenOptions, State};
use stb_tests::conversion::converted_by;
use stb_tests::paths::root;
use stb_tests::programs::note;
use tempfile::TempDir;

/// Calibration sequences.
const SAMPLES: usize = 24;
/// Tokens of a calibration sequence.
const LENGTH: usize = 64;

/// A small model and what its conversions are compared with.
struct Example {
    name: String,
    /// The checkpoint, and the files made of it.
    folder: TempDir,
    dense: Engine,
    /// The calibration sequences.
    sequences: Vec<Vec<u32>>,
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
        let text = CalibrationText::built_in();
        let tokenizer = dense.model.tokenizer().unwrap();
        let sequences = text.windows(&tokenizer, &options, LENGTH).unwrap();
        Self { name, folder, dense, sequences }
    }

    /// Converts the model by a shipped recipe with `change`, and embeddings and lm_head of 8 bits. Returns the mean KL
    /// divergence from the dense model on the calibration text, in nats per token, and the true bits per parameter.
    fn convert(&self, recipe: &str, change: impl FnOnce(&mut RecipeFile)) -> (f64, f64) {
        let recipe = Recipe::load(recipe).unwrap().changed(|file| {
            (file.calibration.samples, file.calibration.length) = (SAMPLES, LENGTH);
            (file.embeddings.bits, file.head.bits) = (8, 8);
            change(file);
        });
        let target = self.folder.path().join("model.stb");
        let text = CalibrationText::built_in();
        let report = converted_by(self.folder.path(), &target, &recipe.unwrap(), &text, None);
        let report = report.unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let engine = Engine::open(&target, &OpenOptions::exact()).unwrap();
        (self.divergence(&engine), report.true_bits_per_parameter)
    }

    fn divergence(&self, engine: &Engine) -> f64 {
        let mut sum = 0.0;
        for tokens in &self.sequences {
            let [dense, ours] =
                [&self.dense, engine].map(|engine| log_probabilities(engine, tokens));
            for (p, q) in dense.iter().zip(ours) {
                assert!(q.is_finite(), "{}", self.name);
                sum += p.exp() * (p - q);
            }
        }
        sum / (SAMPLES * LENGTH) as f64
    }
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

/// Models of all families without mixtures of experts.
fn examples() -> impl Iterator<Item = Example> {
    let folder = root().join("tests/data/families");
    let mut folders: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .filter(|path| {
            let config = std::fs::read_to_string(path.join("config.json")).unwrap();
            !config.contains("experts")
        })
        .collect();
    folders.sort();
    assert!(folders.len() > 10, "{folders:?}");
    folders.into_iter().map(|folder| Example::new(&folder))
}

#[test]
fn calibrated_methods_are_better_than_rounding() {
    for example in examples() {
        let (rounded, _) = example.convert("rtn-4bit", |_| {});
        let (int4, bits) = example.convert("int4", |_| {});
        let (coarse, _) = example.convert("rtn-2bit", |_| {});
        let (signs, _) = example.convert("nm-2of8", |_| {});
        let (own, _) = example.convert("nm-2of8", |file| file.calibration.target = None);
        let (stbllm, _) = example.convert("stbllm-4of8", |_| {});
        let (budget, spent) = example.convert("int4", |file| file.set_budget(bits));
        note(&format!(
            "{:20} rtn4 {rounded:.4} int4 {int4:.4} budget {budget:.4} ({spent:.2} {bits:.2}) rtn2 {coarse:.4} nm {signs:.4} own {own:.4} stbllm {stbllm:.4}",
            example.name
        ));
    }
}

#[test]
fn distillation_brings_models_closer() {
    for example in examples() {
        let (plain, _) = example.convert("nm-2of8", |_| {});
        let (layers, _) =
            example.convert("nm-2of8", |file| file.calibration.distill_layers = Some(2));
        let (whole, _) = example.convert("nm-2of8", |file| file.calibration.distill = Some(2));
        note(&format!("{:20} nm {plain:.4} layers {layers:.4} whole {whole:.4}", example.name));
    }
}
