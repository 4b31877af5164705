//! `stb-run`: chats with an `.stb` model, measures its perplexity and its speed.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
