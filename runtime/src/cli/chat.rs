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

/// The messages so far, and the instructions that each new conversation starts with.
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

/// What follows a line of the user.
enum Reply {
    /// Answer the messages.
    Answer,
    /// Show this, and ask for the next line.
    Note(String),
    Leave,
}

pub(super) fn chat(mut answerer: Answerer<'_>, instructions: Option<String>) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new()?;
    let template = answerer.session.has_template();
    let mode = if template {
        "chatting with the model's template"
    } else {
        "no chat template: your text is continued as it is"
    };
    let source = &answerer.session.engine().source;
    let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    terminal::note(format_args!("{name}: {mode}. /help shows the commands."));
    let mut conversation = Conversation::new(instructions);
    while let Some(line) = read_message(&mut editor)? {
        match reply(&line, &mut conversation, template) {
            Reply::Answer => turn(&mut answerer, &mut conversation.messages)?,
            Reply::Note(text) => terminal::note(text),
            Reply::Leave => break,
        }
    }
    Ok(())
}

/// Carries out a command, or adds a message to the conversation.
fn reply(line: &str, conversation: &mut Conversation, template: bool) -> Reply {
    let new = || Reply::Note("(new conversation)".into());
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    match command {
        "/help" | "/?" => Reply::Note(HELP.into()),
        "/clear" => {
            conversation.clear();
            new()
        }
        "/system" => {
            *conversation = Conversation::new(Some(rest.to_owned()).filter(|t| !t.is_empty()));
            new()
        }
        "/exit" | "/bye" | "/quit" => Reply::Leave,
        "/regen" => {
            let messages = &mut conversation.messages;
            messages.pop_if(|m| m.role == "assistant");
            match messages.last() {
                Some(last) if last.role == "user" => Reply::Answer,
                _ => Reply::Note("(there is no message to answer)".into()),
            }
        }
        _ if command.starts_with('/') => {
            Reply::Note(format!("(unknown command {command}; /help lists them)"))
        }
        _ => {
            if !template {
                conversation.clear();
            }
            conversation.messages.push(Message::new("user", line));
            Reply::Answer
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
                Finish::Context => terminal::note("(the context is full; /clear starts anew)"),
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
