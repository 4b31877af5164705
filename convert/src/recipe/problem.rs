//! Errors in recipes, with their line.

use stb_runtime::Error;
use toml::de::{DeTable, DeValue};

use super::file::RENAMED;

/// A value that is not allowed.
#[derive(Debug)]
pub(super) struct Problem {
    /// `body`, `calibration`, `embeddings` or `head`.
    section: &'static str,
    /// The option; empty for the section as a whole.
    option: &'static str,
    /// The message: the mistake and the allowed values.
    what: String,
}

/// The result of resolving a part of a recipe.
pub(super) type Resolved<T> = Result<T, Problem>;

impl Problem {
    pub(super) fn new(
        section: &'static str,
        option: &'static str,
        what: impl Into<String>,
    ) -> Self {
        Self { section, option, what: what.into() }
    }

    /// The error for the user. `text` is the TOML of the recipe; `None` if the user has not written it.
    pub(super) fn error(self, text: Option<&str>) -> Error {
        match text.and_then(|text| self.line(text)) {
            Some(line) => Error::invalid(format!("recipe, line {line}: {}", self.what)),
            None => Error::invalid(format!("recipe: {}", self.what)),
        }
    }

    /// The line of the option, or of its section if the option is absent; counted from 1.
    fn line(&self, text: &str) -> Option<usize> {
        let document = DeTable::parse(text).ok()?;
        let named = |name: &str| {
            let current = |name: &str| name == self.option;
            let renamed =
                RENAMED.iter().find(|(section, old, _)| *section == self.section && *old == name);
            current(name) || renamed.is_some_and(|(.., new)| current(new))
        };
        let (section, options) =
            document.get_ref().iter().find(|(name, _)| name.get_ref() == self.section)?;
        let options = match options.get_ref() {
            DeValue::Table(options) => options,
            _ => return None,
        };
        let option = options.iter().find(|(name, _)| named(name.get_ref()));
        let start = option.map_or(section, |(name, _)| name).span().start;
        Some(text[..start].matches('\n').count() + 1)
    }
}

/// The value of `word` in `words`; the first value if there is no word.
pub(super) fn keyword<T: Copy>(
    section: &'static str,
    option: &'static str,
    word: &Option<String>,
    words: &[(&str, T)],
) -> Resolved<T> {
    let Some(word) = word else { return Ok(words[0].1) };
    words.iter().find(|(w, _)| w == word).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(w, _)| *w).collect();
        let what = format!("{option} is {word:?}; known: {}", known.join(", "));
        Problem::new(section, option, what)
    })
}
