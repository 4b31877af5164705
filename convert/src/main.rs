//! `stb-convert`: converts a dense checkpoint to an `.stb` file and inspects such files.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
