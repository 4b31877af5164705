//! Checkpoints in the Hugging Face layout: a folder with safetensors files, `config.json` and tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use stb_format::ModelSpec;
use stb_format::arch::Family;
use stb_format::encoding::Dense;

use super::source::{Place, Source, StoredTensor, StoredType, Transform, add};
use super::{Checkpoint, SourceFile, license};
use crate::config::{Config, parse_config, token_ids};
use crate::error::{Error, Result};
use crate::kind;
use crate::map::Bytes;
use crate::vocab;

/// The relevant part of `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// What folders without safetensors files have.
const OTHERS: [&str; 4] =
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.onnx"];

/// Opens a folder, a `.safetensors` file or an index of shards.
pub(super) fn open(source: &Path, map: bool) -> Result<Checkpoint> {
    let (folder, files) = locate(source)?;
    let config = read_text(&folder.join("config.json"))?.ok_or_else(|| {
        Error::invalid(format!(
            "{} has no config.json; put the model's config.json beside the weights",
            folder.display()
        ))
    })?;
    let Config { family, spec, mut tokens } = parse_config(&config)?;
    let generation_config = read_text(&folder.join("generation_config.json"))?;
    if let Some(text) = &generation_config {
        for id in generation_eos(text)? {
            if !tokens.eos.contains(&id) {
                tokens.eos.push(id);
            }
        }
    }
    let tokenizer_config = read_text(&folder.join("tokenizer_config.json"))?;
    let chat_template = match read_text(&folder.join("chat_template.jinja"))? {
        Some(template) => Some(template),
        None => tokenizer_config.as_deref().and_then(template_in_config),
    };
    let mut opened = Vec::new();
    for name in files {
        let path = folder.join(&name);
        opened.push(SourceFile { name, bytes: Arc::new(Bytes::open(&path, map)?) });
    }
    let weights = read_weights(&folder, &opened, family, &spec)?;
    let tokenizer = match read_text(&folder.join("tokenizer.json"))? {
        Some(json) => Some(json),
        None => vocab::from_folder(&folder, tokenizer_config.as_deref())?,
    };
    Ok(Checkpoint {
        family,
        spec,
        tokens,
        config,
        generation_config,
        tokenizer,
        tokenizer_config,
        chat_template,
        license: license::of_folder(&folder),
        files: opened,
        weights,
        owned: BTreeMap::new().into(),
        source: folder,
    })
}

/// The folder and the names of the weight files of `source`.
fn locate(source: &Path) -> Result<(PathBuf, Vec<String>)> {
    let metadata = std::fs::metadata(source).map_err(|e| Error::io(source, e))?;
    if metadata.is_dir() {
        for name in [INDEX, SINGLE] {
            let path = source.join(name);
            if path.exists() {
                return locate(&path);
            }
        }
        if let Some(other) = OTHERS.iter().find(|name| source.join(name).exists())
            && let Some(error) = kind::no_checkpoint(&source.join(other))
        {
            return Err(error);
        }
        return Err(Error::invalid(format!(
            "{} has neither {SINGLE} nor {INDEX}; give a folder in the Hugging Face layout or a \
             .safetensors or .gguf file",
            source.display()
        )));
    }
    let folder = source.parent().map(Path::to_owned).unwrap_or_default();
    let name = source.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
    if name.ends_with(".safetensors") {
        return Ok((folder, vec![name]));
    }
    if !name.ends_with(".json") {
        return Err(kind::no_checkpoint(source).unwrap_or_else(|| Error::invalid(format!(
            "{} is not a .gguf file, a .safetensors file, an index of shards or a folder with one",
            source.display()
        ))));
    }
    let text = read_text(source)?.unwrap_or_default();
    let index: Index = serde_json::from_str(&text).map_err(|e| {
        kind::no_checkpoint(source).unwrap_or_else(|| {
            Error::invalid(format!("{} is not an index of shards: {e}", source.display()))
        })
    })?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    // A path in an index could name any file of the machine.
    if let Some(bad) = names.iter().find(|n| n.contains(['/', '\\']) || n.starts_with('.')) {
        return Err(Error::invalid(format!("{}: shard {bad:?} is a path", source.display())));
    }
    Ok((folder, names.into_iter().collect()))
}

/// The text of a file; `None` if it does not exist.
fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Error::invalid(format!("{} is not UTF-8 text", path.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn generation_eos(json: &str) -> Result<Vec<u64>> {
    let value: serde_json::Value = serde_json::from_str(json)
        .map_err(|e| Error::invalid(format!("generation_config.json: {e}")))?;
    Ok(token_ids(value.get("eos_token_id")))
}

/// `chat_template` of `tokenizer_config.json`: a string, or the entry `default` of a list.
fn template_in_config(json: &str) -> Option<String> {
    let config: serde_json::Value = serde_json::from_str(json).ok()?;
    match config.get("chat_template")? {
        serde_json::Value::String(template) => Some(template.clone()),
        serde_json::Value::Array(named) => {
            let default = named.iter().find(|t| t.get("name").is_some_and(|n| n == "default"))?;
            default.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// The tensors of `spec` with their shapes. Other tensors are an error unless the family ignores them.
fn read_weights(
    folder: &Path,
    files: &[SourceFile],
    family: &Family,
    spec: &ModelSpec,
) -> Result<BTreeMap<String, Source>> {
    let stored = file_tensors(folder, files)?;
    let mut weights = BTreeMap::new();
    let mut used = BTreeSet::new();
    for tensor in spec.tensors() {
        let source = family.source(spec, &tensor).ok_or_else(|| {
            let (family, name) = (family.name(), &tensor.name);
            Error::Internal { what: format!("the family {family} has no name for {name}") }
        })?;
        let found = source.names.iter().find_map(|name| stored.get_key_value(name));
        let Some((name, found)) = found else {
            return Err(Error::invalid(format!(
                "{} has no tensor {}, which config.json requires",
                folder.display(),
                source.names.join(" or ")
            )));
        };
        used.insert(name);
        let transform = if source.is_transposed { Transform::Transposed } else { Transform::None };
        let place = Place { shape: source.shape, first_row: source.first_row, transform };
        weights.insert(tensor.name.clone(), Source::new(name, found.clone(), &place, &tensor)?);
    }
    let is_extra = |name: &&String| !used.contains(*name) && !family.is_ignored(spec, name);
    if let Some(name) = stored.keys().find(is_extra) {
        return Err(Error::unsupported(format!(
            "tensor {name} is not part of a {} model; dropping it would change the model",
            family.name()
        )));
    }
    Ok(weights)
}

/// The tensors of the weight files by name.
fn file_tensors(folder: &Path, files: &[SourceFile]) -> Result<BTreeMap<String, StoredTensor>> {
    let mut stored = BTreeMap::new();
    for file in files {
        let path = folder.join(&file.name);
        let tensors = SafeTensors::deserialize(&file.bytes).map_err(|e| {
            kind::not_safetensors(&path, &file.bytes).unwrap_or_else(|| {
                Error::invalid(format!("{} is not a valid safetensors file: {e}", path.display()))
            })
        })?;
        for (name, tensor) in tensors.iter() {
            let kind = match tensor.dtype() {
                Dtype::F32 => Ok(StoredType::Dense(Dense::F32)),
                Dtype::F16 => Ok(StoredType::Dense(Dense::F16)),
                Dtype::BF16 => Ok(StoredType::Dense(Dense::Bf16)),
                other => Err(format!("{other:?}; F32, F16 and BF16 are supported")),
            };
            let start = tensor.data().as_ptr().addr() - file.bytes.as_ptr().addr();
            let tensor = StoredTensor {
                bytes: file.bytes.clone(),
                range: start..start + tensor.data().len(),
                kind,
                shape: tensor.shape().iter().map(|d| *d as u64).collect(),
            };
            add(&mut stored, name, tensor)?;
        }
    }
    Ok(stored)
}
