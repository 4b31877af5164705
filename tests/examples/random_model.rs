//! Writes a model of a well-known shape with random weights, for measurements.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use stb_convert::Recipe;
use stb_tests::random_model::{SHAPES, checkpoint, shape, write};

/// Writes a model of a well-known shape with random weights, for measurements.
#[derive(Parser)]
struct Cli {
    /// The shape
    #[arg(value_parser = SHAPES)]
    shape: String,
    /// The .stb file to write, or the folder with --checkpoint
    out: PathBuf,
    /// Write a dense checkpoint in f16 with a vocabulary of 64 letters, to measure conversion
    #[arg(long, conflicts_with = "recipe")]
    checkpoint: bool,
    /// A recipe of stb-convert, for the encodings
    #[arg(long, default_value = "nm-1of8")]
    recipe: String,
    /// Decoder layers; default: those of the shape
    #[arg(long, value_name = "N")]
    layers: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let spec = shape(&cli.shape, cli.layers)?;
    if cli.checkpoint {
        checkpoint(&cli.out, &spec);
        return Ok(());
    }
    let recipe = Recipe::load(&cli.recipe)?;
    let file = File::create(&cli.out).with_context(|| cli.out.display().to_string())?;
    let out = write(&spec, &recipe, BufWriter::new(file))?;
    out.into_inner()?.sync_all()?;
    Ok(())
}
