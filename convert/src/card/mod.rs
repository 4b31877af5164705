//! Model cards: what the metadata of a file say of it, in Markdown with the front matter of the Hugging Face hub.

mod license;
mod safe;

use std::fmt::Write;
use std::path::Path;

use stb_format::{File, ModelSpec, Quality, QualityFigures, Verdict};
use stb_runtime::{Error, Result, parse_config};

use self::safe::{block, code, plain};
use crate::export::text_config;
use crate::inspect::{Inspection, inspect};
use crate::quality::plus_minus;

/// Source files that a card lists at most.
const MAX_SOURCES: usize = 64;
/// Bytes of settings that are parsed; those of the converter have a few hundred.
const MAX_SETTINGS: usize = 1 << 16;

/// What a card says beyond the metadata of the file.
#[derive(Clone, Debug, Default)]
pub struct CardOptions {
    /// The hub's id of the original model, `owner/name`.
    pub base_model: Option<String>,
    /// SPDX expression for the weights; `None` for that of the metadata.
    pub license: Option<String>,
}

/// The card of an open file: Markdown that begins with YAML between `---`. Whatever the metadata hold, their texts are
/// code or escaped, on one line or in a block, and at most a few thousand characters each.
///
/// # Errors
/// [`Error::Usage`] for a base model that is no id, [`Error::Unsupported`] for a file that is no model,
/// [`Error::Format`] for a model with a broken description.
pub fn model_card(file: &File<'_>, path: &Path, options: &CardOptions) -> Result<String> {
    if file.meta().get("model.architecture").is_none() {
        let what = "is a set of tensors, not a model: only models have cards";
        return Err(Error::unsupported(format!("{} {what}", path.display())));
    }
    if let Some(id) = options.base_model.as_deref().filter(|id| !is_hub_id(id)) {
        let what = "is no id of the Hugging Face hub, which looks like owner/name";
        return Err(Error::usage(format!("{id:?} {what}")));
    }
    let card = Card {
        file,
        spec: ModelSpec::from_file(file).map_err(|e| Error::format(path, e))?,
        inspection: inspect(file),
        family: family(file),
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        file_name: command_name(path),
        base_model: options.base_model.as_deref(),
        license: options.license.as_deref().or_else(|| file.meta().text("provenance.license")),
    };
    Ok(card.text())
}

/// Whether `text` has the form of an id of the hub.
fn is_hub_id(text: &str) -> bool {
    let is_part = |part: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        (1..=96).contains(&part.len()) && part.chars().all(is_allowed)
    };
    text.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// The family of the `config.json` in a file, if this version knows it.
fn family(file: &File<'_>) -> Option<&'static str> {
    let config = text_config(file.meta().text("source.config.json")?).ok()?;
    Some(parse_config(&config).ok()?.family.name())
}

/// The name of the file for commands: one that a shell takes as it is.
fn command_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_word = name.len() <= 100 && name.chars().all(is_allowed);
    let fits = is_word && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if fits { name.into_owned() } else { "model.stb".into() }
}

/// What a card is made of.
struct Card<'a> {
    file: &'a File<'a>,
    spec: ModelSpec,
    inspection: Inspection,
    family: Option<&'static str>,
    name: String,
    file_name: String,
    base_model: Option<&'a str>,
    license: Option<&'a str>,
}

impl Card<'_> {
    fn text(&self) -> String {
        let parts = [
            self.front_matter(),
            format!("# {}\n", plain(&self.name)),
            self.summary(),
            format!("## Quality\n\n{}", self.quality()),
            format!("## Use\n\n{}", self.usage()),
            format!("## How this file was made\n\n{}", self.provenance()),
            format!("## License\n\n{}\n", license::sentence(self.license)),
        ];
        parts.join("\n")
    }

    fn front_matter(&self) -> String {
        let mut out = format!("---\n{}", license::front_matter(self.license));
        if let Some(id) = self.base_model {
            let _ = writeln!(out, "base_model: \"{id}\"\nbase_model_relation: quantized");
        }
        out += "library_name: stb\npipeline_tag: text-generation\ntags:\n- stb\n- quantized\n";
        if let Some(family) = self.family {
            let _ = writeln!(out, "- {family}");
        }
        if self.has_template() {
            out += "- conversational\n";
        }
        out + "---\n"
    }

    fn has_template(&self) -> bool {
        self.file.meta().text("tokenizer.chat_template").is_some()
    }

    /// A table: where the model comes from, its sizes and its shape.
    fn summary(&self) -> String {
        let (found, spec) = (&self.inspection, &self.spec);
        let mut out =
            "A quantized language model in the format `.stb`.\n\n| | |\n| --- | --- |\n".to_owned();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "| {name} | {value} |");
        };
        let base = self.base_model.map_or_else(|| "not stated".into(), code);
        row("original model", base);
        row("recipe", self.recipe().map_or_else(|| "not stated".into(), |name| code(&name)));
        let bytes = found.file_bytes;
        row("size", format!("{:.1} MB ({bytes} bytes)", bytes as f64 / 1e6));
        row("parameters", found.parameters.to_string());
        if let Some(active) = found.active_parameters {
            row("parameters that a token uses", active.to_string());
        }
        let bits = found.true_bits_per_parameter;
        row("true bits per parameter", format!("{bits:.3} (8 × bytes of the file ÷ parameters)"));
        row(
            "stored bits per weight of the decoder's linear layers",
            format!("{:.3}", found.body_bits),
        );
        let family = self.family.unwrap_or_else(|| spec.architecture());
        row(
            "architecture",
            format!(
                "`{family}`: {} layers, hidden size {}, {} heads, {} KV heads, {} tokens in the vocabulary",
                spec.layers, spec.hidden_size, spec.heads, spec.kv_heads, spec.vocab_size
            ),
        );
        row("context", format!("{} tokens", spec.context_length));
        row("chat template", if self.has_template() { "yes" } else { "no" }.into());
        out
    }

    /// The name of the recipe.
    fn recipe(&self) -> Option<String> {
        let settings = self.file.meta().text("provenance.recipe")?;
        if settings.len() > MAX_SETTINGS {
            return None;
        }
        let table: toml::Table = toml::from_str(settings).ok()?;
        table.get("name")?.as_str().map(str::to_owned)
    }

    fn quality(&self) -> String {
        let Some(quality) = Quality::read(self.file.meta()) else {
            return "Not measured: the file says nothing of its quality.\n".into();
        };
        match &quality.figures {
            Some(figures) => figures_text(quality.verdict, figures),
            None if quality.verdict == Verdict::Unchecked => {
                "Not measured: KL divergence from the original model, perplexity and all else are unknown.\n".into()
            }
            None => format!("**Verdict: {}.** No figures are stated.\n", quality.verdict.phrase()),
        }
    }

    fn usage(&self) -> String {
        let file = &self.file_name;
        let (run, call) = match self.has_template() {
            true => (
                format!("stb-run {file}                 # chat"),
                "model.chat([{\"role\": \"user\", \"content\": \"Hello\"}])",
            ),
            false => (
                format!("stb-run {file} --prompt \"Once upon a time\""),
                "model.generate(\"Once upon a time\")",
            ),
        };
        let shell = format!(
            "{run}\nstb-run serve {file}           # OpenAI's API and a page at http://127.0.0.1:8080\nstb-convert verify \
             {file}      # checks every checksum"
        );
        let python =
            format!("import stb\n\nmodel = stb.open(\"{file}\")\nprint({call}.complete())");
        format!(
            "With programs that read version {} of the format:\n\n{}\nFrom Python:\n\n{}",
            self.file.min_reader(),
            block("sh", &shell),
            block("python", &python)
        )
    }

    /// The converter, the files that it read and its settings.
    fn provenance(&self) -> String {
        let text = |key: &str| self.file.meta().text(key).filter(|text| !text.trim().is_empty());
        let mut out = String::new();
        for (name, key) in
            [("Converter", "provenance.converter"), ("Calibration text", "provenance.calibration")]
        {
            let value = text(key).map_or_else(|| "not stated".into(), code);
            let _ = writeln!(out, "- {name}: {value}");
        }
        match text("provenance.sources") {
            None => out += "- Source files: not stated\n",
            Some(sources) => {
                out += "- Source files, with bytes and SHA-256:\n";
                for line in sources.lines().take(MAX_SOURCES) {
                    let _ = writeln!(out, "  - {}", code(line));
                }
                let more = sources.lines().count().saturating_sub(MAX_SOURCES);
                if more > 0 {
                    let _ = writeln!(out, "  - and {more} more");
                }
            }
        }
        match text("provenance.recipe") {
            None => out + "- Settings: not stated\n",
            Some(recipe) => format!("{out}\nSettings:\n\n{}", block("toml", recipe)),
        }
    }
}

/// Verdict, table of figures, and what was not measured.
fn figures_text(verdict: Verdict, figures: &QualityFigures) -> String {
    let QualityFigures { kl, top1, perplexity, source_perplexity, tokens, windows, text } = figures;
    let percent = plus_minus(100.0 * top1.value, top1.error.map(|e| 100.0 * e), 1);
    let text = code(text);
    let mut out = format!(
        "**Verdict: {}.** The converter has compared the file with the original model on text that calibration had \
         not seen: {tokens} tokens in {windows} windows of {text}. The file ran as `stb-run` runs it by \
         default.\n\n| | this file | original |\n| --- | --- | --- |\n",
        verdict.phrase()
    );
    let mut row = |name: &str, file: &str, original: &str| {
        let _ = writeln!(out, "| {name} | {file} | {original} |");
    };
    row("KL divergence from the original, nats per token", &plus_minus(kl.value, kl.error, 4), "0");
    row("same top token as the original", &format!("{percent} %"), "100 %");
    let of_source = plus_minus(source_perplexity.value, source_perplexity.error, 2);
    row("perplexity", &plus_minus(perplexity.value, perplexity.error, 2), &of_source);
    if kl.error.is_some() {
        out += "\nAfter ± stands one standard error over the windows.\n";
    }
    out + "\nNot measured: other texts and languages, tasks, long contexts, safety and bias. The figures compare with the \
           original model and do not say how good that is.\n"
}
