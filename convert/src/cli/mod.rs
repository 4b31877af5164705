//! The command line of `stb-convert`.

mod args;
mod convert;
mod files;
mod mistakes;
mod output;
mod progress;
mod study;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::CommandFactory;
use output::{is_broken_pipe, note};
use stb_convert::system::default_threads;

pub(crate) fn main() -> ExitCode {
    stb_runtime::explain_sigbus();
    let cli = mistakes::parse();
    // The first Ctrl-C stops at the next check, the second exits at once. Neither leaves an unfinished file.
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
        Some(Command::Verify { file, json }) => files::verify(&file, json),
        Some(Command::Export { file, folder, dtype }) => files::export(&file, &folder, dtype),
        Some(Command::Card(args)) => files::card(args),
        Some(Command::Man { folder }) => files::man(&folder),
        Some(Command::Recipes { name }) => files::recipes(name.as_deref()),
        Some(Command::Study(args)) => in_pool(args.threads, || study::study(&args)),
        Some(Command::Flips(args)) => in_pool(args.threads, || study::flips(&args)),
        None => {
            mistakes::refuse_command(&cli.convert);
            in_pool(threads, || convert::run(&cli.convert))
        }
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

/// Runs `f` in a thread pool of `threads` threads; `None` for all that this process may use.
fn in_pool(
    threads: Option<u16>,
    f: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let threads = threads.map_or_else(default_threads, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(f)
}
