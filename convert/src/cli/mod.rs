//! The command line of `stb-convert`.

mod convert;
mod files;
mod progress;
mod study;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use stb_runtime::DeviceChoice;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 file cannot be \
    read or written, 4 file invalid, 5 not supported, 130 interrupted.";

/// Converts LLaMA checkpoints to .stb: weights below one bit, in one file, with true sizes.
#[derive(Parser)]
#[command(name = "stb-convert", version, after_help = EXIT_CODES)]
#[command(args_conflicts_with_subcommands = true, allow_negative_numbers = true)]
#[command(
    override_usage = "stb-convert [OPTIONS] <SRC> <OUT>\n       stb-convert [OPTIONS] --dry-run <SRC>\n       stb-convert <COMMAND>"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: ConvertArgs,
}

#[derive(Subcommand)]
enum Command {
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
    },
    /// Write dequantized weights, configuration and tokenizer in the Hugging Face layout
    Export {
        /// An .stb file
        file: PathBuf,
        /// A new folder
        folder: PathBuf,
        /// Number type of the weights; f32 keeps them exactly
        #[arg(long, default_value = "f32")]
        dtype: Dtype,
    },
    /// List the recipes, or print one as TOML to start your own from
    Recipes {
        /// The recipe to print
        name: Option<String>,
    },
    /// Compare recipes on models and texts: one table, measured cell by cell, resumable
    Study(study::StudyArgs),
    /// Flip signs of a binarized model and measure what it costs
    Flips(study::FlipArgs),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

#[derive(Args)]
struct ConvertArgs {
    /// A folder in the Hugging Face layout, a .safetensors file, or an index of shards
    src: Option<PathBuf>,
    /// The .stb file to write
    out: Option<PathBuf>,
    /// A recipe's name or a .toml file
    #[arg(short, long, value_name = "NAME|FILE", default_value = stb_convert::recipe::DEFAULT, help_heading = "What to do")]
    recipe: String,
    /// The size of the whole file in true bits per parameter: chooses encodings that meet it
    #[arg(short, long, value_name = "X", conflicts_with = "recipe", value_parser = bits, help_heading = "What to do")]
    bits: Option<f64>,
    /// Only print what would be done and what it would cost
    #[arg(long, help_heading = "What to do")]
    dry_run: bool,
    /// A text to calibrate on, UTF-8; default: a public-domain text in the program
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    calib: Option<PathBuf>,
    /// Calibration sequences; default: what the recipe says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Calibration")]
    calib_samples: Option<u32>,
    /// Tokens per calibration sequence; default: what the recipe says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..), help_heading = "Calibration")]
    calib_len: Option<u32>,
    /// Seed of the calibration windows
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    seed: Option<u64>,
    /// Passes over the calibration sequences in which scales and norms of each finished layer are tuned
    /// to the dense model's output: better, several times as long; default: what the recipe says, none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), help_heading = "Calibration")]
    tuning: Option<u32>,
    /// Passes over the calibration sequences in which scales and norms of the whole model are tuned to
    /// what the dense model says: better by far, but large models take days; default: what the recipe
    /// says, none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), help_heading = "Calibration")]
    fine_tuning: Option<u32>,
    /// Replace OUT if it exists
    #[arg(short, long, help_heading = "Output")]
    force: bool,
    /// Write what was done to each tensor as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    report: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Output")]
    quiet: bool,
    /// Threads; default: as many as this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Output")]
    threads: Option<u16>,
    /// Where calibration and large products are computed: cpu, cuda, cuda:N, or auto for a CUDA device if
    /// there is one; tuning and --bits use the CPU [default: cpu, until this has been proven on devices]
    #[arg(long, value_name = "DEVICE", help_heading = "Output")]
    device: Option<DeviceChoice>,
}

fn bits(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bits) if bits > 0.0 && bits <= 64.0 => Ok(bits),
        _ => Err("a number above 0 and at most 64 is needed".into()),
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    // The first Ctrl-C asks the work to stop, the second does not wait. Neither leaves a file.
    let handler = || {
        if stb_convert::interrupt::interrupt() {
            stb_convert::resume::leave_at_once();
            std::process::exit(130);
        }
    };
    let _ = ctrlc::set_handler(handler);
    let threads = cli.convert.threads;
    let result = match cli.command {
        Some(Command::Completions { shell }) => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "stb-convert",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Some(Command::Inspect { file, json }) => files::inspect(&file, json),
        Some(Command::Verify { file }) => files::verify(&file),
        Some(Command::Export { file, folder, dtype }) => files::export(&file, &folder, dtype),
        Some(Command::Recipes { name }) => files::recipes(name.as_deref()),
        Some(Command::Study(args)) => in_pool(args.threads, || study::study(&args)),
        Some(Command::Flips(args)) => in_pool(args.threads, || study::flips(&args)),
        None => in_pool(threads, || convert::run(&cli.convert)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            note(format_args!("stb-convert: {e:#}"));
            if e.is::<stb_convert::interrupt::Interrupted>() {
                return ExitCode::from(130);
            }
            ExitCode::from(stb_runtime::exit_code(e.as_ref()))
        }
    }
}

/// Ends with the usage, as for other mistakes on the command line.
fn usage(message: &str) -> ! {
    let kind = clap::error::ErrorKind::MissingRequiredArgument;
    Cli::command().error(kind, message).exit()
}

fn in_pool(
    threads: Option<u16>,
    work: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let granted = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.map_or_else(granted, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(work)
}

/// Whether the error is that nobody reads our output any more.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Writes to standard output.
fn print(text: impl std::fmt::Display) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a line to standard error. If nobody can read it, nothing is lost.
fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
