//! Compares perplexity, divergence and zero-shot accuracy with oracles without caches, pieces and shared
//! prefixes, and tests the commands that measure.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use stb_format::encoding::Dense;
use stb_runtime::{
    Engine, KeptLogits, OpenOptions, PerplexityOptions, Question, Reference, State, Task,
    TextLayout, ZeroShotOptions, open_to_measure, perplexity, score_questions, zero_shot,
};
use stb_tests::paths::{quill, root, shared};
use stb_tests::programs::{command, run, skip};
use stb_tests::tiny;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path) -> Engine {
    open_to_measure(path, &OpenOptions::default()).unwrap()
}

/// ln p of every token at every position, from one forward pass over all of `tokens`.
fn log_probabilities(engine: &Engine, tokens: &[u32]) -> Vec<Vec<f64>> {
    let mut state = State::new(engine, tokens.len());
    let mut rows = Vec::new();
    let softmax = |logits: &[f32]| -> Vec<f64> {
        let all: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
        let largest = all.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = all.iter().map(|l| (l - largest).exp()).sum();
        all.iter().map(|l| l - largest - sum.ln()).collect()
    };
    let sink = |_: usize, logits: &[f32]| {
        rows.extend(logits.chunks_exact(engine.model.embeddings.rows()).map(softmax));
    };
    engine.forward_all(&mut state, tokens, sink).unwrap();
    rows
}

fn best(row: &[f64]) -> usize {
    (0..row.len()).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
}

fn sample_tasks() -> Vec<(Task, PathBuf)> {
    let file = |task: Task| root().join(format!("tests/data/tasks/{}_sample.jsonl", task.name()));
    Task::ALL.into_iter().map(|task| (task, file(task))).collect()
}

/// Context and continuation as the harness would encode them, the whole input cut at the left.
fn oracle_score(engine: &Engine, item: &Question, choice: usize, most: usize) -> (f64, bool) {
    let tokenizer = engine.model.tokenizer().unwrap();
    let prompt = &item.prompts[choice];
    let context = tokenizer.encode(prompt.context.trim_end()).unwrap();
    let whole = tokenizer.encode(&format!("{}{}", prompt.context, prompt.continuation)).unwrap();
    let continuation = &whole[context.len()..];
    let mut all = [&context[..], continuation].concat();
    let cut = all.len().saturating_sub(most + 1);
    all.drain(..cut);
    let rows = log_probabilities(engine, &all[..all.len() - 1]);
    let first = all.len() - continuation.len();
    let sum = (first..all.len()).map(|i| rows[i - 1][all[i] as usize]).sum();
    (sum, cut > 0)
}

#[test]
fn choices_score_as_if_each_were_computed_alone() {
    let engine = open(&quill());
    let tokenizer = engine.model.tokenizer().unwrap();
    for (task, file) in sample_tasks() {
        let items = task.read(&file, None).unwrap();
        assert!(items.len() >= 2, "{}", file.display());
        // A context for whole questions, and one so short that questions are cut.
        for context in [512, 24] {
            let options = ZeroShotOptions { context, begin: false };
            let mut states: Vec<State> =
                items.iter().map(|_| State::new(&engine, context)).collect();
            let together =
                score_questions(&engine, &mut states, &tokenizer, &items, &options).unwrap();
            let (mut acc, mut acc_norm, mut truncated) = (0, 0, 0);
            for (item, together) in items.iter().zip(together) {
                let alone = std::slice::from_ref(item);
                let found = score_questions(&engine, &mut states[..1], &tokenizer, alone, &options)
                    .unwrap()
                    .remove(0);
                assert_eq!(found, together);
                let mut scores = Vec::new();
                for (choice, found) in found.iter().enumerate() {
                    let (expected, cut) = oracle_score(&engine, item, choice, context);
                    let difference = (found.log_likelihood - expected).abs();
                    assert!(difference < 1e-3, "{} {choice}: {found:?}, {expected}", task.name());
                    assert_eq!(found.truncated, cut);
                    scores.push(expected);
                }
                let lengths = item.prompts.iter().map(|p| p.choice_length as f64);
                let per_character: Vec<f64> =
                    scores.iter().zip(lengths).map(|(s, l)| s / l).collect();
                acc += usize::from(best(&scores) == item.gold);
                acc_norm += usize::from(best(&per_character) == item.gold);
                truncated += usize::from(found.iter().any(|s| s.truncated));
            }
            let result =
                zero_shot(&engine, &tokenizer, task, &items, &options, &|_, _| {}).unwrap();
            let n = items.len() as f64;
            assert_eq!(result.acc.value, acc as f64 / n, "{}", task.name());
            assert_eq!(result.truncated, truncated, "{}", task.name());
            assert_eq!(result.acc_norm.is_some(), task.has_acc_norm());
            if let Some(found) = result.acc_norm {
                assert_eq!(found.value, acc_norm as f64 / n, "{}", task.name());
            }
            let p = acc as f64 / n;
            let error = (p * (1.0 - p) / (n - 1.0)).sqrt();
            assert!((result.acc.standard_error - error).abs() < 1e-12);
        }
    }
}

#[test]
fn begin_tokens_are_put_before_questions_on_request() {
    let engine = open(&quill());
    let tokenizer = engine.model.tokenizer().unwrap();
    let items = Task::OpenBookQa.read(&sample_tasks()[1].1, Some(1)).unwrap();
    let score = |begin: bool| {
        let mut state = [State::new(&engine, 64)];
        let options = ZeroShotOptions { context: 64, begin };
        score_questions(&engine, &mut state, &tokenizer, &items, &options).unwrap()[0][0]
            .log_likelihood
    };
    assert!(tokenizer.bos.is_some());
    assert!((score(true) - score(false)).abs() > 1e-3);
    let (quill, file) = (quill(), sample_tasks()[1].1.clone());
    let args = ["zero-shot", text(&quill), text(&file), "--no-begin-token"];
    assert!(run("stb-run", &args).success().contains("no begin token"));
}

#[test]
fn a_choice_longer_than_the_context_is_an_error() {
    let file = sample_tasks()[7].1.clone();
    let quill = quill();
    let args = ["zero-shot", text(&quill), text(&file), "--ctx", "3"];
    let error = run("stb-run", &args).failure(2);
    assert!(error.contains("--ctx"), "{error}");
}

/// Two random models that share a tokenizer. Every figure is recomputed from whole windows.
#[test]
fn divergences_are_those_of_the_definition() {
    let folder = folder();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    tiny::write(&one, &tiny::config(), Dense::F32, |_, _| {});
    tiny::write(&other, &tiny::config(), Dense::F32, |name, values| {
        if name.contains("layers.1") {
            values.iter_mut().step_by(3).for_each(|v| *v *= 1.2);
        }
    });
    let (engine, reference) = (open(&one), open(&other));
    let tokenizer = engine.model.tokenizer().unwrap();
    let sample = "the quick brown fox jumps over the lazy dog ".repeat(8);
    let layout = TextLayout::Documents("lazy".into());
    let tokens = layout.tokenize(&tokenizer, &sample).unwrap();
    let options = PerplexityOptions { context: 33, windows: Some(6), layout };
    let measure = |reference: Reference<'_>| {
        perplexity(&engine, Some(reference), &tokenizer, &sample, &options, &|_, _| {
            ControlFlow::Continue(())
        })
        .unwrap()
    };
    let stop = |_, _| ControlFlow::Break(());
    let stopped = perplexity(&engine, None, &tokenizer, &sample, &options, &stop).unwrap_err();
    assert_eq!(stopped.exit_code(), 130);
    let found = measure(Reference::new(&reference));
    let divergence = found.divergence.as_ref().unwrap();

    let mut windows = Vec::new();
    for window in tokens.chunks_exact(33).take(6) {
        let (p, q) = (log_probabilities(&reference, window), log_probabilities(&engine, window));
        let mean = |f: &dyn Fn(usize) -> f64| (0..32).map(f).sum::<f64>() / 32.0;
        let kl = |t: usize| p[t].iter().zip(&q[t]).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let target = |t: usize| window[t + 1] as usize;
        windows.push([
            mean(&|t| -q[t][target(t)]),
            mean(&|t| -p[t][target(t)]),
            mean(&kl),
            mean(&|t| f64::from(u8::from(best(&p[t]) == best(&q[t])))),
        ]);
    }
    assert_eq!((windows.len(), found.windows, found.context), (6, 6, 33));
    let estimate = |k: usize| {
        let mean = windows.iter().map(|w| w[k]).sum::<f64>() / 6.0;
        let variance = windows.iter().map(|w| (w[k] - mean).powi(2)).sum::<f64>() / 5.0;
        (mean, (variance / 6.0).sqrt())
    };
    let close = |found: f64, expected: f64| {
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{found} {expected}");
    };
    for (k, found) in [(0, found.nll), (2, divergence.kl), (3, divergence.top1)] {
        close(found.value, estimate(k).0);
        close(found.standard_error, estimate(k).1);
    }
    assert!(divergence.kl.value > 0.0 && divergence.top1.value < 1.0);
    close(found.perplexity.value, estimate(0).0.exp());
    close(divergence.reference_perplexity.value, estimate(1).0.exp());
    close(divergence.nll_difference.value, estimate(0).0 - estimate(1).0);

    // Logits are kept for all windows, for some, and for none.
    let window = 33 * engine.model.embeddings.rows() * 4;
    for room in [6 * window, 5 * window / 2, window - 1] {
        let kept = KeptLogits::new(room);
        for _ in 0..3 {
            let again = measure(Reference { engine: &reference, kept: Some(&kept) });
            assert_eq!(again.divergence, found.divergence);
        }
    }

    // The divergence of a model from itself is zero.
    let same = measure(Reference::new(&engine)).divergence.unwrap();
    assert_eq!((same.kl.value, same.top1.value, same.nll_difference.value), (0.0, 1.0, 0.0));

    // Models with different vocabularies cannot be compared.
    let mut config = tiny::config();
    config["vocab_size"] = 48.into();
    let larger = folder.path().join("larger");
    tiny::write(&larger, &config, Dense::F32, |_, _| {});
    let sample_file = folder.path().join("sample.txt");
    std::fs::write(&sample_file, &sample).unwrap();
    let args = ["perplexity", text(&one), "--text", text(&sample_file), "--reference"];
    let error = run("stb-run", &[&args[..], &[text(&larger)]].concat()).failure(4);
    assert!(error.contains("cannot be compared"), "{error}");
    let json = run("stb-run", &[&args[..], &[text(&other), "--json", "--ctx", "33"]].concat());
    let json: Json = serde_json::from_str(&json.success()).unwrap();
    assert!(json["reference"]["kl"].as_f64().unwrap() > 0.0);
    assert!(json["reference"]["top1_standard_error"].as_f64().unwrap() > 0.0);
}

/// A model with NaN weights must not get a perplexity.
#[test]
fn logits_that_are_not_finite_are_an_error() {
    let folder = folder();
    let source = folder.path().join("model");
    tiny::write(&source, &tiny::config(), Dense::F32, |name, values| {
        if name.contains("lm_head") {
            values[50] = f32::NAN;
        }
    });
    let sample = folder.path().join("sample.txt");
    std::fs::write(&sample, "the quick brown fox ".repeat(20)).unwrap();
    let args = ["perplexity", text(&source), "--text", text(&sample), "--ctx", "16"];
    let error = run("stb-run", &args).failure(4);
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn wrong_questions_are_named_by_line() {
    let folder = folder();
    let file = folder.path().join("piqa.jsonl");
    let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 0}"#;
    let quill = quill();
    for (line, word) in [
        ("{\"query\": ", "EOF"),
        (r#"{"choices": ["b", "c"], "gold": 0}"#, "query"),
        (r#"{"query": "a", "choices": [], "gold": 0}"#, "choices"),
        (r#"{"query": "a", "choices": ["b", ""], "gold": 0}"#, "empty"),
        (r#"{"query": "a", "choices": ["b", "c"], "gold": 9}"#, "gold"),
        (r#"{"query": "a", "choices": "b", "gold": 0}"#, "sequence"),
    ] {
        std::fs::write(&file, format!("{good}\n\n{line}\n{good}\n")).unwrap();
        let error = run("stb-run", &["zero-shot", text(&quill), text(&file)]).failure(4);
        assert!(error.contains("piqa.jsonl, line 3") && error.contains(word), "{error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        // Lines beyond `--limit` are not read.
        let args = ["zero-shot", text(&quill), text(&file), "--limit", "1"];
        let _ = run("stb-run", &args).success();
    }
    std::fs::write(&file, b"\xff\n").unwrap();
    let error = run("stb-run", &["zero-shot", text(&quill), text(&file)]).failure(4);
    assert!(error.contains("UTF-8"), "{error}");
    std::fs::write(&file, "\n").unwrap();
    let error = run("stb-run", &["zero-shot", text(&quill), text(&file)]).failure(4);
    assert!(error.contains("no questions"), "{error}");
    let error = run("stb-run", &["zero-shot", text(&quill), "somewhere.jsonl"]).failure(2);
    assert!(error.contains("--task") && error.contains("winogrande"), "{error}");
    let error = run("stb-run", &["zero-shot", text(&quill), "piqa_none.jsonl"]).failure(3);
    assert!(error.contains("piqa_none"), "{error}");
    let args = ["zero-shot", text(&quill), "--task", "mmlu=x.jsonl"];
    let error = run("stb-run", &args).failure(2);
    assert!(error.contains("mmlu"), "{error}");
    let error = run("stb-run", &["zero-shot", text(&quill)]).failure(2);
    assert!(error.contains("file of questions"), "{error}");
}

#[test]
fn zero_shot_prints_tables_and_json() {
    let files: Vec<String> = sample_tasks().iter().map(|(_, f)| text(f).to_owned()).collect();
    let quill = quill();
    let mut args = vec!["zero-shot", text(&quill), "--limit", "2"];
    args.extend(files.iter().map(String::as_str));
    let table = run("stb-run", &args).success();
    for task in Task::ALL {
        assert!(table.contains(task.name()), "{table}");
    }
    assert!(table.contains("true bits") && table.contains("lm-evaluation-harness"), "{table}");
    let named = format!("arc-e={}", files[4]);
    let args = ["zero-shot", text(&quill), "--task", &named, "--json", "-t", "1"];
    let json: Json = serde_json::from_str(&run("stb-run", &args).success()).unwrap();
    let task = &json["tasks"][0];
    assert_eq!((task["task"].as_str(), task["questions"].as_u64()), (Some("arc_easy"), Some(3)));
    assert!(task["acc_norm"].as_f64().is_some() && json["begin_token"] == true);
}

/// Perplexities of transformers on PyTorch (data/README.md next to the models).
#[test]
fn story_perplexities_equal_the_reference() {
    let Some(stories) = shared("data/text/tinystories/eval.txt") else {
        return skip("TinyStories are not here");
    };
    let stories = std::fs::read_to_string(stories).unwrap();
    for (name, context, tokens, windows, expected) in [
        ("stories260k", 512, 261_596, 510, 4.5141),
        ("babyllama-105", 256, 516_564, 2017, 2.4129),
        ("quill-4m", 256, 152_737, 596, 12.2629),
    ] {
        let Some(folder) = shared(&format!("data/models/{name}")) else {
            return skip("third-party models are not here");
        };
        let engine = open(&folder);
        let tokenizer = engine.model.tokenizer().unwrap();
        let layout = TextLayout::Documents("<|endoftext|>".into());
        let options = PerplexityOptions { context, windows: None, layout };
        let found = perplexity(&engine, None, &tokenizer, &stories, &options, &|_, _| {
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!((found.tokens, found.windows), (tokens, windows), "{name}");
        let difference = (found.perplexity.value - expected).abs();
        assert!(difference < 1e-4, "{name}: {} for {expected}", found.perplexity.value);
    }
}

#[test]
fn rows_of_wikitext_are_joined_as_in_the_reference() {
    let files =
        ["raw", "joined.txt"].map(|n| shared(&format!("data/text/wikitext-2/wiki.test.{n}")));
    let [Some(raw), Some(joined)] = files else { return skip("WikiText-2 is not here") };
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let tokenizer = open(&quill()).model.tokenizer().unwrap();
    let rows = TextLayout::Rows.tokenize(&tokenizer, &read(&raw)).unwrap();
    assert!(rows == TextLayout::Whole.tokenize(&tokenizer, &read(&joined)).unwrap());
    assert_eq!(rows.len(), 537_544);
}

/// A small study: random model, short text, two recipes that work and one that cannot.
struct SmallStudy {
    folder: TempDir,
}

impl SmallStudy {
    fn new(recipes: &str) -> Self {
        let folder = folder();
        tiny::write(&folder.path().join("model"), &tiny::config(), Dense::F32, |_, _| {});
        let sample = "the quick brown fox jumps over the lazy dog ".repeat(30);
        std::fs::write(folder.path().join("sample.txt"), sample).unwrap();
        let study = format!(
            "name = 'small'\ntitle = 'A small study'\ncalibration = {{ path = 'sample.txt' }}\n\
             [[model]]\nname = 'tiny'\npath = 'model'\ncontext = 32\n\
             [[text]]\nname = 'fox'\npath = 'sample.txt'\n\
             [[text]]\nname = 'four windows'\npath = 'sample.txt'\nwindows = 4\n{recipes}"
        );
        std::fs::write(folder.path().join("study.toml"), study).unwrap();
        Self { folder }
    }

    fn command(&self, out: &str) -> std::process::Command {
        let (study, out) = (self.folder.path().join("study.toml"), self.folder.path().join(out));
        command("stb-convert", &["study", text(&study), text(&out)])
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap()
    }

    /// The rows of the table without times and builds.
    fn figures(&self, out: &str) -> Vec<Vec<String>> {
        let csv = self.file(&format!("{out}/small.csv"));
        let fields = |line: &str| line.split(',').take(19).map(str::to_owned).collect();
        csv.lines().map(fields).collect()
    }
}

const WORKING: &str = "[[recipe]]\nbase = 'source'\nlabel = 'dense'\n\
    [[recipe]]\nbase = 'stbllm-6of8'\nset = { calibration.samples = 6, calibration.length = 48 }\n\
    [[recipe]]\nbase = 'nm-2of8'\nset = { calibration.samples = 6, calibration.length = 48 }\n";

#[test]
fn studies_measure_every_cell_once() {
    let study = SmallStudy::new(WORKING);
    let first = stb_tests::programs::Run::from(study.command("out").output().unwrap());
    assert!(first.err.contains("6 of 6 cells measured now"), "{}", first.err);
    let table = first.success();
    assert!(table.contains("| dense |") && table.contains("four windows"), "{table}");
    let figures = study.figures("out");
    assert_eq!(figures.len(), 7);
    // model, recipe, text; KL and agreement of the unchanged checkpoint.
    assert_eq!(figures[1][..3], ["tiny", "dense", "fox"]);
    assert_eq!((figures[1][13].as_str(), figures[1][15].as_str()), ("0", "1"));
    assert!(figures[3][13].parse::<f64>().unwrap() > 0.0);
    // The commands give the same figures.
    let file = study.folder.path().join("m.stb");
    let sample = study.folder.path().join("sample.txt");
    let options = ["--calib-samples", "6", "--calib-len", "48", "--calib", text(&sample)];
    let recipe = ["--recipe", "nm-2of8", "--no-check"];
    stb_tests::programs::convert(
        &study.folder.path().join("model"),
        &file,
        &[&options[..], &recipe].concat(),
    );
    let args = ["perplexity", text(&file), "--text", text(&sample), "--ctx", "32", "--json"];
    let json: Json = serde_json::from_str(&run("stb-run", &args).success()).unwrap();
    let found: f64 = figures[5][8].parse().unwrap();
    assert!((found / json["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{found}");
    assert_eq!(figures[5][4], json["file_bytes"].to_string());

    let again = stb_tests::programs::Run::from(study.command("out").output().unwrap());
    assert!(again.err.contains("0 of 6 cells measured now"), "{}", again.err);
    assert_eq!(again.success(), table);
    let svg = study.file("out/small.svg");
    assert_eq!(svg.matches("<circle").count(), 6);
    let cells = std::fs::read_dir(study.folder.path().join("out/cells")).unwrap();
    let left = cells.flatten().filter(|e| !e.file_name().to_string_lossy().ends_with(".json"));
    assert_eq!(left.count(), 1, "only the lock stays beside the cells");
}

/// A killed study resumes and ends with the same figures.
#[cfg(unix)]
#[test]
fn killed_studies_resume() {
    let study = SmallStudy::new(WORKING);
    let _ = stb_tests::programs::Run::from(study.command("whole").output().unwrap()).success();
    let cells = study.folder.path().join("out/cells");
    let finished = || {
        let entries = std::fs::read_dir(&cells).into_iter().flatten().flatten();
        entries.filter(|e| e.file_name().to_string_lossy().ends_with(".json")).count()
    };
    let mut child = study.command("out");
    child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = child.spawn().unwrap();
    while finished() < 2 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = finished();
    assert!(kept >= 2);
    let rest = stb_tests::programs::Run::from(study.command("out").output().unwrap());
    let expected = format!("{} of 6 cells measured now", 6 - kept);
    assert!(rest.err.contains(&expected), "{}", rest.err);
    let _ = rest.success();
    assert_eq!(study.figures("out"), study.figures("whole"));
}

#[test]
fn cells_that_fail_do_not_stop_a_study() {
    let impossible = "[[recipe]]\nbits = 0.01\nlabel = 'impossible'\n";
    let study = SmallStudy::new(&format!("{impossible}{WORKING}"));
    let run = stb_tests::programs::Run::from(study.command("out").output().unwrap());
    assert!(run.out.contains("failed") && run.out.contains("| dense |"), "{}", run.out);
    let error = run.failure(2);
    assert!(error.contains("smallest file"), "{error}");
    assert!(study.file("out/small.csv").contains("smallest file"));
    // Without definitions for the variables of its paths the study ends with an error.
    let path = study.folder.path().join("study.toml");
    let definition = study.file("study.toml").replace("path = 'model'", "path = '{m}/model'");
    std::fs::write(&path, definition).unwrap();
    let error = stb_tests::programs::Run::from(study.command("out2").output().unwrap()).failure(2);
    assert!(error.contains("no models") && error.contains("--define m"), "{error}");
    let mut defined = study.command("out");
    let run: stb_tests::programs::Run = defined
        .args(["--define", &format!("m={}", text(study.folder.path()))])
        .output()
        .unwrap()
        .into();
    assert!(run.err.contains("0 of 8 cells measured now"), "{}", run.err);
}

/// The studies in the repository use recipes and options that exist and that suit their models.
#[test]
fn shipped_studies_can_be_run() {
    let folder = root().join("tests/bench/studies");
    let checkpoint = stb_runtime::Checkpoint::open(&quill(), true).unwrap();
    let defined = [("data".to_owned(), "data".to_owned())];
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let definition = std::fs::read_to_string(&path).unwrap();
        let definition = stb_convert::study::Definition::parse(&definition).unwrap();
        assert_eq!(path.file_stem().unwrap().to_str(), Some(definition.name.as_str()));
        let study = definition.resolve(&folder, &defined).unwrap();
        study.check().unwrap();
        assert!(study.left_out.is_empty() && study.models[0].path.exists());
        for recipe in &study.recipes {
            let _ = stb_convert::plan(&checkpoint, &recipe.recipe).unwrap();
        }
        count += 1;
    }
    assert!(count >= 8, "{count} studies");
}

#[test]
fn flipped_signs_cost_perplexity() {
    let folder = folder();
    let sample = folder.path().join("sample.txt");
    let source =
        std::fs::read_to_string(root().join("convert/data/calibration/books.txt")).unwrap();
    std::fs::write(&sample, source.chars().take(6000).collect::<String>()).unwrap();
    let out = folder.path().join("out");
    let recipe = folder.path().join("r.toml");
    let quick = "name = 'r'\n[calibration]\nsamples = 8\nlength = 128\n\
                 [body]\nmethod = 'stbllm'\nn = 8\n";
    std::fs::write(&recipe, quick).unwrap();
    let quill = quill();
    let args = ["flips", text(&quill), text(&out), "--text", text(&sample), "--ctx", "128"];
    let more = ["--recipe", text(&recipe), "--percent", "0,2,50", "--seeds", "2", "--quiet"];
    let table = run("stb-convert", &[&args[..], &more].concat()).success();
    assert!(table.contains("| 50 |"), "{table}");
    let csv = std::fs::read_to_string(out.join("flips.csv")).unwrap();
    let rows: Vec<Vec<&str>> = csv.lines().skip(1).map(|l| l.split(',').collect()).collect();
    let found = |order: &str, seed: &str, share: &str| -> f64 {
        let row = rows.iter().find(|r| r[..3] == [order, seed, share]).unwrap();
        row[4].parse().unwrap()
    };
    assert_eq!(rows.len(), 1 + 3 * 3);
    let start = found("none", "", "0");
    for (order, seed) in [("random", "0"), ("random", "1"), ("least-important", "")] {
        // Decoded weights give the same as packed ones, up to the order of sums.
        assert!((found(order, seed, "0") / start - 1.0).abs() < 1e-4);
        assert!(found(order, seed, "0.5") > 1.5 * start, "{order}");
    }
    assert!(found("least-important", "", "0.02") < found("random", "0", "0.02"));
    assert_ne!(found("random", "0", "0.02"), found("random", "1", "0.02"));
    assert!(std::fs::read_to_string(out.join("flips.svg")).unwrap().contains("polyline"));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 3, "nothing else is left");
}
