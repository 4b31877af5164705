//! Tiny random models of every family compute what PyTorch transformers computes with them
//! (`tests/transformers/families.py` makes the models and the expected figures).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;
use stb_convert::export::export;
use stb_format::File;
use stb_format::encoding::{Dense, Encoding};
use stb_runtime::{Checkpoint, Engine, OpenOptions, State};
use stb_tests::conversion::converted;
use stb_tests::paths::root;
use tempfile::TempDir;

/// A model of `tests/data/families`, with its tokenizer.
struct Model {
    name: String,
    folder: TempDir,
    expected: Json,
}

fn families() -> PathBuf {
    root().join("tests/data/families")
}

fn models() -> Vec<Model> {
    let entries = std::fs::read_dir(families()).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() > 20, "{folders:?}");
    folders.iter().map(|folder| Model::open(folder)).collect()
}

impl Model {
    fn open(source: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
        }
        let tokenizer = families().join("tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
        let expected = std::fs::read_to_string(source.join("expected.json")).unwrap();
        let name = source.file_name().unwrap().to_str().unwrap().to_owned();
        Self { name, folder, expected: serde_json::from_str(&expected).unwrap() }
    }

    fn ids(&self, field: &str) -> Vec<u32> {
        let ids = self.expected[field].as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap() as u32).collect()
    }

    fn floats(&self, field: &str) -> Vec<f64> {
        let values = self.expected[field].as_array().unwrap().iter();
        values.map(|value| value.as_f64().unwrap()).collect()
    }

    /// The model as an .stb file.
    fn converted(&self, recipe: &str) -> PathBuf {
        let target = self.folder.path().join(format!("{recipe}.stb"));
        let text = root().join("tests/data/stories.txt");
        // Sequences of the shortest context among the models.
        let report = converted(self.folder.path(), &target, recipe, &text, 128, 24, None);
        report.unwrap_or_else(|e| panic!("{}: {e:#}", self.name));
        target
    }
}

fn open(model: &Path) -> Arc<Engine> {
    let engine = Engine::open(model, &OpenOptions::exact());
    Arc::new(engine.unwrap_or_else(|e| panic!("{}: {e}", model.display())))
}

/// The loss of each token after the first, and the logits after the last.
fn losses(engine: &Engine, ids: &[u32]) -> (Vec<f64>, Vec<f32>) {
    let mut state = State::new(engine, ids.len());
    let (mut losses, mut last) = (Vec::new(), Vec::new());
    let vocabulary = engine.model.spec.vocab_size as usize;
    let each = |_: usize, logits: &[f32]| {
        for row in logits.chunks_exact(vocabulary) {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
            if let Some(target) = ids.get(losses.len() + 1) {
                losses.push(sum.ln() + f64::from(max - row[*target as usize]));
            }
            last = row.to_vec();
        }
    };
    engine.forward_all(&mut state, ids, each).unwrap();
    (losses, last)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The greedy continuation of `prompt`, one token at a time.
fn greedy(engine: &Engine, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut state = State::new(engine, prompt.len() + count);
    let mut input = prompt.to_vec();
    let mut tokens = Vec::new();
    for _ in 0..count {
        let logits = engine.forward(&mut state, &input).unwrap();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        input = vec![best as u32];
        tokens.push(best as u32);
    }
    tokens
}

#[test]
fn checkpoints_compute_the_same() {
    for model in models() {
        let (name, ids) = (&model.name, model.ids("ids"));
        let engine = open(model.folder.path());
        let (losses, last) = losses(&engine, &ids);
        assert_eq!(losses.len(), ids.len() - 1);
        for (position, (found, expected)) in losses.iter().zip(model.floats("losses")).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference < 1e-3, "{name}: loss {found} at {position}, expected {expected}");
        }
        for (found, expected) in last.iter().zip(model.floats("last_logits")) {
            let difference = (f64::from(*found) - expected).abs();
            assert!(difference < 1e-3, "{name}: logit {found}, expected {expected}");
        }
        let expected = model.ids("greedy");
        let found = greedy(&engine, &model.ids("prompt"), expected.len());
        assert_eq!(found, expected, "{name}");
    }
}

/// GGUF files that llama.cpp's converter made from the folders compute the same.
#[test]
fn gguf_files_compute_the_same() {
    let folder = root().join("tests/data/families-gguf");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Some(name) = path.file_name().unwrap().to_str().unwrap().strip_suffix(".gguf") else {
            continue;
        };
        let model = Model::open(&families().join(name));
        let (losses, _) = losses(&open(&path), &model.ids("ids"));
        for (position, (found, expected)) in losses.iter().zip(model.floats("losses")).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference < 1e-3, "{name}: loss {found} at {position}, expected {expected}");
        }
        count += 1;
    }
    assert!(count > 8, "{count} files");
}

#[test]
fn files_of_8_bits_compute_nearly_the_same() {
    for model in models() {
        let name = &model.name;
        let engine = open(&model.converted("int8"));
        let (losses, _) = losses(&engine, &model.ids("ids"));
        let (found, expected) = (mean(&losses), mean(&model.floats("losses")));
        assert!((found - expected).abs() < 0.1, "{name}: loss {found}, expected {expected}");
        let expected = &model.ids("greedy")[..20];
        assert_eq!(greedy(&engine, &model.ids("prompt"), expected.len()), expected, "{name}");
    }
}

/// The tensors of an exported checkpoint: name, shape, values.
fn tensors(folder: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, tensor)| {
            let kind = match tensor.dtype() {
                safetensors::Dtype::F16 => Dense::F16,
                safetensors::Dtype::F32 => Dense::F32,
                other => panic!("{name}: {other:?}"),
            };
            let (rows, cols) = (1, tensor.shape().iter().product::<usize>() as u64);
            let view = Encoding::Dense(kind).view(rows, cols, tensor.data()).unwrap().decode();
            (name.to_owned(), tensor.shape().to_vec(), view)
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

/// A file without loss, exported, is the checkpoint that it was made from, except for the rows of OPT's position
/// embeddings that no token uses.
#[test]
fn exports_have_the_layout_of_the_family() {
    for model in models() {
        let (name, folder) = (&model.name, model.folder.path().join("exported"));
        let bytes = std::fs::read(model.converted("source")).unwrap();
        let file = File::open(&bytes).unwrap();
        export(&file, Path::new("packed.stb"), &folder, Dense::F16).unwrap();
        let (found, mut expected) = (tensors(&folder), tensors(model.folder.path()));
        for (name, shape, values) in &mut expected {
            if name == "model.decoder.embed_positions.weight" {
                values[..2 * shape[1]].fill(0.0);
            }
        }
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "{name}");
        }
        Checkpoint::open(&folder, true).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// Without the `config.json` of a checkpoint, the tensors keep the names of the file.
#[test]
fn exports_without_a_configuration_have_the_names_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(root().join("spec/vectors/valid/decoder.stb")).unwrap();
    let file = File::open(&bytes).unwrap();
    export(&file, Path::new("decoder.stb"), folder.path(), Dense::F32).unwrap();
    let mut names: Vec<&str> = file.tensors().iter().map(|tensor| tensor.name()).collect();
    names.sort_unstable();
    let exported = tensors(folder.path());
    assert_eq!(exported.iter().map(|tensor| &*tensor.0).collect::<Vec<_>>(), names);
    assert!(!folder.path().join("config.json").exists());
}
