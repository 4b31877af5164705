//! The interactive conversation.

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use stb_runtime::{Finish, Message};

use super::answer::Answerer;
use super::terminal;

const HELP: &str = "\
/help            this text
/clear           start a new conversation
/system TEXT     new instructions, and a new conversation
/regen           answer the last message again
/exit            leave (also Ctrl-D)
\"\"\"              begins and ends a message of several lines
Ctrl-C           stops an answer; twice at the prompt, leaves";

/// The messages so far, and the system instructions of each new conversation.
struct Conversation {
    instructions: Option<String>,
    messages: Vec<Message>,
}

impl Conversation {
    fn new(instructions: Option<String>) -> Self {
        let mut new = Self { instructions, messages: Vec::new() };
        new.clear();
        new
    }

    fn clear(&mut self) {
        self.messages = self.instructions.iter().map(|t| Message::new("system", t)).collect();
    }
}

/// The action after a line of the user.
enum Action {
    /// Answer the messages.
    Answer,
    /// Show a note and read the next line.
    Note(String),
    /// Leave the chat.
    Leave,
}

pub(super) fn chat(mut answerer: Answerer<'_>, instructions: Option<String>) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new()?;
    let template = answerer.session.has_template();
    let mode = if template {
        "chatting with the model's template"
    } else {
        "no chat template: the model continues your text"
    };
    let source = &answerer.session.engine().model.source;
    let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    terminal::note(format_args!("{name}: {mode}. /help shows the commands."));
    let mut conversation = Conversation::new(instructions);
    while let Some(line) = read_message(&mut editor)? {
        match handle_line(&line, &mut conversation, template) {
            Action::Answer => turn(&mut answerer, &mut conversation.messages)?,
            Action::Note(text) => terminal::note(text),
            Action::Leave => break,
        }
    }
    Ok(())
}

/// Executes a command, or adds a message to the conversation.
fn handle_line(line: &str, conversation: &mut Conversation, template: bool) -> Action {
    let new = || Action::Note("(new conversation)".into());
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    match command {
        "/help" | "/?" => Action::Note(HELP.into()),
        "/clear" => {
            conversation.clear();
            new()
        }
        "/system" => {
            *conversation = Conversation::new(Some(rest.to_owned()).filter(|t| !t.is_empty()));
            new()
        }
        "/exit" | "/bye" | "/quit" => Action::Leave,
        "/regen" => {
            let messages = &mut conversation.messages;
            messages.pop_if(|m| m.role == "assistant");
            match messages.last() {
                Some(last) if last.role == "user" => Action::Answer,
                _ => Action::Note("(there is no message to answer)".into()),
            }
        }
        _ if command.starts_with('/') => {
            Action::Note(format!("(unknown command {command}; /help lists them)"))
        }
        _ => {
            if !template {
                conversation.clear();
            }
            conversation.messages.push(Message::new("user", line));
            Action::Answer
        }
    }
}

/// Answers the messages. An error does not end the conversation.
fn turn(answerer: &mut Answerer<'_>, messages: &mut Vec<Message>) -> anyhow::Result<()> {
    terminal::cancel_token().reset();
    match answerer.answer(messages) {
        Ok(answer) => {
            terminal::print("\n")?;
            match answer.finish {
                Finish::Context => {
                    terminal::note("(the context is full; /clear starts a new conversation)")
                }
                Finish::Interrupted => terminal::note("(stopped)"),
                Finish::Stop | Finish::Length => {}
            }
            answerer.report(&answer);
            messages.push(Message::new("assistant", answer.text.trim_end()));
        }
        Err(e) if terminal::is_broken_pipe(&e) => return Err(e),
        Err(e) => {
            terminal::note(format_args!("stb-run: {e:#}"));
            messages.pop();
        }
    }
    terminal::cancel_token().reset();
    Ok(())
}

/// Reads the next non-empty message; `None` at the end of input.
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

/// Reads the rest of a message in triple quotes; `None` if the user cancels it.
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
