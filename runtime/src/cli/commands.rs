//! The commands of a chat, and which lines are commands.

use std::path::Path;

use stb_runtime::nearest;

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChatCommand {
    Help,
    Clear,
    System,
    Regen,
    Save,
    Load,
    Set,
    Show,
    Stats,
    Exit,
}

/// A command as the user types it.
struct CommandEntry {
    /// With its slash. The first is the one that is shown.
    names: &'static [&'static str],
    arguments: &'static str,
    help: &'static str,
    command: ChatCommand,
}

const fn entry(
    names: &'static [&'static str],
    arguments: &'static str,
    command: ChatCommand,
    help: &'static str,
) -> CommandEntry {
    CommandEntry { names, arguments, help, command }
}

const ENTRIES: [CommandEntry; 10] = [
    entry(&["/help", "/?"], "", ChatCommand::Help, "this text"),
    entry(&["/clear", "/new"], "", ChatCommand::Clear, "start a new conversation"),
    entry(
        &["/system"],
        "TEXT",
        ChatCommand::System,
        "new instructions, and a new conversation; without TEXT, none",
    ),
    entry(&["/regen"], "", ChatCommand::Regen, "answer the last message again"),
    entry(
        &["/save"],
        "NAME",
        ChatCommand::Save,
        "save the conversation and its settings; with a slash, NAME is a path",
    ),
    entry(
        &["/load"],
        "NAME",
        ChatCommand::Load,
        "continue a saved conversation; without NAME, list them",
    ),
    entry(&["/set"], "NAME VALUE", ChatCommand::Set, "change a setting, as /set temp 0.5"),
    entry(&["/show"], "NAME", ChatCommand::Show, "show the model and all settings, or one"),
    entry(&["/stats"], "", ChatCommand::Stats, "tokens, speed and memory of the last answer"),
    entry(&["/exit", "/bye", "/quit"], "", ChatCommand::Exit, "leave (also Ctrl-D)"),
];

const MORE_HELP: &str = "\
\"\"\"                begins and ends a message of several lines
Tab                completes commands, settings and names
Ctrl-C             stops an answer; twice at the prompt, leaves";

/// What a line is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TypedLine<'a> {
    /// A command with the text after it.
    Command(ChatCommand, &'a str),
    /// A message to the model.
    Message(&'a str),
    /// A command that does not exist: what to tell the user.
    Mistake(String),
}

/// Tells commands from messages. A line that begins with a path is a message.
pub(super) fn parse(line: &str) -> TypedLine<'_> {
    if !line.starts_with('/') {
        return TypedLine::Message(line);
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let known = ENTRIES.iter().find(|entry| entry.names.contains(&word));
    if let Some(entry) = known {
        return TypedLine::Command(entry.command, rest.trim());
    }
    let is_word = word.len() > 1 && word[1..].chars().all(|c| c.is_ascii_alphabetic());
    if !is_word || Path::new(word).exists() {
        return TypedLine::Message(line);
    }
    let near = nearest(word, names());
    let advice = match near.first() {
        Some(name) => format!("did you mean {name}?"),
        None => "/help lists the commands; a message that begins with / goes between \"\"\"".into(),
    };
    TypedLine::Mistake(format!("(there is no command {word}; {advice})"))
}

/// The names of all commands.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ENTRIES.iter().flat_map(|entry| entry.names).copied()
}

/// The text of `/help`.
pub(super) fn help() -> String {
    let line = |entry: &CommandEntry| {
        let usage = format!("{} {}", entry.names[0], entry.arguments);
        format!("{usage:<18} {}\n", entry.help)
    };
    ENTRIES.iter().map(line).chain([MORE_HELP.to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_messages_and_slips_are_explained() {
        assert_eq!(parse("/set temp 0.5"), TypedLine::Command(ChatCommand::Set, "temp 0.5"));
        assert_eq!(parse("/?"), TypedLine::Command(ChatCommand::Help, ""));
        for message in
            ["/usr/bin/x is missing", "/ is full", "/a.txt", "/x86_64", "Hello /help", "/tmp?"]
        {
            assert_eq!(parse(message), TypedLine::Message(message));
        }
        // A folder that exists is a path, too.
        #[cfg(unix)]
        assert_eq!(parse("/usr is read-only"), TypedLine::Message("/usr is read-only"));
        for (typed, meant) in
            [("/hlep", "/help"), ("/laod x", "/load"), ("/settings", "/set"), ("/stat", "/stats")]
        {
            let TypedLine::Mistake(text) = parse(typed) else { panic!("{typed}") };
            assert!(text.contains(&format!("did you mean {meant}?")), "{text}");
        }
        let TypedLine::Mistake(text) = parse("/frobnicate") else { panic!() };
        assert!(text.contains("/help"), "{text}");
    }

    #[test]
    fn the_help_has_every_command() {
        let help = help();
        for entry in &ENTRIES {
            assert!(help.lines().any(|line| line.starts_with(entry.names[0])), "{help}");
        }
    }
}
