//! Calibration texts: windows, what is held out, files of chats, and texts that a model writes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use stb_convert::calibration::CalibrationText;
use stb_convert::recipe::{Calibration, Draw};
use stb_convert::{Progress, written};
use stb_runtime::{Checkpoint, Engine, Model};

/// Keeps the notes.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Progress for Notes {
    fn step(&self, _: u64, _: u64, _: &str) {}
    fn layer(&self, _: usize, _: usize, _: f64, _: &str, _: f64) {}
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

fn checkpoint() -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
    Checkpoint::open(&path, true).unwrap()
}

fn model() -> Model {
    Engine::without_layers(&checkpoint()).unwrap().model
}

fn options(samples: usize) -> Calibration {
    Calibration { samples, ..Calibration::default() }
}

/// Windows of this many tokens.
const LENGTH: usize = 64;

/// The text of `windows`.
fn text_of(model: &Model, windows: &[Vec<u32>]) -> String {
    model.tokenizer().unwrap().decode(&windows.concat()).unwrap()
}

/// All sequences of 24 tokens: only the same text has one twice.
fn spans(windows: &[Vec<u32>]) -> HashSet<&[u32]> {
    windows.iter().flat_map(|window| window.windows(24)).collect()
}

#[test]
fn windows_are_fresh_and_repeatable_and_none_is_held_out() {
    let (model, text) = (model(), CalibrationText::built_in());
    let all = text.draw(&model, &options(1), LENGTH, 0, 20_000).unwrap();
    assert!(all.fresh > 2000 && all.fresh < 20_000, "{}", all.fresh);
    let fresh = &all.windows[..all.fresh];
    let distinct: HashSet<&Vec<u32>> = fresh.iter().collect();
    assert!(distinct.len() * 100 > fresh.len() * 99);
    // The next windows begin where the first ones end.
    let later = text.draw(&model, &options(1), LENGTH, 150, 100).unwrap();
    assert_eq!((&later.windows[..], later.fresh), (&fresh[150..250], 100));
    assert_eq!(text.windows(&model, &options(100), LENGTH).unwrap(), fresh[..100]);
    let other = Calibration { seed: 1, ..options(100) };
    assert_ne!(text.windows(&model, &other, LENGTH).unwrap(), fresh[..100]);

    let held_out = text.held_out(&model, &options(1), LENGTH, 64).unwrap();
    assert_eq!(held_out, text.held_out(&model, &other, LENGTH, 64).unwrap());
    assert_eq!(held_out.windows.len(), 64);
    assert_eq!(held_out.text, format!("built-in sha256:{}", text.hash()));
    let calibration = spans(&all.windows);
    assert!(spans(&held_out.windows).is_disjoint(&calibration));
}

/// The first windows have all kinds, chats in the model's own format, and so has a small sample of many windows.
#[test]
fn kinds_come_early() {
    let (model, text) = (model(), CalibrationText::built_in());
    let template = model.tokenizer().unwrap();
    let first = text.windows(&model, &options(60), LENGTH).unwrap();
    let letters = text_of(&model, &first);
    let special = first.iter().flatten().filter(|t| template.is_special(**t)).count();
    assert!(special >= 2, "no chat in {letters}");
    let sample = text.sample(&model, &options(600), LENGTH, 8).unwrap();
    assert_eq!(sample.len(), 8);
    let windows = text.windows(&model, &options(600), LENGTH).unwrap();
    assert_eq!(sample[7], windows[7 * 600 / 8]);
    assert_eq!(text.sample(&model, &options(5), LENGTH, 8).unwrap().len(), 5);
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// The last part of a file is held out; a short file, or one that is drawn as published code does, is used in full.
#[test]
fn the_end_of_a_file_is_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let sentences: Vec<String> =
        (0..1500).map(|i| format!("Sentence {i} has the square {}.\n", i * i)).collect();
    let text = CalibrationText::file(&write(folder.path(), "a.txt", &sentences.concat())).unwrap();
    let all = text.draw(&model, &options(1), LENGTH, 0, 2000).unwrap();
    assert!(all.fresh < all.windows.len());
    let used = text_of(&model, &all.windows);
    assert!(used.contains("Sentence 0 has") && used.contains("Sentence 1300 has"));
    let held_out = text.held_out(&model, &options(1), LENGTH, 2000).unwrap();
    assert!(held_out.name() == "a.txt");
    let kept = text_of(&model, &held_out.windows);
    assert!(kept.contains("Sentence 1450 has") && !used.contains("Sentence 1450 has"));
    assert!(!kept.contains("Sentence 1300 has"));

    let python = Calibration { draw: Draw::Python, ..options(1) };
    let held_out = text.held_out(&model, &python, LENGTH, 8).unwrap();
    assert!(held_out.name() == "built-in" && held_out.windows.len() == 8);
    let short = CalibrationText::file(&write(folder.path(), "b.txt", &sentences[..20].concat()));
    let short = short.unwrap();
    let windows = short.draw(&model, &options(1), LENGTH, 0, 100).unwrap();
    assert!(windows.fresh < 20 && windows.windows.len() == 100);
    assert!(text_of(&model, &windows.windows).contains("Sentence 19 has"));
    let held_out = short.held_out(&model, &options(1), LENGTH, 8).unwrap();
    assert!(held_out.name() == "built-in");
    // Four windows at least, though shorter.
    let held_out = text.held_out(&model, &options(1), 5000, 8).unwrap();
    assert!(held_out.windows.len() == 4 && held_out.windows[0].len() > 500);
    let error = short.windows(&model, &options(1), 5000).unwrap_err().to_string();
    assert!(error.contains("--calib-len"), "{error}");
}

/// Windows that are drawn as in Python start anywhere in the concatenated documents.
#[test]
fn python_windows_come_from_the_whole_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let documents: Vec<String> = (0..40).map(|i| format!(" This is document {i}. ")).collect();
    let path = write(folder.path(), "a.txt", &documents.join("###"));
    let text = CalibrationText::file(&path).unwrap();
    let options = Calibration { draw: Draw::Python, separator: Some("###".into()), ..options(12) };
    let tokenizer = model.tokenizer().unwrap();
    let trimmed = documents.iter().map(|d| tokenizer.encode_prompt(d.trim()).unwrap());
    let tokens: Vec<u32> = trimmed.collect::<Vec<_>>().concat();
    for window in text.windows(&model, &options, 16).unwrap() {
        assert!(tokens.windows(16).any(|w| w == window));
    }
}

#[test]
fn files_of_chats_and_texts() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let chat =
        r#"[{"role":"user","content":"Who was there?"},{"role":"assistant","content":"The cat."}]"#;
    let lines = format!("{chat}\n{{\"text\":\"Once upon a time there was a dog.\"}}\n");
    let text = CalibrationText::file(&write(folder.path(), "a.jsonl", &lines)).unwrap();
    let windows = text.windows(&model, &options(8), 16).unwrap();
    let found = text_of(&model, &windows);
    assert!(found.contains("Who was there?") && found.contains("a dog."), "{found}");
    let tokenizer = model.tokenizer().unwrap();
    assert!(windows.iter().flatten().any(|t| tokenizer.is_special(*t)));
    let error = CalibrationText::file(&write(folder.path(), "b.jsonl", "{\"prompt\": 1}\n"));
    assert!(error.unwrap_err().to_string().contains("line 1 of b.jsonl"));
}

/// A text of the model itself does not depend on the threads, is kept, and is read again.
#[test]
fn a_model_writes_its_text_once() {
    let (checkpoint, model) = (checkpoint(), model());
    let options = Calibration { length: LENGTH, ..options(24) };
    let write = |threads: usize, folder: &Path| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let notes = Notes::default();
        let text = pool
            .install(|| written::write_text(&checkpoint, &options, Some(folder), &notes))
            .unwrap();
        (text, notes.0.into_inner().unwrap().join("\n"))
    };
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (text, notes) = write(1, folders[0].path());
    assert!(notes.contains("1792 tokens") && notes.contains(".stb-self-"), "{notes}");
    let (again, notes) = write(2, folders[0].path());
    assert_eq!(again.hash(), text.hash());
    assert!(!notes.contains("tokens"), "{notes}");
    assert_eq!(write(2, folders[1].path()).0.hash(), text.hash());
    let windows = text.draw(&model, &options, LENGTH, 0, 24).unwrap();
    let held_out = text.held_out(&model, &options, LENGTH, 4).unwrap();
    assert!(windows.fresh >= 20 && !held_out.windows.is_empty());
    assert!(spans(&windows.windows).is_disjoint(&spans(&held_out.windows)));
    // Damage is noticed, and the text written again.
    let kept = std::fs::read_dir(folders[0].path()).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&kept, "damaged").unwrap();
    let (restored, notes) = write(2, folders[0].path());
    assert!(restored.hash() == text.hash() && notes.contains("1792 tokens"), "{notes}");
}
