//! A recipe with all options checked.

use stb_format::encoding::IntGroup;
use stb_runtime::{Error, Result, nearest};

use super::calibration::Calibration;
use super::file::{RecipeFile, RoundingFile};
use super::linear::LinearRecipe;
use super::presets::PRESETS;
use super::problem::{Problem, Resolved, keyword};
use crate::quantize::int_group::{CANDIDATE_SWEEPS, IntOptions};

/// The methods for all tensors and the calibration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The name.
    pub name: String,
    /// One line of description.
    pub description: String,
    /// The calibration.
    pub calibration: Calibration,
    /// The linear layers of the decoder.
    pub linear: LinearRecipe,
    /// The token embeddings, also the lm_head if they are tied; `None` keeps their data type.
    pub embeddings: Option<IntOptions>,
    /// The lm_head, if it is not tied; `None` keeps its data type.
    pub head: Option<IntOptions>,
    /// The options as written, for the metadata of files.
    file: RecipeFile,
}

impl Recipe {
    /// A built-in recipe by name, or one from a `.toml` file.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name, [`Error::Io`] and [`Error::Invalid`] for files.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
            return Self::parse(text);
        }
        if !name.ends_with(".toml") {
            let names = || PRESETS.iter().map(|(name, _)| *name);
            let near = nearest(name, names());
            let others: Vec<_> = names().filter(|other| !near.contains(other)).collect();
            let meant = match near.is_empty() {
                true => String::new(),
                false => format!("did you mean {}? The others are ", near.join(" or ")),
            };
            return Err(Error::usage(format!(
                "there is no recipe {name:?}; {meant}{}; or give a .toml file",
                others.join(", ")
            )));
        }
        let path = std::path::Path::new(name);
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text)
    }

    /// Reads TOML and checks every value.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the line in the text and the allowed values.
    pub fn parse(text: &str) -> Result<Self> {
        let file = toml::from_str(text).map_err(|e| Error::invalid(format!("recipe: {e}")))?;
        resolve(file).map_err(|problem| problem.error(Some(text)))
    }

    /// The recipe that `file` describes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for values that are not allowed, with the allowed values.
    pub fn resolve(file: RecipeFile) -> Result<Self> {
        resolve(file).map_err(|problem| problem.error(None))
    }

    /// Stored bits per weight of the decoder's linear layers; `None` if they depend on the model. Of rows that are
    /// much longer than a group: shorter ones may take a little more.
    #[must_use]
    pub fn body_bits(&self) -> Option<f64> {
        const WIDTH: u64 = 4096;
        let encoding = self.linear.method()?.quantizer().encoding();
        let bytes = encoding.payload_len(&[WIDTH, WIDTH]).ok().flatten()?;
        Some(bytes as f64 * 8.0 / (WIDTH * WIDTH) as f64)
    }

    /// This recipe with changed options.
    ///
    /// # Errors
    /// As for [`Recipe::resolve`].
    pub fn changed(&self, change: impl FnOnce(&mut RecipeFile)) -> Result<Self> {
        let mut file = self.file.clone();
        change(&mut file);
        Self::resolve(file)
    }

    /// The recipe as TOML.
    ///
    /// # Errors
    /// None in practice: all fields can be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(&self.file).map_err(|e| Error::Internal { what: e.to_string() })
    }
}

/// Checks all options and their combinations.
fn resolve(file: RecipeFile) -> Resolved<Recipe> {
    let linear = file.body.resolve()?;
    let embeddings = file.embeddings.resolve("embeddings")?;
    let head = file.head.resolve("head")?;
    let calibration = file.calibration.resolve()?;
    if calibration.distills() && linear == LinearRecipe::Keep {
        let option = if calibration.distill.is_some() { "distill" } else { "distill-layers" };
        let what = format!(
            "{option} needs layers that are quantized, and method = {:?} has none",
            file.body.method
        );
        return Err(Problem::new("calibration", option, what));
    }
    // A separate pruning pass prunes the layer's own weights, not those for dense targets.
    let prunes_first = linear.method().is_some_and(|method| method.quantizer().prunes_first());
    if calibration.ridge.is_some() && prunes_first {
        let what = "target = \"dense\" needs pass = \"layer\"";
        return Err(Problem::new("calibration", "target", what));
    }
    let (name, description) = (file.name.clone(), file.description.clone());
    Ok(Recipe { name, description, calibration, linear, embeddings, head, file })
}

impl RoundingFile {
    fn resolve(&self, section: &'static str) -> Resolved<Option<IntOptions>> {
        let words = &[("nearest", false), ("compensated", true)];
        let compensate = keyword(section, "rounding", &self.rounding, words)?;
        if self.bits == 0 {
            return match compensate {
                false => Ok(None),
                true => Err(Problem::new(section, "rounding", "bits = 0 rounds nothing")),
            };
        }
        let spec = IntGroup::new(self.bits, self.group).ok_or_else(|| {
            let what = "embeddings and head take bits 0, 1, 2, 3, 4 or 8 and group 32, 64 or 128";
            Problem::new(section, "bits", what)
        })?;
        let sweeps = if compensate { CANDIDATE_SWEEPS } else { 0 };
        Ok(Some(IntOptions { compensate, ..IntOptions::full(spec, sweeps) }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::presets::{DEFAULT, PRESETS};
    use super::*;

    #[test]
    fn every_preset_is_valid_and_survives_writing() {
        for (name, text) in PRESETS {
            let recipe = Recipe::parse(text).unwrap();
            assert_eq!(recipe.name, *name);
            assert!(!recipe.description.is_empty(), "{name}");
            assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe, "{name}");
        }
        assert!(PRESETS.iter().any(|(name, _)| *name == DEFAULT));
    }

    #[test]
    fn mistakes_are_named() {
        let refuse = |body: &str, word: &str| {
            let error = Recipe::parse(&format!("name = 'x'\n[body]\n{body}")).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        };
        refuse("method = 'magic'", "magic");
        refuse("method = 'nm'\nn = 3", "1:4");
        refuse("method = 'nm'\nmetric = 'si'", "metric");
        refuse("method = 'stbllm'\nmetric = 'best'", "wanda");
        refuse("method = 'stbllm'\nn = 9", "1 to 8");
        refuse("method = 'stbllm'\nnn = 4", "nn");
        refuse("method = 'int'\nbits = 9", "bits 1 to 8");
        refuse("method = 'int'\nbits = 8\nsymmetric = false", "1 to 7");
        refuse("method = 'int'\nbits = 2\nsymmetric = false\nsweeps = 1", "sweeps");
        refuse("method = 'stbllm'\nmask = 'before'\norder = 'quantize-first'", "in-loop");
        refuse("method = 'stbllm'\nmask = 'in-loop'\npass = 'model'", "compensated");
        refuse("method = 'stbllm'\npartition = 'bell'\nregion-ratio = 3.0", "region-ratio");
        refuse("method = 'pb-llm'\nshare = 1.5", "share");
        let refuse_calibration = |lines: &str, word: &str| {
            let text = format!("name = 'x'\n[calibration]\n{lines}\n[body]\nmethod = 'nm'");
            let error = Recipe::parse(&text).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        };
        refuse_calibration("inputs = 'fresh'", "refreshed");
        refuse_calibration("target = 'dense'", "inputs");
        refuse_calibration("ridge = 0.5", "target");
        refuse_calibration("inputs = 'refreshed'\ntarget = 'dense'\nridge = -1.0", "ridge");
        refuse_calibration("tuning = 2000", "1000");
        refuse_calibration("tuning-rate = 0.1", "distill-layers-rate needs distill-layers");
        refuse_calibration("fine-tuning-rate = 0.1", "distill-rate needs distill");
        refuse_calibration("fine-tuning = 1001", "distill is at most 1000");
        let idle = "name = 'x'\n[calibration]\ntuning = 2\n[body]\nmethod = 'source'";
        assert!(Recipe::parse(idle).unwrap_err().to_string().contains("source"));
        assert!(Recipe::load("nonsense").unwrap_err().to_string().contains("stbllm-4of8"));
        let near = Recipe::load("nm-1of3").unwrap_err().to_string();
        assert!(near.contains("did you mean nm-1of8 or nm-1of4 or "), "{near}");
        assert_eq!(Recipe::load("nowhere.toml").unwrap_err().exit_code(), 3);
    }

    #[test]
    fn mistakes_have_a_line() {
        let refuse = |text: &str, start: &str| {
            let error = Recipe::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        let body = "[body]\nmethod = 'stbllm'\n";
        refuse(
            &format!("name = 'x'\n{body}n = 4\nmetric = 'best'"),
            "recipe, line 5: metric is \"best\"; known: si, si-eq3",
        );
        refuse(
            &format!("name = 'x'\n{body}bits = 4"),
            "recipe, line 4: method stbllm has no option",
        );
        let tuning = "name = 'x'\n[calibration]\nseed = 1\nfine-tuning = 1001\n";
        refuse(&format!("{tuning}{body}"), "recipe, line 4: distill is at most 1000");
        // Options that are not given are in the line of their section.
        refuse("name = 'x'\n\n[body]\nmethod = 'budget'", "recipe, line 3: budget takes");
        refuse("name = 'x'\n[body]\nmethod = 'nm'\n[head]\nbits = 5", "recipe, line 5: embeddings");
        refuse(
            "name = 'x'\n[body]\nmethod = 'nm'\n[head]\nbits = 0\nrounding = 'compensated'",
            "recipe, line 6: bits = 0 rounds nothing",
        );
        let order = format!("name = 'x'\n{body}mask = 'in-loop'\norder = 'last'");
        let error = Recipe::parse(&order).unwrap_err().to_string();
        assert!(error.ends_with("known: prune-first, quantize-first"), "{error}");
        let error = Recipe::load("int4").unwrap().changed(|file| file.body.bits = Some(9));
        assert!(error.unwrap_err().to_string().starts_with("recipe: int takes bits"));
    }

    #[test]
    fn earlier_names_are_read() {
        let with = |lines: &str, order: &str| {
            let body = format!("[body]\nmethod = 'stbllm'\nmask = 'in-loop'\norder = '{order}'");
            Recipe::parse(&format!("name = 'x'\n[calibration]\n{lines}\n{body}")).unwrap()
        };
        let old = with(
            "tuning = 2\ntuning-rate = 0.02\nfine-tuning = 3\nfine-tuning-rate = 0.01",
            "quantise-first",
        );
        let new = with(
            "distill-layers = 2\ndistill-layers-rate = 0.02\ndistill = 3\ndistill-rate = 0.01",
            "quantize-first",
        );
        assert_eq!((&old.calibration, old.linear), (&new.calibration, new.linear));
        assert_eq!(old.calibration.distill.unwrap().epochs, 3);
        assert_eq!(old.calibration.distill_layers.unwrap().rate, 0.02);
    }
}
