//! Compares end-to-end perplexities with those of an independent implementation of the published algorithm and
//! its variants, on the same models, calibration windows and evaluation text.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use stb_convert::Recipe;
use stb_convert::calibration::CalibrationText;
use stb_convert::prepare::{Order, prepare};
use stb_runtime::Checkpoint;
use stb_tests::conversion::Notes;
use stb_tests::paths::{root, shared};
use stb_tests::programs::{note, print, run as start};

/// Prints a Markdown table: perplexity of the reference (by seed of the calibration windows) and
/// ours. Settings are in `tests/bench/reference/`.
#[derive(Parser)]
struct Cli {
    /// A table of `tests/bench/reference`, without `.toml`
    table: String,
    /// Seeds of the calibration windows
    #[arg(long, value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,
    /// Only settings whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

/// A file of settings.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Table {
    /// Name of the model.
    model: String,
    /// The reference's perplexity of the dense model.
    full_precision: f64,
    /// Options of every setting, unless the setting changes them.
    base: toml::Table,
    setting: Vec<Setting>,
}

#[derive(serde::Deserialize)]
struct Setting {
    name: String,
    /// Perplexities of the reference, by seed.
    reference: Vec<f64>,
    /// Changes of the base options; an empty string removes an option.
    #[serde(flatten)]
    body: toml::Table,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let path = root().join("tests/bench/reference").join(format!("{}.toml", cli.table));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let table: Table = toml::from_str(&text)?;
    let found = |path: &str| shared(path).with_context(|| format!("{path} is not here"));
    let model = found(&format!("data/models/{}", table.model))?;
    let checkpoint = Checkpoint::open(&model, true)?;
    let calibration = CalibrationText::file(&found("data/text/tinystories/calib.txt")?)?;
    let text = found("data/text/tinystories/eval.txt")?;
    let folder = tempfile::tempdir()?;
    let dense = measure(&model, &text)?;
    let heads: String = cli.seeds.iter().map(|s| format!(" ours, seed {s} |")).collect();
    let mut out = format!(
        "| setting | reference, seed 0, 1, … |{heads} ours ÷ reference | seconds |\n|---|---|{}---|---|\n\
         | full precision | {:.3} |{} {:.3} | |\n",
        "---|".repeat(cli.seeds.len()),
        table.full_precision,
        format!(" {dense:.3} |").repeat(cli.seeds.len()),
        dense / table.full_precision
    );
    for setting in table.setting.iter().filter(|s| s.name.contains(&cli.only)) {
        let started = Instant::now();
        let mut ours = Vec::new();
        for seed in &cli.seeds {
            let recipe = recipe(&table.base, setting, *seed)?;
            let file = folder.path().join("model.stb");
            run(&checkpoint, &recipe, &calibration, &file)?;
            ours.push(measure(&file, &text)?);
        }
        let list =
            |values: &[f64]| -> Vec<String> { values.iter().map(|v| format!("{v:.3}")).collect() };
        // The geometric mean over the seeds that both have.
        let pairs: Vec<f64> = cli
            .seeds
            .iter()
            .zip(&ours)
            .filter_map(|(seed, ours)| Some((ours / setting.reference.get(*seed as usize)?).ln()))
            .collect();
        let ratio = (pairs.iter().sum::<f64>() / pairs.len() as f64).exp();
        let line = format!(
            "| {} | {} | {} | {ratio:.3} | {:.0} |\n",
            setting.name,
            list(&setting.reference).join(", "),
            list(&ours).join(" | "),
            started.elapsed().as_secs_f64()
        );
        note(line.trim_end());
        out += &line;
    }
    print(&out);
    Ok(())
}

/// The recipe of a setting, with the calibration of the reference.
fn recipe(base: &toml::Table, setting: &Setting, seed: u64) -> anyhow::Result<Recipe> {
    let mut body = base.clone();
    for (key, value) in &setting.body {
        if value.as_str() == Some("") {
            body.remove(key);
        } else {
            body.insert(key.clone(), value.clone());
        }
    }
    let text = format!(
        "name = {:?}\n[calibration]\nseparator = '<|endoftext|>'\ndraw = 'python'\nsamples = 128\n\
         length = 256\nseed = {seed}\n[embeddings]\nbits = 0\n[head]\nbits = 0\n[body]\n{}",
        setting.name,
        toml::to_string(&body)?
    );
    Recipe::parse(&text).with_context(|| setting.name.clone())
}

fn run(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: &CalibrationText,
    target: &Path,
) -> anyhow::Result<()> {
    let order = Order { checkpoint, calibration, target, force: true, device: None };
    prepare(checkpoint, recipe, calibration, false)?.convert(&order, &Notes)?;
    Ok(())
}

/// The perplexity over 400 windows of 256 tokens, each story after a begin token.
fn measure(model: &Path, text: &Path) -> anyhow::Result<f64> {
    let path = |p: &Path| p.to_str().map(str::to_owned).context("a path that is not UTF-8");
    let (model, text) = (path(model)?, path(text)?);
    let mut args = vec!["perplexity", &model, "--text", &text, "--json", "--ctx", "256"];
    args.extend(["--windows", "400", "--separator", "<|endoftext|>"]);
    let result: serde_json::Value = serde_json::from_str(&start("stb-run", &args).success())?;
    if result["windows"].as_u64() != Some(400) {
        bail!("not 400 windows: {result}");
    }
    result["perplexity"].as_f64().context("no perplexity")
}
