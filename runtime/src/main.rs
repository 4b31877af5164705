//! `stb-run`: runs an `.stb` model and measures its quality and speed.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
