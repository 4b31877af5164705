//! Converts a model by several recipes and measures what is left of it: the table "how small is it
//! really".

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use serde_json::Value as Json;
use stb_tests::programs::{note, print, run};

/// Converts a model by several recipes and prints file size, true bits and perplexity of each, as a
/// Markdown table on standard output and as one line of JSON each on standard error.
#[derive(Parser)]
struct Cli {
    /// A dense checkpoint
    model: PathBuf,
    /// The text for perplexity
    #[arg(long)]
    text: PathBuf,
    /// What separates its documents
    #[arg(long)]
    separator: Option<String>,
    /// Tokens per window
    #[arg(long, default_value = "256")]
    ctx: String,
    /// Recipes or `bits=X`, separated by commas
    #[arg(long, value_delimiter = ',', default_value = RECIPES)]
    recipes: Vec<String>,
}

const RECIPES: &str = "source,int8,int4,stbllm-6of8,stbllm-5of8,stbllm-4of8,nm-2of4,nm-2of8,\
    nm-1of4,nm-1of8";

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let folder = tempfile::tempdir()?;
    let mut table = String::from(
        "| recipe | file bytes | true bits per parameter | stored bits per decoder weight | \
         perplexity | seconds |\n|---|---|---|---|---|---|\n",
    );
    let dense = perplexity(&cli, &cli.model)?;
    table += &format!("| (checkpoint) | | | | {} | |\n", quality(&dense)?);
    for recipe in &cli.recipes {
        let file = folder.path().join("model.stb");
        let started = Instant::now();
        convert(&cli.model, &file, recipe)?;
        let seconds = started.elapsed().as_secs_f64();
        let inspection = json(&["inspect", "--json", path(&file)?], "stb-convert")?;
        let found = perplexity(&cli, &file)?;
        let number = |key: &str| inspection[key].as_f64().with_context(|| key.to_owned());
        table += &format!(
            "| {recipe} | {} | {:.3} | {:.3} | {} | {seconds:.1} |\n",
            number("file_bytes")?,
            number("true_bits_per_parameter")?,
            number("body_bits")?,
            quality(&found)?,
        );
        note(&format!("{recipe}: {found}"));
    }
    print(&table);
    Ok(())
}

fn convert(model: &Path, file: &Path, recipe: &str) -> anyhow::Result<()> {
    let mut args = vec![path(model)?, path(file)?, "--force", "--quiet"];
    match recipe.strip_prefix("bits=") {
        Some(bits) => args.extend(["--bits", bits]),
        None => args.extend(["--recipe", recipe]),
    }
    let _ = run("stb-convert", &args).success();
    Ok(())
}

fn perplexity(cli: &Cli, model: &Path) -> anyhow::Result<Json> {
    let mut args =
        vec!["perplexity", path(model)?, "--text", path(&cli.text)?, "--ctx", &cli.ctx, "--json"];
    if let Some(separator) = &cli.separator {
        args.extend(["--separator", separator]);
    }
    json(&args, "stb-run")
}

fn quality(result: &Json) -> anyhow::Result<String> {
    let number = |key: &str| result[key].as_f64().with_context(|| key.to_owned());
    let (value, error) = (number("perplexity")?, number("standard_error")?);
    Ok(format!("{value:.3} ± {:.3}", value * error))
}

fn json(args: &[&str], program: &str) -> anyhow::Result<Json> {
    Ok(serde_json::from_str(&run(program, args).success())?)
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
