//! The command line of `stb-run`.

mod answer;
mod args;
mod bench;
mod chat;
mod commands;
mod conversation;
mod describe;
mod devices;
mod editor;
mod evaluate;
mod folders;
mod load;
mod mistakes;
mod run;
mod saved;
#[cfg(feature = "serve")]
mod serve;
mod settings;
mod terminal;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::CommandFactory;
use load::in_pool;

pub(crate) fn main() -> ExitCode {
    stb_runtime::explain_sigbus();
    let cli = mistakes::parse();
    if !cli.catches_signals() {
        terminal::catch_interrupts();
    }
    let result = match cli.command {
        Some(Command::Completions { shell }) => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, "stb-run", &mut std::io::stdout());
            Ok(())
        }
        Some(Command::Man { folder }) => {
            // Without the instruction sets of this machine, which `--version` lists.
            let command = Cli::command().version(env!("CARGO_PKG_VERSION"));
            let done = clap_mangen::generate_to(command, &folder);
            done.map_err(|e| stb_runtime::Error::io(&folder, e).into())
        }
        Some(Command::Perplexity(args)) => {
            in_pool(args.load.threads, || evaluate::perplexity(&args))
        }
        Some(Command::ZeroShot(args)) => in_pool(args.load.threads, || evaluate::zero_shot(&args)),
        Some(Command::Bench(args)) => bench::bench(&args),
        #[cfg(feature = "serve")]
        Some(Command::Serve(args)) => serve::run(args),
        None if cli.list_devices => devices::list(),
        None => match cli.run.file.as_ref().or(cli.run.model.as_ref()) {
            Some(file) => {
                mistakes::refuse_command(file);
                run::run(file, &cli.run)
            }
            None => {
                let kind = clap::error::ErrorKind::MissingRequiredArgument;
                Cli::command().error(kind, "give a model file").exit()
            }
        },
    };
    match result {
        Ok(()) if terminal::interrupted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe, which is not an error.
        Err(e) if terminal::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::note(format_args!("stb-run: {e:#}"));
            ExitCode::from(stb_runtime::exit_code(e.as_ref()))
        }
    }
}
