//! Writes a model of a well-known shape with random weights, for measurements.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use stb_convert::Recipe;
use stb_format::encoding::Dense;
use stb_tests::random_model::{SHAPES, shape, write};
use stb_tests::tiny;

/// Writes a model of a well-known shape with random weights, for measurements.
#[derive(Parser)]
struct Cli {
    /// The shape
    #[arg(value_parser = SHAPES)]
    shape: String,
    /// The .stb file to write; with --checkpoint a folder
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
        let mut config = tiny::config();
        for (key, value) in [
            ("vocab_size", 64),
            ("hidden_size", spec.hidden_size),
            ("intermediate_size", spec.intermediate_size),
            ("num_hidden_layers", spec.layers),
            ("num_attention_heads", spec.heads),
            ("num_key_value_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
            ("max_position_embeddings", spec.context_length),
        ] {
            config[key] = value.into();
        }
        // Outputs of about the size of inputs, as in trained models.
        let shrink = 2.0 / (spec.hidden_size as f32).sqrt();
        let matrix = |name: &str| name.ends_with("_proj.weight");
        tiny::write(&cli.out, &config, Dense::F16, |name, values| {
            if matrix(name) {
                values.iter_mut().for_each(|w| *w *= shrink);
            }
        });
        return Ok(());
    }
    let recipe = Recipe::load(&cli.recipe)?;
    let file = File::create(&cli.out).with_context(|| cli.out.display().to_string())?;
    let out = write(&spec, &recipe, BufWriter::new(file))?;
    out.into_inner()?.sync_all()?;
    Ok(())
}
