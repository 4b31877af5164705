//! Reads the lines of a chat, with history and completion.

use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};

use super::settings::SamplingArgs;
use super::{commands, folders, saved, terminal};

/// Lines in the file of the history.
const HISTORY_LINES: usize = 1000;
/// Longer messages are not kept in the history.
const HISTORY_BYTES: usize = 16 << 10;

/// What a user has typed.
#[derive(Debug)]
pub(super) enum Input {
    /// A line, which may be a command.
    Line(String),
    /// A message of several lines in triple quotes.
    Block(String),
}

/// A line editor with the history of earlier chats.
pub(super) struct LineEditor {
    editor: Editor<Completion, DefaultHistory>,
    /// The file of the history; `None` without one.
    history: Option<PathBuf>,
}

impl LineEditor {
    /// An editor. With `history`, lines are kept in a file for later chats.
    pub fn open(history: bool) -> anyhow::Result<Self> {
        let config = Config::builder()
            .max_history_size(HISTORY_LINES)?
            .completion_type(CompletionType::List)
            .build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Completion));
        let mut new = Self { editor, history: None };
        if let Some(file) = folders::history().filter(|_| history)
            && let Err(e) = new.use_history(file.clone())
        {
            terminal::note(format_args!("(no history in {}: {e})", file.display()));
        }
        Ok(new)
    }

    fn use_history(&mut self, file: PathBuf) -> rustyline::Result<()> {
        if let Some(folder) = file.parent() {
            folders::make(folder)?;
        }
        match std::fs::metadata(&file) {
            // Opening a pipe would wait for its writer.
            Ok(kind) if !kind.is_file() => {
                return Err(std::io::Error::other("not a regular file").into());
            }
            Ok(_) => self.editor.load_history(&file)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        self.history = Some(file);
        Ok(())
    }

    /// The next input that is not empty; `None` at its end.
    pub fn read(&mut self) -> anyhow::Result<Option<Input>> {
        let mut warned = false;
        loop {
            let line = match self.editor.readline("> ") {
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
            let input = match line.trim().strip_prefix("\"\"\"") {
                Some(first) => self.read_block(first)?.map(Input::Block),
                None => Some(Input::Line(line.trim().to_owned())),
            };
            match input {
                Some(Input::Line(text) | Input::Block(text)) if text.is_empty() => {}
                Some(input) => {
                    self.remember(&input)?;
                    return Ok(Some(input));
                }
                None => {}
            }
        }
    }

    /// Reads the rest of a message in triple quotes; `None` if the user cancels it.
    fn read_block(&mut self, first: &str) -> anyhow::Result<Option<String>> {
        let mut text = first.to_owned();
        loop {
            if let Some(whole) = text.trim_end().strip_suffix("\"\"\"") {
                return Ok(Some(whole.trim().to_owned()));
            }
            match self.editor.readline(". ") {
                Ok(line) => {
                    text.push('\n');
                    text.push_str(&line);
                }
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn remember(&mut self, input: &Input) -> anyhow::Result<()> {
        let (Input::Line(text) | Input::Block(text)) = input;
        if text.len() > HISTORY_BYTES {
            return Ok(());
        }
        self.editor.add_history_entry(text)?;
        if let Some(file) = &self.history
            && let Err(e) = self.editor.append_history(file)
        {
            terminal::note(format_args!("(no history in {}: {e})", file.display()));
            self.history = None;
        }
        Ok(())
    }
}

/// Completes commands, settings and the names of saved chats.
struct Completion;

impl Completer for Completion {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(complete(line.get(..position).unwrap_or_default(), || {
            saved::names().into_iter().map(|(name, _)| name).collect()
        }))
    }
}

impl Hinter for Completion {
    type Hint = String;
}

impl Highlighter for Completion {}
impl Validator for Completion {}
impl Helper for Completion {}

/// Where the completion of `line` begins, and the candidates.
fn complete(line: &str, chats: impl Fn() -> Vec<String>) -> (usize, Vec<String>) {
    let start = line.rfind(' ').map_or(0, |space| space + 1);
    let candidates = match line[..start].trim_end() {
        "" if line.starts_with('/') => commands::names().map(str::to_owned).collect(),
        "/set" => SamplingArgs::names(),
        "/show" => [vec!["model".to_owned()], SamplingArgs::names()].concat(),
        "/load" | "/save" => chats(),
        _ => Vec::new(),
    };
    (start, candidates.into_iter().filter(|name| name.starts_with(&line[start..])).collect())
}

#[cfg(test)]
mod tests {
    use super::complete;

    #[test]
    fn tab_completes_commands_and_their_arguments() {
        let complete = |line| complete(line, || vec!["cats".into(), "dogs".into()]);
        assert_eq!(complete("/sa"), (0, vec!["/save".to_owned()]));
        assert_eq!(complete("/set top").1, ["top-k", "top-p"]);
        assert_eq!(complete("/show mo"), (6, vec!["model".to_owned()]));
        assert_eq!(complete("/load c"), (6, vec!["cats".to_owned()]));
        assert_eq!(complete("Hello /s").1, [""; 0]);
        assert_eq!(complete("").1, [""; 0]);
        assert_eq!(complete("/set temp 0").1, [""; 0]);
    }
}
