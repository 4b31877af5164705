//! `stb-run MODEL`: answers one prompt or starts a chat.

use std::io::{IsTerminal, Read};
use std::path::Path;

use stb_runtime::Error;

use super::answer::Answerer;
use super::args::RunArgs;
use super::conversation::Conversation;
use super::{chat, terminal};

pub(super) fn run(file: &Path, args: &RunArgs) -> anyhow::Result<()> {
    if args.interactive || args.prompt.is_none() && std::io::stdin().is_terminal() {
        let answerer = Answerer::open(file, args)?;
        return chat::chat(answerer, args.system.clone(), args.prompt.as_deref());
    }
    let text = prompt(args)?;
    let mut answerer = Answerer::open(file, args)?;
    let mut conversation = Conversation::new(args.system.clone(), answerer.session.has_template());
    conversation.push_question(&text);
    let answer = answerer.answer(&conversation.prompt())?;
    terminal::print("\n")?;
    answerer.report(&answer);
    Ok(())
}

/// The prompt of the arguments, or of the input.
fn prompt(args: &RunArgs) -> anyhow::Result<String> {
    if let Some(text) = &args.prompt {
        return Ok(text.clone());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    if text.trim().is_empty() {
        let what =
            "there is no prompt: the input is empty; give --prompt TEXT, or --interactive to chat";
        return Err(Error::usage(what).into());
    }
    Ok(text)
}
