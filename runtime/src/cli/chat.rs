//! The interactive conversation.

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use stb_runtime::{Finish, GenerateOptions, Message, Sampler};

use super::run::{Session, report};
use super::{RunArgs, terminal};

const HELP: &str = "\
/help            this text
/clear           start a new conversation
/system TEXT     new instructions, and a new conversation
/regen           answer the last message again
/exit            leave (also Ctrl-D)
\"\"\"              begins and ends a message of several lines
Ctrl-C           stops an answer; twice at the prompt, leaves";

pub(super) fn chat(
    mut session: Session,
    args: &RunArgs,
    mut sampler: Sampler,
    options: GenerateOptions,
) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new()?;
    let mode = if session.template.is_some() {
        "chatting with the model's template"
    } else {
        "no chat template: your text is continued as it is"
    };
    let name = session.model.source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    terminal::note(format_args!("{name}: {mode}. /help shows the commands."));
    let system =
        |text: &Option<String>| text.iter().map(|t| Message::new("system", t)).collect::<Vec<_>>();
    let mut instructions = args.system.clone();
    let mut messages = system(&instructions);
    while let Some(line) = read_message(&mut editor)? {
        let (command, rest) = line.split_once(' ').unwrap_or((line.as_str(), ""));
        match command {
            "/help" | "/?" => {
                terminal::note(HELP);
                continue;
            }
            "/clear" => {
                messages = system(&instructions);
                terminal::note("(new conversation)");
                continue;
            }
            "/system" => {
                instructions = Some(rest.to_owned()).filter(|t| !t.is_empty());
                messages = system(&instructions);
                terminal::note("(new conversation)");
                continue;
            }
            "/exit" | "/bye" | "/quit" => break,
            "/regen" => {
                if messages.last().is_some_and(|m| m.role == "assistant") {
                    messages.pop();
                }
                if messages.last().is_none_or(|m| m.role != "user") {
                    terminal::note("(there is no message to answer)");
                    continue;
                }
            }
            _ if command.starts_with('/') => {
                terminal::note(format_args!("(unknown command {command}; /help lists them)"));
                continue;
            }
            _ => {
                if session.template.is_none() {
                    messages = system(&instructions);
                }
                messages.push(Message::new("user", &line));
            }
        }
        turn(&mut session, args, &mut sampler, &options, &mut messages)?;
    }
    Ok(())
}

/// One answer; an error of this turn does not end the conversation.
fn turn(
    session: &mut Session,
    args: &RunArgs,
    sampler: &mut Sampler,
    options: &GenerateOptions,
    messages: &mut Vec<Message>,
) -> anyhow::Result<()> {
    terminal::clear_interrupt();
    let result = session
        .chat_prompt(messages)
        .map_err(anyhow::Error::from)
        .and_then(|prompt| session.answer(&prompt, sampler, options));
    match result {
        Ok(answer) => {
            terminal::print("\n")?;
            match answer.finish {
                Finish::Context => terminal::note("(the context is full; /clear starts anew)"),
                Finish::Interrupted => terminal::note("(stopped)"),
                Finish::Stop | Finish::Length => {}
            }
            report(args, session, &answer);
            messages.push(Message::new("assistant", answer.text.trim_end()));
        }
        Err(e) if terminal::is_broken_pipe(&e) => return Err(e),
        Err(e) => {
            terminal::note(format_args!("stb-run: {e:#}"));
            messages.pop();
        }
    }
    terminal::clear_interrupt();
    Ok(())
}

/// The next message that is not empty; `None` at the end of input.
fn read_message(editor: &mut DefaultEditor) -> anyhow::Result<Option<String>> {
    let mut warned = false;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) if warned => return Ok(None),
            Err(ReadlineError::Interrupted) => {
                terminal::note("(Ctrl-C again or Ctrl-D leaves)");
                warned = true;
                continue;
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let message = match line.trim().strip_prefix("\"\"\"") {
            Some(first) => match read_block(editor, first)? {
                Some(message) => message,
                None => continue,
            },
            None => line.trim().to_owned(),
        };
        if !message.is_empty() {
            editor.add_history_entry(&message)?;
            return Ok(Some(message));
        }
    }
}

/// The rest of a message in triple quotes; `None` if it is abandoned.
fn read_block(editor: &mut DefaultEditor, first: &str) -> anyhow::Result<Option<String>> {
    let mut text = first.to_owned();
    loop {
        if let Some(whole) = text.trim_end().strip_suffix("\"\"\"") {
            return Ok(Some(whole.trim().to_owned()));
        }
        match editor.readline(". ") {
            Ok(line) => {
                text.push('\n');
                text.push_str(&line);
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}
