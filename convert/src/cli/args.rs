//! The arguments of `stb-convert`.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use stb_runtime::DeviceChoice;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 file cannot be \
    read or written, 4 file invalid, 5 not supported, 130 interrupted.";

/// Quantizes LLaMA checkpoints into .stb files; reported sizes count every byte of the file.
#[derive(Parser)]
#[command(name = "stb-convert", version, after_help = EXIT_CODES)]
#[command(args_conflicts_with_subcommands = true, allow_negative_numbers = true)]
#[command(
    override_usage = "stb-convert [OPTIONS] <SRC> <OUT>\n       stb-convert [OPTIONS] --dry-run <SRC>\n       stb-convert <COMMAND>"
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub convert: ConvertArgs,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Show header, metadata and tensors of a file
    Inspect {
        /// An .stb file
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check every rule and every checksum of a file
    Verify {
        /// An .stb file
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write dequantized weights, configuration and tokenizer in the Hugging Face layout
    Export {
        /// An .stb file
        file: PathBuf,
        /// A new folder
        folder: PathBuf,
        /// Data type of the weights; f32 is exact [default: that of the original model]
        #[arg(long)]
        dtype: Option<Dtype>,
    },
    /// Write a model card for the Hugging Face hub from the metadata of a file
    Card(CardArgs),
    /// List the recipes, or print one as TOML to start your own from
    Recipes {
        /// The recipe to print
        name: Option<String>,
    },
    /// Compare recipes on models and texts: one table, measured cell by cell, resumable
    Study(StudyArgs),
    /// Flip signs of a binarized model and measure its perplexity
    Flips(FlipArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages of this program and its commands
    Man {
        /// An existing folder
        folder: PathBuf,
    },
}

#[derive(Args)]
pub(super) struct CardArgs {
    /// An .stb file with a model
    pub file: PathBuf,
    /// The Markdown file to write; default: standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replace the output if it exists
    #[arg(short, long)]
    pub force: bool,
    /// The original model on the hub
    #[arg(long, value_name = "OWNER/NAME")]
    pub base_model: Option<String>,
    /// License of the weights, an SPDX expression; default: the one in the metadata, if any
    #[arg(long, value_name = "SPDX")]
    pub license: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

#[derive(Args)]
pub(super) struct ConvertArgs {
    /// A folder in the Hugging Face layout, a .safetensors or .gguf file, or an index of shards
    pub src: Option<PathBuf>,
    /// The .stb file to write
    pub out: Option<PathBuf>,
    /// A recipe's name or a .toml file
    #[arg(short, long, value_name = "NAME|FILE", default_value = stb_convert::recipe::DEFAULT, help_heading = "What to do")]
    pub recipe: String,
    /// Choose encodings for this size of the whole file, in true bits per parameter
    #[arg(short, long, value_name = "X", conflicts_with = "recipe", value_parser = bits, help_heading = "What to do")]
    pub bits: Option<f64>,
    /// Find the smallest file whose KL divergence from SRC is at most this, in nats per token, measured on text held
    /// out from calibration; takes several conversions
    #[arg(long, value_name = "X", conflicts_with_all = ["recipe", "bits", "no_check"], value_parser = divergence, help_heading = "What to do")]
    pub max_kl: Option<f64>,
    /// Do not measure the file; its metadata will say so
    #[arg(long, help_heading = "What to do")]
    pub no_check: bool,
    /// Print the plan, the size and the memory needed; convert nothing
    #[arg(long, help_heading = "What to do")]
    pub dry_run: bool,
    /// Calibration text, UTF-8, or .jsonl with a chat or a text per line; also compressed with gzip; self: the model
    /// writes it; default: that of the recipe, or the built-in text
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    pub calib: Option<PathBuf>,
    /// Calibration sequences; default: set by the recipe
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Calibration")]
    pub calib_samples: Option<u32>,
    /// Tokens per calibration sequence; default: set by the recipe
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..), help_heading = "Calibration")]
    pub calib_len: Option<u32>,
    /// Seed of the calibration windows
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    pub seed: Option<u64>,
    /// Distill each finished layer from that of the checkpoint: passes over the calibration sequences that
    /// train its scales and norms. Better, but several times as long; default: set by the recipe, else none
    #[arg(long, alias = "tuning", value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), help_heading = "Calibration")]
    pub distill_layers: Option<u32>,
    /// Distill the whole model from the checkpoint: N times as many fresh sequences as calibration has train all
    /// scales and norms. Better by far, but large models take days; default: set by the recipe, else none
    #[arg(long, alias = "fine-tuning", value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), help_heading = "Calibration")]
    pub distill: Option<u32>,
    /// Replace OUT if it exists
    #[arg(short, long, help_heading = "Output")]
    pub force: bool,
    /// Write a report on the file, its layers and its tensors as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
    /// Threads; default: as many as this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Output")]
    pub threads: Option<u16>,
    /// Device for calibration and large products: cpu, cuda, cuda:N, or auto for a CUDA device if there is
    /// one; distillation and --bits use the CPU [default: cpu, until this has been proven on devices]
    #[arg(long, value_name = "DEVICE", help_heading = "Output")]
    pub device: Option<DeviceChoice>,
}

/// Parses true bits per parameter.
fn bits(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bits) if bits > 0.0 && bits <= 64.0 => Ok(bits),
        _ => Err("a number above 0 and at most 64 is needed".into()),
    }
}

/// Parses a KL divergence in nats per token.
fn divergence(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(kl) if kl > 0.0 && kl <= 100.0 => Ok(kl),
        _ => Err("a number above 0 and at most 100 is needed".into()),
    }
}

#[derive(Args)]
pub(super) struct StudyArgs {
    /// The definition of the study, a TOML file
    pub study: PathBuf,
    /// A folder for results; existing cells are not measured again
    pub out: PathBuf,
    /// Value of {NAME} in paths of the study; models and texts with undefined names are left out
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    pub define: Vec<(String, String)>,
    /// Another model, or another path for one of the study
    #[arg(short, long, value_name = "NAME=PATH", value_parser = pair)]
    pub model: Vec<(String, String)>,
    /// Measure everything again
    #[arg(long)]
    pub fresh: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Threads; default: as many as this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

#[derive(Args)]
pub(super) struct FlipArgs {
    /// A folder in the Hugging Face layout, a .safetensors or .gguf file, or an index of shards
    pub src: PathBuf,
    /// A folder for flips.csv, flips.md and flips.svg
    pub out: PathBuf,
    /// How the model is binarized: a recipe's name or a .toml file; default: the structure of the
    /// paper with no weight pruned
    #[arg(short, long, value_name = "NAME|FILE")]
    pub recipe: Option<String>,
    /// The text for perplexity, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Split the text at this string into documents; each is stripped and gets a begin token
    #[arg(long, value_name = "TEXT")]
    pub separator: Option<String>,
    /// Tokens per window; default: the context of the model
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub ctx: Option<u32>,
    /// The most windows to use; default: all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub windows: Option<u32>,
    /// Percentages of the signs to flip
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2,3,5,7,10,15,20,25,30,40,50", value_parser = percentage)]
    pub percent: Vec<f64>,
    /// Random orders
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Flip signs in salient columns too
    #[arg(long)]
    pub salient: bool,
    /// Calibration text, UTF-8; default: that of the recipe
    #[arg(long, value_name = "FILE")]
    pub calib: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Threads; default: as many as this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// Parses NAME=VALUE.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("NAME=VALUE is needed".into()),
    }
}

/// Parses a percentage.
fn percentage(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("a number from 0 to 100 is needed".into()),
    }
}

/// Exits with a usage error, as clap does for other mistakes on the command line.
pub(super) fn usage(message: &str) -> ! {
    let kind = clap::error::ErrorKind::MissingRequiredArgument;
    Cli::command().error(kind, message).exit()
}

#[cfg(test)]
mod tests {
    use super::{pair, percentage};

    #[test]
    fn options_are_parsed() {
        assert_eq!(pair("data=/a=b").unwrap(), ("data".into(), "/a=b".into()));
        assert!(pair("data").is_err() && pair("=x").is_err());
        assert_eq!(percentage("1.5"), Ok(1.5));
        assert!(percentage("101").is_err() && percentage("NaN").is_err());
    }
}
