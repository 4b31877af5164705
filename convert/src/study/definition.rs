//! The definition of a study: a TOML file with models, texts and recipes.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use stb_runtime::{Error, Result, TextLayout};

use crate::recipe::{RENAMED, Recipe};

/// A study as written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Definition {
    /// The name of its output files: letters, digits, `-` and `_`.
    pub name: String,
    /// One line.
    pub title: String,
    /// Paragraphs below the title of the table.
    #[serde(default)]
    pub description: String,
    /// Options for all recipes, before their own changes: `{ embeddings.bits = 0 }`.
    #[serde(default)]
    pub set: toml::Table,
    /// The calibration text of recipes without one of their own; default: the built-in text.
    pub calibration: Option<CalibrationEntry>,
    /// The columns.
    #[serde(default, rename = "model")]
    pub models: Vec<ModelEntry>,
    /// The evaluation texts.
    #[serde(default, rename = "text")]
    pub texts: Vec<TextEntry>,
    /// The rows.
    #[serde(default, rename = "recipe")]
    pub recipes: Vec<RecipeEntry>,
}

/// A dense checkpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ModelEntry {
    /// For the table.
    pub name: String,
    /// A path, relative to the study; `{word}` is replaced by the value of `--define word=…`.
    pub path: String,
    /// Tokens per window; default: the context of the model.
    pub context: Option<usize>,
}

/// A text.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TextEntry {
    /// For the table.
    pub name: String,
    /// A UTF-8 file; see [`ModelEntry::path`].
    pub path: String,
    /// The separator of its documents.
    pub separator: Option<String>,
    /// Whether its lines are rows of a data set, which are joined by two newlines.
    #[serde(default)]
    pub rows: bool,
    /// The most windows to use; default: all.
    pub windows: Option<usize>,
}

/// A recipe, or a change of one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeEntry {
    /// The name of a built-in recipe or a `.toml` file, relative to the study.
    pub base: Option<String>,
    /// Instead of a base: true bits per parameter of the whole file.
    pub bits: Option<f64>,
    /// For the table; default: the base, or the bits.
    pub label: Option<String>,
    /// Options that differ from the base, as in a recipe: `{ body.metric = "wanda" }`.
    #[serde(default)]
    pub set: toml::Table,
    /// Options of the base that are dropped, such as `body.region-ratio`.
    #[serde(default)]
    pub unset: Vec<String>,
    /// A calibration text other than the study's.
    pub calibration: Option<CalibrationEntry>,
}

/// A calibration text.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CalibrationEntry {
    /// A UTF-8 file; see [`ModelEntry::path`].
    pub path: String,
    /// The separator of its documents, which are trimmed and get a begin token each.
    pub separator: Option<String>,
}

/// A study with resolved paths and recipes.
#[derive(Clone, Debug)]
pub struct Study {
    /// The name of its output files.
    pub name: String,
    /// One line.
    pub title: String,
    /// Paragraphs.
    pub description: String,
    /// The columns.
    pub models: Vec<StudyModel>,
    /// The evaluation texts.
    pub texts: Vec<StudyText>,
    /// The rows.
    pub recipes: Vec<StudyRecipe>,
    /// Models and texts that are left out, with the reason.
    pub left_out: Vec<String>,
}

/// A dense checkpoint.
#[derive(Clone, Debug)]
pub struct StudyModel {
    /// For the table.
    pub name: String,
    /// A folder, a `.safetensors` file, an index of shards or a `.gguf` file.
    pub path: PathBuf,
    /// Tokens per window; `None` for the context of the model.
    pub context: Option<usize>,
}

/// A text.
#[derive(Clone, Debug)]
pub struct StudyText {
    /// For the table.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// The layout of the text.
    pub layout: TextLayout,
    /// The most windows to use.
    pub windows: Option<usize>,
}

/// A recipe.
#[derive(Clone, Debug)]
pub struct StudyRecipe {
    /// For the table.
    pub label: String,
    /// The recipe.
    pub recipe: Recipe,
    /// The calibration text; `None` for that of the recipe.
    pub calibration: Option<PathBuf>,
}

impl Definition {
    /// Reads TOML.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the position in the text, or for a name that is no file name.
    pub fn parse(text: &str) -> Result<Self> {
        let definition: Self =
            toml::from_str(text).map_err(|e| Error::invalid(format!("study: {e}")))?;
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if definition.name.is_empty() || !definition.name.chars().all(valid) {
            return Err(Error::invalid(format!(
                "study: the name {:?} may only have letters, digits, - and _",
                definition.name
            )));
        }
        Ok(definition)
    }

    /// Resolves paths and recipes. `folder` is the folder of the study; `defined` has the values of `{word}` in paths.
    /// Leaves out models and texts with undefined words.
    ///
    /// # Errors
    /// [`Error::Usage`] for calibration texts with undefined words, [`Error::Invalid`] for invalid recipes and for names
    /// that are used twice; those of [`Recipe::load`].
    pub fn resolve(&self, folder: &Path, defined: &[(String, String)]) -> Result<Study> {
        let mut left_out = Vec::new();
        let mut path =
            |kind: &str, name: &str, text: &str| match resolve_path(folder, text, defined) {
                Ok(path) => Some(path),
                Err(word) => {
                    left_out.push(format!("{kind} {name}: its path needs --define {word}=…"));
                    None
                }
            };
        let mut models = Vec::new();
        for model in &self.models {
            if let Some(path) = path("model", &model.name, &model.path) {
                models.push(StudyModel { name: model.name.clone(), path, context: model.context });
            }
        }
        let mut texts = Vec::new();
        for text in &self.texts {
            if let Some(path) = path("text", &text.name, &text.path) {
                texts.push(StudyText {
                    name: text.name.clone(),
                    path,
                    layout: text.layout()?,
                    windows: text.windows,
                });
            }
        }
        let mut recipes = Vec::new();
        for entry in &self.recipes {
            let (label, mut recipe) = entry.recipe(folder, &self.set)?;
            let study = self.calibration.as_ref().filter(|_| recipe.calibration.text.is_none());
            let calibration = match entry.calibration.as_ref().or(study) {
                None => None,
                Some(text) => {
                    recipe = recipe.changed(|file| {
                        file.calibration.text = None;
                        file.calibration.separator.clone_from(&text.separator);
                    })?;
                    // Without its calibration text it would be a different recipe, so it is not left out.
                    Some(resolve_path(folder, &text.path, defined).map_err(|word| {
                        let path = &text.path;
                        Error::usage(format!("the calibration text {path} needs --define {word}=…"))
                    })?)
                }
            };
            recipes.push(StudyRecipe { label, recipe, calibration });
        }
        unique("model", models.iter().map(|m| m.name.as_str()))?;
        unique("text", texts.iter().map(|t| t.name.as_str()))?;
        unique("recipe", recipes.iter().map(|r| r.label.as_str()))?;
        Ok(Study {
            name: self.name.clone(),
            title: self.title.clone(),
            description: self.description.clone(),
            models,
            texts,
            recipes,
            left_out,
        })
    }
}

impl Study {
    /// Checks that there are models, texts and recipes.
    ///
    /// # Errors
    /// [`Error::Usage`] with the missing part.
    pub fn check(&self) -> Result<()> {
        for (what, none) in [
            ("models", self.models.is_empty()),
            ("texts", self.texts.is_empty()),
            ("recipes", self.recipes.is_empty()),
        ] {
            if none {
                let why: String = self.left_out.iter().map(|l| format!("; {l}")).collect();
                return Err(Error::usage(format!("the study has no {what}{why}")));
            }
        }
        Ok(())
    }
}

impl TextEntry {
    fn layout(&self) -> Result<TextLayout> {
        match (&self.separator, self.rows) {
            (None, false) => Ok(TextLayout::Whole),
            (None, true) => Ok(TextLayout::Rows),
            (Some(separator), false) => Ok(TextLayout::Documents(separator.clone())),
            (Some(_), true) => Err(Error::invalid(format!(
                "study: text {} has both a separator and rows",
                self.name
            ))),
        }
    }
}

impl RecipeEntry {
    /// The label and the recipe; `common` are the changes of the study.
    fn recipe(&self, folder: &Path, common: &toml::Table) -> Result<(String, Recipe)> {
        let (name, base) = match (&self.base, self.bits) {
            (Some(base), None) if base.ends_with(".toml") => {
                let path = folder.join(base);
                (base.clone(), Recipe::load(&path.to_string_lossy())?)
            }
            (Some(base), None) => (base.clone(), Recipe::load(base)?),
            (None, Some(bits)) => {
                let default = Recipe::load(crate::recipe::DEFAULT)?;
                let recipe = default.changed(|file| file.set_budget(bits))?;
                (recipe.name.clone(), recipe)
            }
            _ => return Err(Error::invalid("study: a recipe needs either base or bits")),
        };
        let label = self.label.clone().unwrap_or(name);
        let wrong = |e: String| Error::invalid(format!("study: recipe {label}: {e}"));
        let mut table: toml::Table =
            toml::from_str(&base.to_toml()?).map_err(|e| wrong(e.to_string()))?;
        merge(&mut table, &with_new_names(common));
        merge(&mut table, &with_new_names(&self.set));
        for path in &self.unset {
            if !remove(&mut table, &new_name(path)) {
                return Err(wrong(format!("unset: there is no option {path}")));
            }
        }
        let text = toml::to_string(&table).map_err(|e| wrong(e.to_string()))?;
        // The user has not written this text, so errors have no line.
        let file = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let recipe = Recipe::resolve(file).map_err(|e| wrong(e.to_string()))?;
        Ok((label, recipe))
    }
}

/// `changes` with the present names of renamed options.
fn with_new_names(changes: &toml::Table) -> toml::Table {
    let mut changes = changes.clone();
    for (section, old, new) in RENAMED {
        if let Some(toml::Value::Table(options)) = changes.get_mut(section)
            && let Some(value) = options.remove(old)
        {
            options.insert(new.into(), value);
        }
    }
    changes
}

/// The present name of the option `path`, such as `calibration.samples`.
fn new_name(path: &str) -> String {
    let renamed = RENAMED.iter().find(|(section, old, _)| {
        path.strip_prefix(section).and_then(|path| path.strip_prefix('.')) == Some(old)
    });
    renamed.map_or(path.into(), |(section, _, new)| format!("{section}.{new}"))
}

fn merge(table: &mut toml::Table, changes: &toml::Table) {
    for (key, value) in changes {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(changes)) => {
                merge(inner, changes);
            }
            _ => {
                table.insert(key.clone(), value.clone());
            }
        }
    }
}

fn remove(table: &mut toml::Table, path: &str) -> bool {
    match path.split_once('.') {
        None => table.remove(path).is_some(),
        Some((first, rest)) => match table.get_mut(first) {
            Some(toml::Value::Table(inner)) => remove(inner, rest),
            _ => false,
        },
    }
}

/// Replaces `{word}` in a path; fails with the first undefined word.
fn resolve_path(
    folder: &Path,
    text: &str,
    defined: &[(String, String)],
) -> std::result::Result<PathBuf, String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('{') {
        let Some((word, after)) = after.split_once('}') else { break };
        let value = defined.iter().find(|(name, _)| name == word).ok_or_else(|| word.to_owned())?;
        out += before;
        out += &value.1;
        rest = after;
    }
    out += rest;
    // Paths from the command line are relative to the working directory, not to the study.
    Ok(if text.starts_with('{') { PathBuf::from(out) } else { folder.join(out) })
}

fn unique<'a>(kind: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Error::invalid(format!(
                "study: two entries for {kind} {name:?}; give them different names"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Method;
    use crate::quantize::metric::Metric;

    const STUDY: &str = r#"
        name = "s"
        title = "A study"
        set = { calibration = { samples = 9, seed = 4 }, embeddings.bits = 0 }
        [[model]]
        name = "here"
        path = "../model"
        context = 256
        [[model]]
        name = "there"
        path = "{data}/models/m"
        [[text]]
        name = "t"
        path = "{data}/t.txt"
        separator = "<|endoftext|>"
        windows = 10
        [[recipe]]
        base = "stbllm-4of8"
        [[recipe]]
        base = "stbllm-4of8"
        label = "Wanda"
        set = { body.metric = "wanda", body.block = 64, calibration.seed = 3 }
        unset = ["body.mask"]
        [[recipe]]
        bits = 2.0
    "#;

    #[test]
    fn studies_are_resolved() {
        let definition = Definition::parse(STUDY).unwrap();
        let defined = [("data".to_owned(), "/d".to_owned())];
        let study = definition.resolve(Path::new("a/b"), &defined).unwrap();
        assert_eq!(study.models[0].path, Path::new("a/b/../model"));
        assert_eq!(study.models[1].path, Path::new("/d/models/m"));
        assert_eq!(study.texts[0].layout, TextLayout::Documents("<|endoftext|>".into()));
        let [plain, wanda, bits] = &study.recipes[..] else { panic!("three recipes") };
        let expected = Recipe::load("stbllm-4of8").unwrap().changed(|file| {
            file.calibration.samples = 9;
            file.calibration.seed = 4;
            file.embeddings.bits = 0;
        });
        assert_eq!(plain.recipe, expected.unwrap());
        assert_eq!(wanda.recipe.calibration.samples, 9);
        let Some(Method::Stbllm(options)) = wanda.recipe.linear.method() else { panic!("stbllm") };
        assert_eq!(
            (options.metric, options.spec.block(), options.spec.n()),
            (Metric::Wanda, 64, 4)
        );
        assert!(!wanda.recipe.to_toml().unwrap().lines().any(|line| line.starts_with("mask")));
        assert_eq!(wanda.recipe.calibration.seed, 3);
        assert_eq!((wanda.label.as_str(), bits.label.as_str()), ("Wanda", "bits-2"));
        assert_eq!(bits.recipe.linear.goal(), Some(crate::recipe::Goal::Bits(2.0)));
        study.check().unwrap();

        let study = definition.resolve(Path::new("a/b"), &[]).unwrap();
        assert_eq!((study.models.len(), study.texts.len()), (1, 0));
        let error = study.check().unwrap_err().to_string();
        assert!(error.contains("no texts") && error.contains("--define data"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        let refuse = |text: &str, word: &str| {
            let resolved = Definition::parse(text).and_then(|d| d.resolve(Path::new("."), &[]));
            let error = resolved.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        let with = |text: &str| format!("name = 's'\ntitle = 't'\n{text}");
        refuse("name = '../s'\ntitle = 't'", "letters");
        refuse(&with("recipes = 1"), "recipes");
        refuse(&with("[[recipe]]\nbase = 'nonsense'"), "nonsense");
        refuse(&with("[[recipe]]\nlabel = 'x'"), "base or bits");
        refuse(&with("[[recipe]]\nbits = -1.0"), "target-bits");
        refuse(&with("[[recipe]]\nbase = 'int4'\nset = { body.metric = 'si' }"), "metric");
        refuse(&with("[[recipe]]\nbase = 'int4'\nunset = ['body.magic']"), "magic");
        refuse(&with("[[recipe]]\nbase = 'int4'\n[[recipe]]\nbase = 'int4'"), "two entries");
        refuse(&with("[[text]]\nname = 'x'\npath = 'x'\nrows = true\nseparator = 'y'"), "both");
        let text = "calibration = { path = '{data}/c' }\n[[recipe]]\nbase = 'int4'";
        refuse(&with(text), "--define data");
    }

    #[test]
    fn earlier_names_of_options_change_the_same_option() {
        let text = "name = 's'\ntitle = 't'\nset = { calibration.fine-tuning = 2 }\n\
                    [[recipe]]\nbase = 'int4'\nset = { calibration.distill = 3 }\n\
                    [[recipe]]\nbase = 'int4'\nlabel = 'none'\nunset = ['calibration.fine-tuning']";
        let study = Definition::parse(text).unwrap().resolve(Path::new("."), &[]).unwrap();
        let distill = |i: usize| study.recipes[i].recipe.calibration.distill.map(|d| d.epochs);
        assert_eq!([distill(0), distill(1)], [Some(3), None]);
    }
}
