//! `stb-run serve`: models over HTTP.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use stb_runtime::Error;
use stb_runtime::scheduler::SchedulerOptions;
use stb_runtime::serve::{ServeOptions, serve};

use super::load::{self, LoadArgs};

#[derive(Args)]
pub(super) struct ServeArgs {
    /// .stb files or checkpoints; with several, the field "model" of a request chooses one by its
    /// alias, else by its file name without the extension
    #[arg(required_unless_present = "models")]
    pub files: Vec<PathBuf>,
    /// The same as FILE, as llama-server has it
    #[arg(short, long = "model", value_name = "FILE")]
    pub models: Vec<PathBuf>,
    /// Name of a model in the API, instead of that of its file; given several times, the names of the
    /// files in their order
    #[arg(short, long, value_name = "NAME")]
    pub alias: Vec<String>,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Address to listen on. Addresses that other machines can reach need a key
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,
    /// Port to listen on; 0 for any free one, which is printed
    #[arg(long, value_name = "PORT", default_value_t = 8080, help_heading = "Server")]
    pub port: u16,
    /// Key that clients have to send; may be given several times. Other users of this machine see
    /// the arguments of a program: --api-key-file hides the key from them
    #[arg(
        long,
        value_name = "KEY",
        env = "STB_API_KEY",
        hide_env_values = true,
        help_heading = "Server"
    )]
    pub api_key: Vec<String>,
    /// File with keys, one per line
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub api_key_file: Option<PathBuf>,
    // Not a documentation comment, where the address would have to be marked as a link.
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    #[arg(
        help = "Origin whose pages may use the server, such as https://example.com, or * for all; may be \
        given several times"
    )]
    pub cors_origin: Vec<String>,
    /// Longest time for an answer in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Server")]
    pub timeout: u64,
    /// Write prompts and answers to the log
    #[arg(long, help_heading = "Server")]
    pub log_prompts: bool,
    /// Answers that are generated at the same time. Also -np N
    #[arg(long, alias = "parallel", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Capacity")]
    pub slots: u16,
    /// Tokens of a prompt with its answer; 0 for the context length of the model
    #[arg(
        short,
        long,
        alias = "ctx-size",
        value_name = "N",
        env = "STB_CTX",
        default_value_t = 0,
        help_heading = "Capacity"
    )]
    pub ctx: usize,
    /// Requests that may wait for a slot; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Capacity")]
    pub max_queue: u16,
    /// Megabytes of keys and values that are kept of prompts, for later prompts with the same start
    #[arg(long, value_name = "MB", default_value_t = 256, value_parser = clap::value_parser!(u32), help_heading = "Capacity")]
    pub prefix_cache: u32,
    /// Do not use the chat templates of the models
    #[arg(long, help_heading = "Capacity")]
    pub no_template: bool,
}

pub(super) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let options = ServeOptions {
        open: load::open_options(&args.load),
        keys: keys(&args)?,
        files: args.files.into_iter().chain(args.models).collect(),
        aliases: args.alias,
        template: !args.no_template,
        host: args.host,
        port: args.port,
        origins: args.cors_origin,
        scheduler: SchedulerOptions {
            slots: usize::from(args.slots),
            context: Some(args.ctx).filter(|n| *n > 0),
            max_queue: usize::from(args.max_queue),
            prefix_cache_bytes: args.prefix_cache as usize * 1_000_000,
        },
        timeout: Duration::from_secs(args.timeout),
        log_prompts: args.log_prompts,
    };
    Ok(serve(options, load::explain)?)
}

/// The keys of the arguments and of the file.
fn keys(args: &ServeArgs) -> Result<Vec<String>, Error> {
    let mut keys = args.api_key.clone();
    if let Some(file) = &args.api_key_file {
        let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let before = keys.len();
        keys.extend(lines.map(str::to_owned));
        if keys.len() == before {
            return Err(Error::usage(format!("{} has no key", file.display())));
        }
    }
    Ok(keys)
}
