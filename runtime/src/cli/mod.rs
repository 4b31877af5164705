//! The command line of `stb-run`.

mod bench;
mod chat;
mod devices;
mod evaluate;
mod run;
mod terminal;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use stb_runtime::{
    DeviceChoice, Engine, Error, KvKind, OpenOptions, Task, Verify, default_threads,
    open_to_measure,
};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 file cannot be \
    read, 4 file invalid, 5 not supported, 130 interrupted.\n\
    STB_ISA=scalar|avx2|avx512|avx512vbmi|avx512amx|neon|neon-dotprod forces an instruction set.";

/// Runs .stb models: language models below one bit per weight, straight from one mapped file.
#[derive(Parser)]
#[command(name = "stb-run", version = version(), after_help = EXIT_CODES)]
#[command(args_conflicts_with_subcommands = true, allow_negative_numbers = true)]
#[command(override_usage = "stb-run [OPTIONS] <FILE>\n       stb-run <COMMAND>")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print the devices of this machine
    #[arg(long)]
    list_devices: bool,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Measure the perplexity of a model on a text, and its distance to another model
    Perplexity(PerplexityArgs),
    /// Measure the accuracy of a model on multiple-choice tasks
    ZeroShot(ZeroShotArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How a model is loaded.
#[derive(Args, Clone)]
struct LoadArgs {
    /// Threads; default: one per physical core that this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Read the file into memory instead of mapping it
    #[arg(long, env = "STB_NO_MMAP")]
    no_mmap: bool,
    /// Lock the mapped file in memory, so that it is never paged out
    #[arg(long, env = "STB_MLOCK", conflicts_with = "no_mmap")]
    mlock: bool,
    /// What to check before use: tensor checksums of files up to 1 GiB, everything, or structure
    /// and metadata only
    #[arg(long, value_name = "WHAT", env = "STB_VERIFY", default_value = "auto")]
    verify: VerifyArg,
    /// Do not round activations to 8 bits; slower
    #[arg(long, env = "STB_EXACT")]
    exact: bool,
    /// How keys and values of earlier tokens are kept [default: f16; f32 with --exact]
    #[arg(long, value_name = "TYPE", env = "STB_KV")]
    kv: Option<KvArg>,
    /// Where to compute: cpu, cuda, cuda:N, or auto for a CUDA device if there is one [default: cpu,
    /// until the kernels have been proven on devices]
    #[arg(long, value_name = "DEVICE", env = "STB_DEVICE")]
    device: Option<DeviceChoice>,
    /// Decoder layers that the device computes, the last ones; the CPU computes the rest. Also -ngl N.
    /// Without --device it means --device auto [default: all]
    #[arg(long, value_name = "N", env = "STB_NGL")]
    gpu_layers: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvArg {
    F32,
    F16,
    Q8,
}

#[derive(Clone, Copy, ValueEnum)]
enum VerifyArg {
    Auto,
    Full,
    Off,
}

#[derive(Args)]
struct RunArgs {
    /// An .stb file; or a dense checkpoint: a folder, a .safetensors file, an index of shards
    file: Option<PathBuf>,
    #[command(flatten)]
    load: LoadArgs,
    /// Text to send; without it, from a pipe or an interactive chat
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt")]
    prompt: Option<String>,
    /// Instructions before the conversation
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    system: Option<String>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long, help_heading = "Prompt")]
    no_template: bool,
    /// Tokens of context; 0 for all the model has
    #[arg(
        short,
        long,
        value_name = "N",
        env = "STB_CTX",
        default_value_t = 0,
        help_heading = "Prompt"
    )]
    ctx: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print timings as one line of JSON on standard error
    #[arg(long, help_heading = "Output")]
    json_stats: bool,
    /// Print no timings
    #[arg(short, long, help_heading = "Output")]
    quiet: bool,
}

/// How tokens are chosen. Flags win over what the model file suggests.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// The most tokens to generate; default: until the model ends or the context is full
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    tokens: Option<usize>,
    /// Temperature; 0 always takes the most likely token [default: 0.8]
    #[arg(long, value_name = "T", value_parser = non_negative)]
    temp: Option<f32>,
    /// Keep the K most likely tokens; 0 keeps all [default: 40]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most likely tokens that together have this probability [default: 0.95]
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f32>,
    /// Keep tokens with this share of the best one's probability [default: 0.05]
    #[arg(long, value_name = "P", value_parser = share)]
    min_p: Option<f32>,
    /// Make the last 64 tokens less likely; 1 is off [default: 1]
    #[arg(long, value_name = "X", value_parser = positive)]
    repeat_penalty: Option<f32>,
    /// Seed of the random choices; default: a new one each time
    #[arg(long, value_name = "N", env = "STB_SEED")]
    seed: Option<u64>,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Never choose the end token: go on to -n or the end of the context
    #[arg(long)]
    ignore_eos: bool,
}

#[derive(Args)]
struct PerplexityArgs {
    /// An .stb file; or a dense checkpoint: a folder, a .safetensors file, an index of shards
    file: PathBuf,
    #[command(flatten)]
    load: LoadArgs,
    /// The text, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// A model to compare with, usually the dense checkpoint: KL divergence from it, share of
    /// tokens with the same best prediction
    #[arg(long, value_name = "PATH")]
    reference: Option<PathBuf>,
    /// Tokens per window; default: the context of the model
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// The most windows to use; default: all
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Split the text at this string into documents; each is stripped and gets a begin token
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,
    /// The lines are rows of a data set, to be joined by two newlines: for wiki.test.raw
    #[arg(long, conflicts_with = "separator")]
    rows: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ZeroShotArgs {
    /// An .stb file; or a dense checkpoint: a folder, a .safetensors file, an index of shards
    file: PathBuf,
    /// Files of questions, one JSON object per line, whose names start with the task's:
    /// winogrande, openbookqa, hellaswag, boolq, arc_easy, arc_challenge, rte or piqa
    tasks: Vec<PathBuf>,
    #[command(flatten)]
    load: LoadArgs,
    /// A file of questions for this task, whatever its name; may be given several times
    #[arg(long = "task", value_name = "NAME=FILE", value_parser = evaluate::named_task)]
    named: Vec<(Task, PathBuf)>,
    /// Only the first N questions of each file
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// The most tokens that the model sees; default: its context
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Do not put the begin token before questions even if the tokenizer does so, as old versions of
    /// the harness
    #[arg(long)]
    no_begin_token: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The most tokens that a benchmark takes: a million are more than any context.
const MOST_TOKENS: i64 = 1 << 20;

#[derive(Args)]
struct BenchArgs {
    /// An .stb file; or a dense checkpoint: a folder, a .safetensors file, an index of shards
    file: PathBuf,
    #[command(flatten)]
    load: LoadArgs,
    /// Prompt tokens
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    prompt: u32,
    /// Tokens to generate after a context of --depth tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    tokens: u32,
    /// Tokens in the cache before generation is measured
    #[arg(short, long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=MOST_TOKENS))]
    depth: u32,
    /// Sequences that generate side by side
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// Runs; one more before them is not counted
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
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

fn number(text: &str, valid: impl Fn(f32) -> bool, what: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("{text} is not a number"))?;
    if valid(value) { Ok(value) } else { Err(format!("{text} is not {what}")) }
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |v| v >= 0.0 && v.is_finite(), "a finite number from 0")
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, |v| v > 0.0 && v.is_finite(), "a finite number above 0")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |v| (0.0..=1.0).contains(&v), "between 0 and 1")
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse_from(long_names(std::env::args_os()));
    terminal::catch_interrupts();
    let result = match cli.command {
        Some(Command::Completions { shell }) => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, "stb-run", &mut std::io::stdout());
            Ok(())
        }
        Some(Command::Perplexity(args)) => {
            in_pool(args.load.threads, || evaluate::perplexity(&args))
        }
        Some(Command::ZeroShot(args)) => in_pool(args.load.threads, || evaluate::zero_shot(&args)),
        Some(Command::Bench(args)) => bench::bench(&args),
        None if cli.list_devices => devices::list(),
        None => match &cli.run.file {
            Some(file) => run::run(file, &cli.run),
            None => {
                let kind = clap::error::ErrorKind::MissingRequiredArgument;
                Cli::command().error(kind, "give a model file").exit()
            }
        },
    };
    match result {
        Ok(()) if terminal::interrupted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has left: nothing to tell anybody.
        Err(e) if terminal::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::note(format_args!("stb-run: {e:#}"));
            ExitCode::from(stb_runtime::exit_code(&e))
        }
    }
}

/// `-ngl`, as llama.cpp calls it, is no short name that clap knows.
fn long_names(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.map(|arg| if arg == "-ngl" { "--gpu-layers".into() } else { arg })
}

/// Runs `work` on a pool of that many threads: evaluation computes whole windows side by side.
fn in_pool(
    threads: Option<u16>,
    work: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let threads = threads.map_or_else(default_threads, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(work)
}

/// Opens the model to measure what the file holds.
fn open_exact(file: &Path, args: &LoadArgs) -> Result<Engine, Error> {
    if matches!(args.kv, Some(KvArg::F16 | KvArg::Q8)) {
        let text =
            "evaluation is exact: keys and values are kept in f32, so leave out --kv (STB_KV)";
        return Err(Error::usage(text));
    }
    let threads = args.threads.map_or_else(default_threads, usize::from);
    let options = OpenOptions { threads: Some(threads), ..open_options(args) };
    let model = open_to_measure(file, &options)?;
    devices::explain(&model);
    Ok(model)
}

/// Opens the model and says how long it took.
fn open(file: &Path, args: &LoadArgs) -> Result<(Engine, Duration), Error> {
    let started = Instant::now();
    let model = Engine::open(file, &open_options(args))?;
    devices::explain(&model);
    Ok((model, started.elapsed()))
}

fn open_options(args: &LoadArgs) -> OpenOptions {
    let verify = match args.verify {
        VerifyArg::Auto => Verify::Auto,
        VerifyArg::Full => Verify::Full,
        VerifyArg::Off => Verify::Off,
    };
    let kv = match args.kv {
        Some(KvArg::F32) => KvKind::F32,
        Some(KvArg::F16) => KvKind::F16,
        Some(KvArg::Q8) => KvKind::Q8,
        None if args.exact => KvKind::F32,
        None => KvKind::F16,
    };
    OpenOptions {
        map: !args.no_mmap,
        verify,
        exact: args.exact,
        kv,
        threads: args.threads.map(usize::from),
        lock: args.mlock,
        // Whoever gives layers to a device wants one.
        device: args.device.unwrap_or(match args.gpu_layers {
            Some(_) => DeviceChoice::Auto,
            None => DeviceChoice::Cpu,
        }),
        device_layers: args.gpu_layers,
    }
}
