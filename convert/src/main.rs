//! `stb-convert`: from a dense checkpoint to an `.stb` file, and looking into such files.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
