//! Command lines that cannot be parsed, or that mean something else: what the user may have meant.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use stb_runtime::command_mistake;

use super::args::{Cli, ConvertArgs};

/// Parses the command line, or exits with an error.
pub(super) fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        let first = std::env::args_os().nth(1).unwrap_or_default();
        match error.get(ContextKind::InvalidSubcommand) {
            // A third argument beside SRC and OUT.
            Some(ContextValue::String(word)) => {
                let text = mistake(&first.to_string_lossy(), Some(word)).unwrap_or_else(|| {
                    format!("{word:?} is one argument too many: a conversion has a source and a file to write")
                });
                Cli::command().error(ErrorKind::ArgumentConflict, text).exit()
            }
            _ => error.exit(),
        }
    })
}

/// Exits with an error if the source is nearly the name of a command and no file, or the output is one.
pub(super) fn refuse_command(args: &ConvertArgs) {
    let Some(src) = args.src.as_deref().and_then(|src| src.to_str()) else { return };
    let out = args.out.as_deref().filter(|out| !out.exists()).and_then(|out| out.to_str());
    if let Some(text) = mistake(src, out) {
        Cli::command().error(ErrorKind::InvalidSubcommand, text).exit()
    }
}

fn mistake(first: &str, other: Option<&str>) -> Option<String> {
    let command = Cli::command();
    let commands: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    command_mistake("stb-convert", first, other, &commands)
}
