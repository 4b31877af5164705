//! Chats in files: OpenAI's messages with the settings and the name of the model, as JSON.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Local};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use stb_runtime::{Error, Message, Result};

use super::conversation::Conversation;
use super::folders;
use super::settings::SamplingArgs;

/// The largest file that is read.
const MOST_BYTES: u64 = 64 << 20;
/// The most saved chats that are listed.
const MOST_LISTED: usize = 30;
const VERSION: u32 = 1;

/// A saved chat.
#[derive(Debug)]
pub(super) struct SavedChat {
    /// The file name of the model.
    pub model: String,
    pub conversation: Conversation,
    pub settings: SamplingArgs,
}

/// What a file has. The instructions are a first message with the role `system`.
#[derive(Serialize)]
struct Written<'a> {
    stb_chat: u32,
    model: &'a str,
    saved: String,
    settings: &'a SamplingArgs,
    messages: Vec<Message>,
}

/// What is read of a file, with values that are not checked yet.
#[derive(Deserialize)]
struct Content {
    stb_chat: u32,
    #[serde(default)]
    model: String,
    #[serde(default)]
    settings: serde_json::Map<String, Json>,
    messages: Vec<Message>,
}

/// The file for a name or path that a user has typed. A name without a slash is a file of the folder of chats.
pub(super) fn path(name: &str) -> Result<PathBuf> {
    if let Some(rest) = name.strip_prefix("~/") {
        let home = folders::home().ok_or_else(|| Error::usage("HOME is not set; give a path"))?;
        return Ok(home.join(rest));
    }
    if name.contains(std::path::is_separator) {
        return Ok(name.into());
    }
    if name.is_empty() || name.starts_with('.') || name.chars().any(char::is_control) {
        let text = "a name has no dot at its start; a path has a slash, such as ./chat.json";
        return Err(Error::usage(text));
    }
    let folder = folders::chats()
        .ok_or_else(|| Error::usage("neither XDG_DATA_HOME nor HOME is set; give a path"))?;
    Ok(folder.join(format!("{}.json", name.strip_suffix(".json").unwrap_or(name))))
}

/// Writes a chat. The file is complete, or as it was before.
///
/// # Errors
/// [`Error::Usage`] if the path is something else than a saved chat; [`Error::Io`] if it cannot be written.
pub(super) fn save(path: &Path, chat: &SavedChat) -> Result<()> {
    if path.exists() && read(path).is_err() {
        let text = format!("{} exists and is no saved chat: give another name", path.display());
        return Err(Error::usage(text));
    }
    let fail = |e| Error::io(path, e);
    let parent = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = parent.unwrap_or(Path::new("."));
    if folders::chats().is_some_and(|chats| chats == folder) {
        folders::make(folder).map_err(fail)?;
    }
    let content = Written {
        stb_chat: VERSION,
        model: &chat.model,
        saved: Local::now().to_rfc3339(),
        settings: &chat.settings,
        messages: chat.conversation.with_instructions(),
    };
    let text =
        serde_json::to_vec_pretty(&content).map_err(|e| Error::Internal { what: e.to_string() })?;
    // The error of the temporary file would name a file that nobody has typed.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| fail(e.kind().into()))?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

/// Reads a chat. Values are checked as those of the user are.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Invalid`] if it is no saved chat.
pub(super) fn load(path: &Path, settings: &SamplingArgs) -> Result<SavedChat> {
    let content = read(path)?;
    let invalid = |what: String| Error::invalid(format!("{}: {what}", path.display()));
    let mut settings = settings.clone();
    for (name, value) in &content.settings {
        restore(&mut settings, name, value).map_err(invalid)?;
    }
    let mut conversation = Conversation::default();
    for (i, message) in content.messages.into_iter().enumerate() {
        match message.role.as_str() {
            "system" if i == 0 => conversation.instructions = Some(message.content),
            "user" | "assistant" => conversation.messages.push(message),
            role => return Err(invalid(format!("message {i} has the role {role:?}"))),
        }
    }
    Ok(SavedChat { model: content.model, conversation, settings })
}

fn restore(
    settings: &mut SamplingArgs,
    name: &str,
    value: &Json,
) -> std::result::Result<(), String> {
    match value {
        Json::Null => Ok(()),
        Json::Array(list) => {
            settings.set(name, "")?;
            let mut texts = list.iter().filter_map(Json::as_str).filter(|text| !text.is_empty());
            texts.try_for_each(|text| settings.set(name, text))
        }
        Json::String(text) => settings.set(name, text),
        value => settings.set(name, &value.to_string()),
    }
}

fn read(path: &Path) -> Result<Content> {
    let fail = |e| Error::io(path, e);
    let invalid = |what: String| Error::invalid(format!("{}: {what}", path.display()));
    let kind = std::fs::metadata(path).map_err(fail)?;
    // Opening a pipe would wait for its writer.
    if !kind.is_file() {
        return Err(invalid("not a regular file".into()));
    }
    let mut text = Vec::new();
    File::open(path).map_err(fail)?.take(MOST_BYTES + 1).read_to_end(&mut text).map_err(fail)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(invalid("too large for a saved chat".into()));
    }
    let content: Content = serde_json::from_slice(&text)
        .map_err(|e| invalid(format!("this is no saved chat ({e})")))?;
    if content.stb_chat != VERSION {
        return Err(invalid(format!(
            "a chat of version {}; this program reads {VERSION}",
            content.stb_chat
        )));
    }
    Ok(content)
}

/// The names in the folder of chats with the times of their files, newest first.
pub(super) fn names() -> Vec<(String, DateTime<Local>)> {
    let Some(entries) = folders::chats().and_then(|folder| std::fs::read_dir(folder).ok()) else {
        return Vec::new();
    };
    let named = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?.strip_suffix(".json")?.to_owned();
        let metadata = entry.metadata().ok().filter(|m| m.is_file() && !name.starts_with('.'))?;
        Some((name, DateTime::from(metadata.modified().ok()?)))
    };
    let mut names: Vec<_> = entries.filter_map(|entry| named(entry.ok()?)).collect();
    names.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    names
}

/// The text of `/load` without a name.
pub(super) fn list() -> String {
    let names = names();
    if names.is_empty() {
        return "(there are no saved chats; /save NAME saves this one)".into();
    }
    let line = |(name, date): &(String, DateTime<Local>)| {
        format!("{}  {name}", date.format("%Y-%m-%d %H:%M"))
    };
    let mut lines: Vec<_> = names.iter().take(MOST_LISTED).map(line).collect();
    if names.len() > MOST_LISTED {
        lines.push(format!("and {} older ones", names.len() - MOST_LISTED));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use stb_runtime::SamplerOptions;

    fn chat() -> SavedChat {
        let mut conversation = Conversation::new(Some("Be brief.".into()), false);
        conversation.push_question("Hello \u{1b}[2J \"quoted\"\nand more");
        conversation.push_answer(" Hi");
        let mut settings = SamplingArgs::default().with_defaults(&SamplerOptions::default());
        for (name, value) in [("temp", "0.3"), ("stop", "END"), ("seed", "18446744073709551615")] {
            settings.set(name, value).unwrap();
        }
        SavedChat { model: "quill.stb".into(), conversation, settings }
    }

    #[test]
    fn chats_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let chat = chat();
        save(&path, &chat).unwrap();
        // A second time: the file is replaced.
        save(&path, &chat).unwrap();
        let other = SamplingArgs::default().with_defaults(&SamplerOptions::default());
        let loaded = load(&path, &other).unwrap();
        assert_eq!((&loaded.model, &loaded.settings), (&chat.model, &chat.settings));
        assert_eq!(loaded.conversation, chat.conversation);
        let text = std::fs::read_to_string(&path).unwrap();
        let json: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(json["messages"][0]["role"], "system");
        assert_eq!(json["messages"][2]["content"], " Hi");
        assert!(text.contains("\"temp\": 0.3,"), "{text}");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn hostile_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let settings = SamplingArgs::default();
        let deep = format!("{{\"stb_chat\": 1, \"messages\": {}", "[".repeat(100_000));
        for (text, word) in [
            ("", "no saved chat"),
            ("\0\u{7f}ELF", "no saved chat"),
            (&deep, "no saved chat"),
            ("[]", "no saved chat"),
            (r#"{"messages": []}"#, "stb_chat"),
            (r#"{"stb_chat": 2, "messages": []}"#, "version 2"),
            (r#"{"stb_chat": 1}"#, "messages"),
            (r#"{"stb_chat": 1, "messages": [{"role": "user"}]}"#, "content"),
            (r#"{"stb_chat": 1, "messages": [{"role": "user", "content": ["x"]}]}"#, "no saved"),
            (r#"{"stb_chat": 1, "messages": [{"role": "tool", "content": "x"}]}"#, "\"tool\""),
            (
                r#"{"stb_chat": 1, "messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}"#,
                "\"system\"",
            ),
            (r#"{"stb_chat": 1, "settings": {"temp": -1}, "messages": []}"#, "temp"),
            (r#"{"stb_chat": 1, "settings": {"temp": {}}, "messages": []}"#, "temp"),
            (r#"{"stb_chat": 1, "settings": {"tmp": 1}, "messages": []}"#, "no setting"),
            (r#"{"stb_chat": 1, "settings": {"top_p": 1e999}, "messages": []}"#, "no saved chat"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = load(&path, &settings).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("a.json"), "{text:.80}: {error}");
        }
        std::fs::write(&path, [0xff, 0xfe, b'{']).unwrap();
        assert!(load(&path, &settings).is_err());
        assert!(load(folder.path(), &settings).unwrap_err().to_string().contains("regular file"));
        assert!(load(&folder.path().join("b"), &settings).is_err());
        // What is no chat is not replaced.
        std::fs::write(&path, "my notes").unwrap();
        assert!(save(&path, &chat()).unwrap_err().to_string().contains("no saved chat"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "my notes");
        assert!(save(&folder.path().join("no/folder/a.json"), &chat()).is_err());
    }

    #[test]
    fn names_are_files_of_one_folder() {
        for name in ["", ".", "..", ".hidden", "a\nb"] {
            assert!(path(name).is_err(), "{name:?}");
        }
        assert_eq!(path("./a").unwrap(), Path::new("./a"));
        assert_eq!(path("/x/y.json").unwrap(), Path::new("/x/y.json"));
        if let Some(folder) = folders::chats() {
            assert_eq!(path("a b").unwrap(), folder.join("a b.json"));
            assert_eq!(path("a.json").unwrap(), folder.join("a.json"));
        }
    }
}
