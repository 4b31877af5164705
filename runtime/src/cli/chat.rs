//! The interactive conversation.

use std::io::IsTerminal;

use stb_runtime::Finish;

use super::answer::Answerer;
use super::commands::{self, ChatCommand, TypedLine};
use super::conversation::Conversation;
use super::editor::{Input, LineEditor};
use super::saved::{self, SavedChat};
use super::{describe, terminal};

/// A chat with a model.
struct Chat<'a> {
    answerer: Answerer<'a>,
    conversation: Conversation,
}

/// What happens after a command.
enum After {
    /// The last message is answered.
    Answer,
    /// The text is shown.
    Note(String),
    Leave,
}

/// Chats until the user leaves. `first` is answered before the first line is read.
pub(super) fn chat(
    answerer: Answerer<'_>,
    instructions: Option<String>,
    first: Option<&str>,
) -> anyhow::Result<()> {
    // Lines from a pipe are no history of a user.
    let history = answerer.keeps_history() && std::io::stdin().is_terminal();
    let mut editor = LineEditor::open(history)?;
    let template = answerer.session.has_template();
    let mode = if template {
        "chatting with the model's template"
    } else {
        "no chat template: the conversation is one text, which the model continues"
    };
    terminal::note(format_args!("{}: {mode}. /help shows the commands.", answerer.name()));
    let conversation = Conversation::new(instructions, template);
    let mut chat = Chat { answerer, conversation };
    if let Some(text) = first {
        chat.ask(text)?;
    }
    while let Some(input) = editor.read()? {
        let after = match &input {
            Input::Block(text) => {
                chat.ask(text)?;
                continue;
            }
            Input::Line(line) => match commands::parse(line) {
                TypedLine::Message(text) => {
                    chat.ask(text)?;
                    continue;
                }
                TypedLine::Mistake(note) => After::Note(note),
                TypedLine::Command(command, rest) => chat.execute(command, rest),
            },
        };
        match after {
            After::Answer => chat.answer(chat.conversation.clone())?,
            After::Note(text) => terminal::note(text),
            After::Leave => break,
        }
    }
    Ok(())
}

impl Chat<'_> {
    /// Executes a command; `rest` is the text after it.
    fn execute(&mut self, command: ChatCommand, rest: &str) -> After {
        let outcome = match command {
            ChatCommand::Help => Ok(commands::help()),
            ChatCommand::Clear => Ok(self.restart(self.conversation.instructions.clone())),
            ChatCommand::System => {
                Ok(self.restart(Some(rest.to_owned()).filter(|t| !t.is_empty())))
            }
            ChatCommand::Save => self.save(rest),
            ChatCommand::Load if rest.is_empty() => Ok(saved::list()),
            ChatCommand::Load => self.load(rest),
            ChatCommand::Set => self.set(rest),
            ChatCommand::Show => self.show(rest),
            ChatCommand::Stats => Ok(self.answerer.statistics()),
            ChatCommand::Exit => return After::Leave,
            ChatCommand::Regen => match self.conversation.has_question() {
                true => return After::Answer,
                false => Ok("(there is no message to answer)".into()),
            },
        };
        After::Note(outcome.unwrap_or_else(|problem| format!("({problem})")))
    }

    fn restart(&mut self, instructions: Option<String>) -> String {
        self.conversation = Conversation::new(instructions, self.conversation.template);
        "(new conversation)".into()
    }

    fn save(&self, name: &str) -> Result<String, String> {
        if name.is_empty() {
            return Err("/save needs a name, or a path with a slash".into());
        }
        let chat = SavedChat {
            model: self.answerer.name(),
            conversation: self.conversation.clone(),
            settings: self.answerer.settings.clone(),
        };
        let path = saved::path(name).map_err(|e| e.to_string())?;
        saved::save(&path, &chat).map_err(|e| e.to_string())?;
        Ok(format!("(saved as {})", path.display()))
    }

    fn load(&mut self, name: &str) -> Result<String, String> {
        let path = saved::path(name).map_err(|e| e.to_string())?;
        let chat = saved::load(&path, &self.answerer.settings).map_err(|e| e.to_string())?;
        let template = self.conversation.template;
        self.conversation = Conversation { template, ..chat.conversation };
        self.answerer.change_settings(chat.settings);
        let count = self.conversation.messages.len();
        let other = match chat.model == self.answerer.name() {
            true => String::new(),
            false => format!("; it was saved with {}", chat.model),
        };
        Ok(format!("(loaded {count} messages and the settings of {}{other})", path.display()))
    }

    fn set(&mut self, rest: &str) -> Result<String, String> {
        let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let value = value.trim();
        let mut settings = self.answerer.settings.clone();
        if name.is_empty() {
            return Err("/set needs a name and a value; /show lists the settings".into());
        }
        settings.set(name, value)?;
        let changed = settings.get(name)?;
        self.answerer.change_settings(settings);
        Ok(format!("({} is {})", changed.name, changed.value))
    }

    fn show(&self, name: &str) -> Result<String, String> {
        let settings = &self.answerer.settings;
        match name {
            "" => {
                let model = describe::model(&self.answerer, &self.conversation);
                let list: String = settings.list().iter().map(describe::setting).collect();
                Ok(format!("{model}\n{}", list.trim_end()))
            }
            "model" => Ok(describe::model(&self.answerer, &self.conversation)),
            name => Ok(describe::setting(&settings.get(name)?).trim_end().to_owned()),
        }
    }

    /// Adds a message and answers it.
    fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        let mut next = self.conversation.clone();
        next.push_question(text);
        self.answer(next)
    }

    /// Answers the last question of `next`, which becomes the conversation unless there is an error.
    fn answer(&mut self, mut next: Conversation) -> anyhow::Result<()> {
        terminal::cancel_token().reset();
        next.reopen();
        let outcome =
            self.answerer.fit(&mut next).map_err(anyhow::Error::from).and_then(|dropped| {
                if dropped > 0 {
                    terminal::note(format_args!(
                        "(the context of {} tokens is full: dropped the oldest {})",
                        self.answerer.session.context(),
                        if dropped == 1 { "turn".to_owned() } else { format!("{dropped} turns") }
                    ));
                }
                self.answerer.answer(&next.prompt())
            });
        match outcome {
            Ok(answer) => {
                terminal::print("\n")?;
                match answer.finish {
                    Finish::Context => terminal::note(
                        "(the context is full, which ends the answer; the next message drops the oldest turns)",
                    ),
                    Finish::Interrupted => terminal::note("(stopped)"),
                    Finish::Stop | Finish::Length => {}
                }
                self.answerer.report(&answer);
                next.push_answer(&answer.text);
                self.conversation = next;
            }
            Err(e) if terminal::is_broken_pipe(&e) => return Err(e),
            Err(e) => terminal::note(format_args!("stb-run: {e:#}")),
        }
        terminal::cancel_token().reset();
        Ok(())
    }
}
