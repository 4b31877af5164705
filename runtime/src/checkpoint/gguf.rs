//! Opens GGUF files, also split ones, as checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stb_format::arch::{
    GGUF_LONG_FACTORS, GGUF_ROPE_DIVISORS, GGUF_SHORT_FACTORS, GgufArchitecture, Linear, NormKind,
    Role, TensorSpec,
};
use stb_format::gguf::{Gguf, GgufError, GgufTensor, GgufType};
use stb_format::{Class, ModelSpec};

use super::gguf_config::{RopeDivisors, architecture, config_json};
use super::gguf_texts::GgufTexts;
use super::source::{Place, Source, StoredTensor, StoredType, Transform, add};
use super::{Checkpoint, SourceFile};
use crate::config::{Config, parse_config};
use crate::error::{Error, Result};
use crate::kind;
use crate::map::Bytes;

/// Opens a `.gguf` file, or the split file that it is a part of.
pub(super) fn open(source: &Path, map: bool) -> Result<Checkpoint> {
    let paths = parts(source)?;
    let mut files = Vec::new();
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push(SourceFile { name, bytes: Arc::new(Bytes::open(path, map)?) });
    }
    let mut parsed = Vec::new();
    for (file, path) in files.iter().zip(&paths) {
        parsed.push(Gguf::parse(&file.bytes).map_err(|e| {
            kind::not_gguf(path, &file.bytes).unwrap_or_else(|| gguf_error(path, &e))
        })?);
    }
    check_parts(&parsed, &paths)?;
    // The first part has the metadata of the model.
    let first = &parsed[0];
    let within = |e: Error| match e {
        Error::Invalid { what } => Error::invalid(format!("{}: {what}", source.display())),
        Error::Unsupported { what } => Error::unsupported(format!("{}: {what}", source.display())),
        other => other,
    };
    let mut stored = BTreeMap::new();
    for (file, part) in files.iter().zip(&parsed) {
        for tensor in part.tensors() {
            add(&mut stored, tensor.name(), stored_tensor(file, tensor)).map_err(within)?;
        }
    }
    let architecture = architecture(first).map_err(within)?;
    let divisors = rope_divisors(&stored).map_err(within)?;
    let config = config_json(first, architecture, &stored, divisors).map_err(within)?;
    let Config { family, mut spec, mut tokens } = parse_config(&config).map_err(within)?;
    if architecture.norms_include_one {
        spec.norm_kind = NormKind::Rms;
    }
    let weights = weights(&stored, &spec, architecture).map_err(within)?;
    let texts = GgufTexts::read(first).map_err(within)?;
    (tokens.bos, tokens.eos) = (texts.bos, texts.eos);
    Ok(Checkpoint {
        source: source.to_owned(),
        family,
        spec,
        tokens,
        config,
        generation_config: texts.generation_config,
        tokenizer: texts.tokenizer,
        tokenizer_config: texts.tokenizer_config,
        chat_template: texts.chat_template,
        license: texts.license,
        files,
        weights,
        owned: BTreeMap::new().into(),
    })
}

fn gguf_error(path: &Path, error: &GgufError) -> Error {
    let what = format!("{}: {error}", path.display());
    match error.problem().class() {
        Class::Unsupported => Error::unsupported(what),
        Class::Invalid => Error::invalid(what),
    }
}

/// The files of `source`: itself, or all parts if its name ends with `-00001-of-00003.gguf` or the like.
fn parts(source: &Path) -> Result<Vec<PathBuf>> {
    let name = source.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Some((stem, count)) = split_name(name) else { return Ok(vec![source.to_owned()]) };
    let part = |i: u32| source.with_file_name(format!("{stem}-{i:05}-of-{count:05}.gguf"));
    let paths: Vec<PathBuf> = (1..=count).map(part).collect();
    let missing: Vec<String> = paths
        .iter()
        .filter(|path| !path.exists())
        .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    if missing.is_empty() {
        return Ok(paths);
    }
    let shown = missing.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(Error::invalid(format!(
        "{} is a part of a file that was split into {count}; {} missing: {shown}{}",
        source.display(),
        if missing.len() == 1 { "1 is".to_owned() } else { format!("{} are", missing.len()) },
        if missing.len() > 8 { ", …" } else { "" },
    )))
}

/// The part before the numbers, and the number of parts, in the name of a part.
fn split_name(name: &str) -> Option<(&str, u32)> {
    let name = name.strip_suffix(".gguf")?;
    let (name, count) = name.rsplit_once("-of-")?;
    let (stem, index) = name.rsplit_once('-')?;
    let number = |text: &str| {
        let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        if is_number { text.parse::<u32>().ok() } else { None }
    };
    let (index, count) = (number(index)?, number(count)?);
    (1..=count).contains(&index).then_some((stem, count))
}

/// Checks that `parts` are all parts of one file in their order.
fn check_parts(parts: &[Gguf<'_>], paths: &[PathBuf]) -> Result<()> {
    for (i, (part, path)) in parts.iter().zip(paths).enumerate() {
        let number = |key: &str| part.get(key).and_then(|value| value.as_u64());
        let count = number("split.count").unwrap_or(1).max(1);
        if count != parts.len() as u64 {
            return Err(Error::invalid(format!(
                "{} says that it is one of {count} parts; its name must end with \
                 -00001-of-{count:05}.gguf or the like, and all parts must be in one folder",
                path.display()
            )));
        }
        if number("split.no").unwrap_or(0) != i as u64 {
            let what = "is not the part that its name says (split.no)";
            return Err(Error::invalid(format!("{} {what}", path.display())));
        }
    }
    let total = parts[0].get("split.tensors.count").and_then(|value| value.as_u64());
    let found: usize = parts.iter().map(|part| part.tensors().len()).sum();
    match total {
        Some(total) if parts.len() > 1 && total != found as u64 => Err(Error::invalid(format!(
            "{}: the parts have {found} tensors, split.tensors.count is {total}",
            paths[0].display()
        ))),
        _ => Ok(()),
    }
}

fn stored_tensor(file: &SourceFile, tensor: &GgufTensor<'_>) -> StoredTensor {
    let (kind, range) = match tensor.payload() {
        Ok((kind, payload)) => {
            let start = payload.as_ptr().addr() - file.bytes.as_ptr().addr();
            let kind = kind.dense().map_or(StoredType::Gguf(kind), StoredType::Dense);
            (Ok(kind), start..start + payload.len())
        }
        Err(_) => {
            let known: Vec<&str> = GgufType::ALL.iter().map(|kind| kind.name()).collect();
            let id = tensor.type_id();
            (Err(format!("GGUF type {id}; supported are {}", known.join(", "))), 0..0)
        }
    };
    let shape = tensor.shape().to_vec();
    StoredTensor { bytes: file.bytes.clone(), range, kind, shape }
}

/// The divisors of RoPE's frequencies, if the file has them.
fn rope_divisors(stored: &BTreeMap<String, StoredTensor>) -> Result<RopeDivisors> {
    let plain = vector(stored, GGUF_ROPE_DIVISORS)?;
    match (vector(stored, GGUF_SHORT_FACTORS)?, vector(stored, GGUF_LONG_FACTORS)?) {
        (Some(short), Some(long)) => Ok(RopeDivisors::Long { short, long }),
        (None, None) => Ok(plain.map_or(RopeDivisors::None, RopeDivisors::Plain)),
        _ => Err(Error::invalid(format!(
            "the file has only one of the tensors {GGUF_SHORT_FACTORS} and {GGUF_LONG_FACTORS}"
        ))),
    }
}

/// The values of a dense vector; `None` if the file does not have it.
fn vector(stored: &BTreeMap<String, StoredTensor>, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = stored.get(name) else { return Ok(None) };
    let kind = match tensor.kind {
        Ok(StoredType::Dense(kind)) if tensor.shape.len() == 1 => kind,
        _ => return Err(Error::invalid(format!("tensor {name} is not a dense vector"))),
    };
    let bytes = tensor.bytes.get(tensor.range.clone()).unwrap_or_default();
    let mut values = vec![0.0; tensor.shape[0] as usize];
    let kind = stb_format::Encoding::Dense(kind);
    let view = kind
        .view(1, tensor.shape[0], bytes)
        .map_err(|e| Error::invalid(format!("tensor {name}: {e}")))?;
    view.decode_row(0, &mut values);
    Ok(Some(values))
}

/// The tensors of `spec`. Other tensors are an error, except for the divisors of RoPE and a copy of tied embeddings.
fn weights(
    stored: &BTreeMap<String, StoredTensor>,
    spec: &ModelSpec,
    architecture: &GgufArchitecture,
) -> Result<BTreeMap<String, Source>> {
    let mut weights = BTreeMap::new();
    let mut used = BTreeSet::from([GGUF_ROPE_DIVISORS, GGUF_SHORT_FACTORS, GGUF_LONG_FACTORS]);
    for tensor in spec.tensors() {
        let candidates = architecture.sources(spec, &tensor);
        let found = candidates.iter().find_map(|source| {
            stored.get_key_value(source.names.first()?).map(|found| (source, found))
        });
        let Some((source, (name, found))) = found else {
            let names: Vec<&str> =
                candidates.iter().flat_map(|s| &s.names).map(|n| &n[..]).collect();
            return Err(Error::invalid(format!("the file has no tensor {}", names.join(" or "))));
        };
        used.insert(name);
        let place = Place {
            shape: source.shape.clone(),
            first_row: source.first_row,
            transform: transform(&tensor, spec, architecture),
        };
        weights.insert(tensor.name.clone(), Source::new(name, found.clone(), &place, &tensor)?);
    }
    match stored.keys().find(|name| !used.contains(name.as_str())) {
        None => Ok(weights),
        Some(name) => Err(Error::unsupported(format!(
            "tensor {name} is not part of a {} model; dropping it would change the model",
            architecture.name
        ))),
    }
}

fn transform(tensor: &TensorSpec, spec: &ModelSpec, architecture: &GgufArchitecture) -> Transform {
    match tensor.role {
        Role::Linear(Linear::Q) | Role::Bias(Linear::Q) if architecture.interleaves_heads => {
            Transform::SplitHeads { heads: spec.heads }
        }
        Role::Linear(Linear::K) | Role::Bias(Linear::K) if architecture.interleaves_heads => {
            Transform::SplitHeads { heads: spec.kv_heads }
        }
        _ => Transform::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        assert_eq!(split_name("a-b-00002-of-00003.gguf"), Some(("a-b", 3)));
        for name in ["a.gguf", "a-00004-of-00003.gguf", "a-2-of-3.gguf", "a-00000-of-00003.gguf"] {
            assert_eq!(split_name(name), None, "{name}");
        }
    }
}
