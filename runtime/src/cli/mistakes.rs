//! Command lines that cannot be parsed: what the user may have meant.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use stb_runtime::command_mistake;

use super::args::{Cli, long_names};

/// Parses the command line, or exits with an error.
pub(super) fn parse() -> Cli {
    let args: Vec<OsString> = long_names(std::env::args_os()).collect();
    Cli::try_parse_from(&args).unwrap_or_else(|error| {
        let first = args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default();
        match error.get(ContextKind::InvalidSubcommand) {
            // A second argument beside FILE.
            Some(ContextValue::String(word)) => {
                let text = mistake(first, Some(word)).unwrap_or_else(|| {
                    format!(
                        "{word:?} is one argument too many; a prompt is --prompt TEXT, in quotes"
                    )
                });
                Cli::command().error(ErrorKind::ArgumentConflict, text).exit()
            }
            _ => error.exit(),
        }
    })
}

/// Exits with an error if `file` does not exist and is nearly the name of a command.
pub(super) fn refuse_command(file: &Path) {
    if let Some(text) = file.to_str().and_then(|first| mistake(first, None)) {
        Cli::command().error(ErrorKind::InvalidSubcommand, text).exit()
    }
}

fn mistake(first: &str, other: Option<&str>) -> Option<String> {
    let command = Cli::command();
    let commands: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    command_mistake("stb-run", first, other, &commands)
}
