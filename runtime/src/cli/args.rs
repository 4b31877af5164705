//! The arguments of `stb-run`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Args, Parser, Subcommand};
use stb_runtime::Task;

use super::load::LoadArgs;
use super::settings::SamplingArgs;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 file cannot be \
    read, 4 file invalid, 5 not supported, 130 interrupted.\n\
    STB_ISA=scalar|avx2|avx512|avx512vbmi|avx512amx|neon|neon-dotprod forces an instruction set.";

/// Runs .stb models: language models below one bit per weight, straight from one mapped file.
#[derive(Parser)]
#[command(name = "stb-run", version = version(), after_help = EXIT_CODES)]
#[command(args_conflicts_with_subcommands = true, allow_negative_numbers = true)]
#[command(override_usage = "stb-run [OPTIONS] <FILE>\n       stb-run <COMMAND>")]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// List the devices of this machine
    #[arg(long)]
    pub list_devices: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

impl Cli {
    /// Whether the command ends on signals in its own way.
    pub fn catches_signals(&self) -> bool {
        #[cfg(feature = "serve")]
        return matches!(self.command, Some(Command::Serve(_)));
        #[cfg(not(feature = "serve"))]
        false
    }
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Serve models over HTTP with OpenAI's API and a web page
    #[cfg(feature = "serve")]
    Serve(super::serve::ServeArgs),
    /// Measure perplexity on a text, and KL divergence from another model
    Perplexity(PerplexityArgs),
    /// Measure accuracy on multiple-choice tasks
    ZeroShot(ZeroShotArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
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
pub(super) struct RunArgs {
    /// An .stb file; or a checkpoint: a folder, .safetensors or .gguf file, index of shards
    pub file: Option<PathBuf>,
    /// The same as FILE, as llama-cli has it
    #[arg(short, long, value_name = "FILE", conflicts_with = "file")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Prompt text; without it, read from a pipe or start a chat
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt")]
    pub prompt: Option<String>,
    /// Chat, also if the input is a pipe; --prompt is the first message. Also -cnv
    #[arg(
        short,
        long,
        alias = "conversation",
        overrides_with = "interactive",
        help_heading = "Prompt"
    )]
    pub interactive: bool,
    /// System instructions
    #[arg(long, alias = "system-prompt", value_name = "TEXT", help_heading = "Prompt")]
    pub system: Option<String>,
    /// Continue the prompt without the model's chat template
    #[arg(long, help_heading = "Prompt")]
    pub no_template: bool,
    /// Context length in tokens; 0 for the context length of the model
    #[arg(
        short,
        long,
        alias = "ctx-size",
        value_name = "N",
        env = "STB_CTX",
        default_value_t = 0,
        help_heading = "Prompt"
    )]
    pub ctx: usize,
    /// Keep no history of what is typed in chats
    #[arg(long, help_heading = "Prompt")]
    pub no_history: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print timings as one line of JSON on standard error
    #[arg(long, help_heading = "Output")]
    pub json_stats: bool,
    /// Print no timings
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

#[derive(Args)]
pub(super) struct PerplexityArgs {
    /// An .stb file; or a checkpoint: a folder, .safetensors or .gguf file, index of shards
    pub file: PathBuf,
    #[command(flatten)]
    pub load: LoadArgs,
    /// The text, a UTF-8 file; or .jsonl with a field "text" per line. May be compressed with gzip
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// A model to compare with, usually the dense checkpoint: reports KL divergence and the
    /// fraction of tokens with the same best prediction
    #[arg(long, value_name = "PATH")]
    pub reference: Option<PathBuf>,
    /// Tokens per window; default: the context of the model
    #[arg(long, value_name = "N")]
    pub ctx: Option<usize>,
    /// Largest number of windows to use; default: all
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
    /// Split the text at this string into documents; each is trimmed and starts with a begin token
    #[arg(long, value_name = "TEXT")]
    pub separator: Option<String>,
    /// Treat lines as rows of a data set and join them by two newlines, as for wiki.test.raw
    #[arg(long, conflicts_with = "separator")]
    pub rows: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(super) struct ZeroShotArgs {
    /// An .stb file; or a checkpoint: a folder, .safetensors or .gguf file, index of shards
    pub file: PathBuf,
    /// Files of questions, one JSON object per line, whose names start with the task's:
    /// winogrande, openbookqa, hellaswag, boolq, arc_easy, arc_challenge, rte or piqa
    pub tasks: Vec<PathBuf>,
    #[command(flatten)]
    pub load: LoadArgs,
    /// A file of questions for this task, with any name; may be given several times
    #[arg(long = "task", value_name = "NAME=FILE", value_parser = named_task)]
    pub named: Vec<(Task, PathBuf)>,
    /// Only the first N questions of each file
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Largest number of input tokens; default: the context of the model
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Do not start questions with a begin token even if the tokenizer adds one, as in old versions
    /// of the harness
    #[arg(long)]
    pub no_begin_token: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The largest number of tokens of a benchmark, above all context lengths.
const MOST_TOKENS: i64 = 1 << 20;

#[derive(Args)]
pub(super) struct BenchArgs {
    /// An .stb file; or a checkpoint: a folder, .safetensors or .gguf file, index of shards
    pub file: PathBuf,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Prompt tokens
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    pub prompt: u32,
    /// Tokens to generate after a context of --depth tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    pub tokens: u32,
    /// Tokens in the cache before generation is measured
    #[arg(short, long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=MOST_TOKENS))]
    pub depth: u32,
    /// Sequences that decode in one batch
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: u32,
    /// Measured runs, after one warm-up run
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let isas: Vec<_> = stb_kernels::Isa::available().map(stb_kernels::Isa::name).collect();
        format!(
            "{} (format {}, instruction sets here: {})",
            env!("CARGO_PKG_VERSION"),
            stb_format::VERSION,
            isas.join(", ")
        )
    });
    &TEXT
}

/// Parses `NAME=FILE`.
fn named_task(text: &str) -> Result<(Task, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("NAME=FILE is needed")?;
    let task = Task::from_name(name)
        .ok_or_else(|| format!("there is no task {name:?}; {}", task_names()))?;
    Ok((task, file.into()))
}

pub(super) fn task_names() -> String {
    format!("use one of {}", Task::ALL.map(Task::name).join(", "))
}

/// Replaces the options of [`LONG_NAMES`].
pub(super) fn long_names(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.map(|arg| {
        let Some(text) = arg.to_str() else { return arg };
        let (name, value) = text.split_once('=').map_or((text, None), |(n, v)| (n, Some(v)));
        match (LONG_NAMES.iter().find(|(short, _)| *short == name), value) {
            (None, _) => arg,
            (Some((_, long)), None) => long.into(),
            (Some((_, long)), Some(value)) => format!("{long}={value}").into(),
        }
    })
}

/// Options of llama.cpp with one dash and several letters, which clap cannot parse, and ours.
const LONG_NAMES: [(&str, &str); 4] =
    [("-ngl", "--gpu-layers"), ("-np", "--slots"), ("-cnv", "--interactive"), ("-sys", "--system")];
