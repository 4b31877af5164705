//! `stb-run MODEL`: answers one prompt or starts a chat.

use std::io::{IsTerminal, Read};
use std::path::Path;

use stb_runtime::Message;

use super::answer::Answerer;
use super::args::RunArgs;
use super::{chat, terminal};

pub(super) fn run(file: &Path, args: &RunArgs) -> anyhow::Result<()> {
    let mut answerer = Answerer::open(file, args)?;
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None if std::io::stdin().is_terminal() => return chat::chat(answerer, args.system.clone()),
        None => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
    };
    let mut messages: Vec<Message> =
        args.system.iter().map(|text| Message::new("system", text)).collect();
    messages.push(Message::new("user", &text));
    let answer = answerer.answer(&messages)?;
    terminal::print("\n")?;
    answerer.report(&answer);
    Ok(())
}
