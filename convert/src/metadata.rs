//! The metadata of a converted file (spec §5).

use stb_format::{Meta, Value};
use stb_runtime::{Checkpoint, Error, Result, SourceFile};

use crate::digest::digest;
use crate::recipe::Recipe;

/// The metadata without the hashes of the source files, which take a while; see [`add_hashes`]. Long texts, such as
/// the tokenizer, are deflated.
///
/// # Errors
/// [`Error::Invalid`] if the checkpoint has no tokenizer or one that does not fit it.
pub fn metadata(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: &str,
    parameters: u64,
) -> Result<Meta> {
    let internal = |e: stb_format::Error| Error::invalid(format!("metadata: {e}"));
    let mut meta = Meta::new();
    checkpoint.spec.write_meta(&mut meta).map_err(internal)?;
    let mut set = |key: &str, value: Value| meta.set(key, value).map_err(internal);
    let text = |v: &str| Value::Text(v.to_owned());
    let tokenizer = checkpoint.tokenizer.as_deref().ok_or_else(|| {
        Error::invalid(format!(
            "{} has no tokenizer; put the model's tokenizer.json or tokenizer.model next to the weights",
            checkpoint.source.display()
        ))
    })?;
    set("model.parameters", Value::U64(parameters))?;
    set("tokenizer.json", text(tokenizer))?;
    let (bos, add_bos) = checkpoint.begin_token()?;
    set("tokenizer.add_bos", Value::Bool(add_bos))?;
    if let Some(bos) = bos {
        set("tokenizer.bos_id", Value::U64(bos))?;
    }
    let mut eos = checkpoint.tokens.eos.clone();
    eos.retain(|id| *id < checkpoint.spec.vocab_size);
    set("tokenizer.eos_ids", Value::U64List(eos))?;
    if let Some(template) = &checkpoint.chat_template {
        set("tokenizer.chat_template", text(template))?;
    }
    for (key, value) in checkpoint.sampling_defaults() {
        set(&format!("generation.{key}"), Value::F64(value))?;
    }
    set("source.config.json", text(&checkpoint.config))?;
    for (key, value) in [
        ("source.generation_config.json", &checkpoint.generation_config),
        ("source.tokenizer_config.json", &checkpoint.tokenizer_config),
    ] {
        if let Some(value) = value {
            set(key, text(value))?;
        }
    }
    let converter = concat!("stb-convert ", env!("CARGO_PKG_VERSION"));
    set("provenance.converter", text(converter))?;
    set("provenance.recipe", text(&recipe.to_toml()?))?;
    if !calibration.is_empty() {
        set("provenance.calibration", text(calibration))?;
    }
    if let Some(license) = &checkpoint.license {
        set("provenance.license", text(license))?;
    }
    meta.deflate_texts();
    // Written as it is: its length is known before the hashes are.
    let sources = Value::Text(sources(&checkpoint.files, None));
    meta.set("provenance.sources", sources).map_err(internal)?;
    Ok(meta)
}

/// Adds the hashes of the source files; the length of the metadata does not change.
///
/// # Errors
/// None in practice.
pub fn add_hashes(meta: &mut Meta, checkpoint: &Checkpoint) -> Result<()> {
    use rayon::prelude::*;
    let hash = |file: &SourceFile| digest(&**file.bytes);
    let hashes: Vec<String> = checkpoint.files.par_iter().map(hash).collect();
    let value = Value::Text(sources(&checkpoint.files, Some(&hashes)));
    meta.set("provenance.sources", value).map_err(|e| Error::Internal { what: e.to_string() })
}

/// One line per file: name, bytes, SHA-256.
fn sources(files: &[SourceFile], hashes: Option<&[String]>) -> String {
    let unknown = "0".repeat(64);
    let line = |(i, file): (usize, &SourceFile)| {
        let hash = hashes.and_then(|h| h.get(i)).unwrap_or(&unknown);
        format!("{} {} sha256:{hash}", file.name, file.bytes.len())
    };
    files.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
}
