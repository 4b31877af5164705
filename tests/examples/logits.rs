//! Writes the logits of a model after each of the given tokens, for comparisons with other frameworks.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use stb_runtime::{Engine, OpenOptions, State};

/// Writes logits [tokens, vocabulary] as f32 little-endian to standard output.
#[derive(Parser)]
struct Cli {
    /// An .stb file or a dense checkpoint
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(value_delimiter = ',', required = true)]
    ids: Vec<u32>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let engine = Engine::open(&cli.model, &OpenOptions::exact())?;
    let mut state = State::new(&engine, cli.ids.len());
    let mut bytes = Vec::new();
    engine.forward_all(&mut state, &cli.ids, |_, logits| {
        bytes.extend(logits.iter().flat_map(|v| v.to_le_bytes()));
    })?;
    Ok(std::io::stdout().lock().write_all(&bytes)?)
}
