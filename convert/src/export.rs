//! Export to safetensors: dequantized weights with their configuration and tokenizer, for other frameworks. Names
//! and layouts are those of the checkpoint that the file was made from.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::View;
use serde::Serialize;
use stb_format::arch::{NormKind, Role};
use stb_format::encoding::Dense;
use stb_format::{File, ModelSpec, Tensor};
use stb_runtime::{Config, Error, Result, parse_config};

/// A tensor of the export. It is decoded when it is written, so that only one is in memory.
struct Exported<'a> {
    shape: Vec<usize>,
    kind: Dense,
    /// The tensors of the file that it consists of. What they leave out is 0.
    pieces: Vec<Piece<'a>>,
}

/// A tensor of the file within a tensor of the export.
struct Piece<'a> {
    tensor: &'a Tensor<'a>,
    /// The first row, or element of a vector; the first column if it is transposed.
    first: usize,
    is_transposed: bool,
    /// What the family's norms add to the weight, if the file's weights include it, as those from GGUF do.
    included: f32,
}

impl Exported<'_> {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Piece<'_> {
    fn describe(&self) -> LayoutPiece {
        LayoutPiece {
            tensor: self.tensor.name().to_owned(),
            first: self.first,
            is_transposed: self.is_transposed,
            included: self.included,
        }
    }

    /// Decodes the tensor into `out`, the tensor of the export, whose rows have `width` elements.
    fn decode(&self, width: usize, out: &mut [f32]) {
        // `export` has made sure that every tensor can be decoded.
        let Ok(view) = self.tensor.view() else { return };
        let mut values = vec![0.0; view.rows() * view.cols()];
        let rows = values.par_chunks_exact_mut(view.cols()).enumerate();
        rows.for_each(|(r, row)| {
            view.decode_row(r, row);
            row.iter_mut().for_each(|v| *v -= self.included);
        });
        if self.is_transposed {
            for (r, row) in values.chunks_exact(view.cols()).enumerate() {
                for (value, out) in row.iter().zip(out.chunks_exact_mut(width)) {
                    out[self.first + r] = *value;
                }
            }
        } else {
            let start = self.first * if self.tensor.shape().len() == 1 { 1 } else { width };
            out[start..start + values.len()].copy_from_slice(&values);
        }
    }
}

impl View for &Exported<'_> {
    fn dtype(&self) -> Dtype {
        match self.kind {
            Dense::F32 => Dtype::F32,
            Dense::F16 => Dtype::F16,
            Dense::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut values = vec![0.0; self.elements()];
        let width = self.shape.last().copied().unwrap_or(1);
        self.pieces.iter().for_each(|piece| piece.decode(width, &mut values));
        Cow::Owned(self.kind.encode(&values))
    }

    fn data_len(&self) -> usize {
        self.elements() * self.kind.bytes() as usize
    }
}

/// How a checkpoint of the family has the tensors of a file: what a program needs to fill another program's model
/// with the tensors as they are packed.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointLayout {
    /// The `config.json` of the language model.
    pub config: String,
    /// The tensors of the checkpoint, in the order of their names.
    pub tensors: Vec<LayoutTensor>,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutTensor {
    /// Its name there.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// The tensors of the file that it consists of, by their first rows.
    pub pieces: Vec<LayoutPiece>,
}

/// A tensor of a file within one of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutPiece {
    /// Its name in the file.
    pub tensor: String,
    /// The first row, or element of a vector; the first column if it is transposed.
    pub first: usize,
    /// Whether the checkpoint has it transposed.
    pub is_transposed: bool,
    /// What the family's norms add to the weight, if the file's weights include it.
    pub included: f32,
}

/// The layout of the tensors of an open file in a checkpoint of its family.
///
/// # Errors
/// [`Error::Unsupported`] for a file without the `config.json` of a checkpoint, or with one that is not that of its
/// tensors; [`Error::Format`] for a file that is no model.
pub fn checkpoint_layout(file: &File<'_>, source: &Path) -> Result<CheckpointLayout> {
    let config = file.meta().text("source.config.json").ok_or_else(|| {
        let what = "has no config.json of the original model: convert the original model again";
        Error::unsupported(format!("{} {what}", source.display()))
    })?;
    let config = text_config(config)?;
    let spec = ModelSpec::from_file(file).map_err(|e| Error::format(source, e))?;
    let layout = in_layout_of(&parse_config(&config)?, &spec, file, Dense::F32)?;
    let tensors = layout.into_iter().map(|(name, tensor)| {
        let mut pieces: Vec<_> = tensor.pieces.iter().map(Piece::describe).collect();
        pieces.sort_by_key(|piece| piece.first);
        LayoutTensor { name, shape: tensor.shape, pieces }
    });
    Ok(CheckpointLayout { tensors: tensors.collect(), config })
}

/// Writes `model.safetensors`, `config.json` and tokenizer files of an open file into `folder`,
/// which must not exist yet or be empty. A file without the `config.json` of a checkpoint keeps the names of its
/// tensors.
///
/// # Errors
/// [`Error::Usage`] if the folder is in use, [`Error::Format`] for tensors of unknown encoding,
/// [`Error::Unsupported`] if the `config.json` in the file is not that of its tensors, [`Error::Io`].
pub fn export(file: &File<'_>, source: &Path, folder: &Path, kind: Dense) -> Result<()> {
    for tensor in file.tensors() {
        tensor.view().map_err(|e| Error::format(source, e))?;
    }
    let config = file.meta().text("source.config.json").map(text_config).transpose()?;
    let is_model = file.meta().get("model.architecture").is_some();
    let exported = match &config {
        Some(config) if is_model => {
            let spec = ModelSpec::from_file(file).map_err(|e| Error::format(source, e))?;
            in_layout_of(&parse_config(config)?, &spec, file, kind)?
        }
        _ => file.tensors().iter().map(|tensor| whole(tensor, kind)).collect(),
    };
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let mut entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    if entries.next().is_some() {
        return Err(Error::usage(format!("{} is not empty; give a new folder", folder.display())));
    }
    let weights = folder.join("model.safetensors");
    // `serialize_to_file` writes a private file; this one gets the permissions of any new file.
    let permissions = std::fs::File::create(&weights)
        .and_then(|file| file.metadata())
        .map_err(|e| Error::io(&weights, e))?
        .permissions();
    let format = [("format".to_owned(), "pt".to_owned())].into();
    let tensors = exported.iter().map(|(name, tensor)| (name, tensor));
    safetensors::serialize_to_file(tensors, Some(format), &weights)
        .map_err(|e| Error::io(&weights, std::io::Error::other(e.to_string())))?;
    std::fs::set_permissions(&weights, permissions).map_err(|e| Error::io(&weights, e))?;
    for (key, name) in [
        ("source.generation_config.json", "generation_config.json"),
        ("source.tokenizer_config.json", "tokenizer_config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer.chat_template", "chat_template.jinja"),
    ] {
        if let Some(text) = file.meta().text(key) {
            write(&folder.join(name), text)?;
        }
    }
    if let Some(config) = config {
        write(&folder.join("config.json"), &with_dtype(&config, kind)?)?;
    }
    Ok(())
}

/// A tensor under its own name.
fn whole<'a>(tensor: &'a Tensor<'a>, kind: Dense) -> (String, Exported<'a>) {
    let shape = tensor.shape().iter().map(|d| *d as usize).collect();
    let pieces = vec![Piece { tensor, first: 0, is_transposed: false, included: 0.0 }];
    (tensor.name().to_owned(), Exported { shape, kind, pieces })
}

/// The tensors of a model with the names and layouts of its family, in the order of the names.
fn in_layout_of<'a>(
    config: &Config,
    spec: &ModelSpec,
    file: &'a File<'a>,
    kind: Dense,
) -> Result<Vec<(String, Exported<'a>)>> {
    let stored: HashMap<&str, &Tensor<'_>> = file.tensors().iter().map(|t| (t.name(), t)).collect();
    let mut exported = BTreeMap::new();
    for wanted in spec.tensors() {
        // `ModelSpec::from_file` has made sure that the file has all tensors.
        let Some(tensor) = stored.get(&*wanted.name) else { continue };
        let layout = config.family.source(spec, &wanted).ok_or_else(|| {
            let (family, name) = (config.family.name(), &wanted.name);
            Error::unsupported(format!(
                "a {family} model, of which source.config.json is, has no {name}"
            ))
        })?;
        let name = layout.names.into_iter().next().unwrap_or(wanted.name);
        let shape = layout.shape.iter().map(|d| *d as usize).collect();
        let whole =
            exported.entry(name).or_insert_with(|| Exported { shape, kind, pieces: Vec::new() });
        let (first, is_transposed) = (layout.first_row as usize, layout.is_transposed);
        let kinds = (config.spec.norm_kind, spec.norm_kind, wanted.role);
        let included = match kinds {
            (NormKind::RmsPlusOne, NormKind::Rms, Role::Norm(_)) => 1.0,
            _ => 0.0,
        };
        whole.pieces.push(Piece { tensor, first, is_transposed, included });
    }
    Ok(exported.into_iter().collect())
}

/// The part of a `config.json` that describes the language model. Only this part of a model with vision is in the
/// file.
pub(crate) fn text_config(config: &str) -> Result<String> {
    let json: serde_json::Value = serde_json::from_str(config)
        .map_err(|e| Error::invalid(format!("source.config.json: {e}")))?;
    Ok(json.get("text_config").map_or_else(|| config.to_owned(), serde_json::Value::to_string))
}

/// The data type of the checkpoint that a file was made from, by its `config.json`; f32 if it does not say.
#[must_use]
pub fn source_type(file: &File<'_>) -> Dense {
    let config = file.meta().text("source.config.json").and_then(|text| text_config(text).ok());
    let json = config.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    let name = json.as_ref().and_then(|json| json.get("dtype").or_else(|| json.get("torch_dtype")));
    match name.and_then(serde_json::Value::as_str) {
        Some("float16") => Dense::F16,
        Some("bfloat16") => Dense::Bf16,
        _ => Dense::F32,
    }
}

/// The configuration with the data type of the exported weights, to which loaders cast.
fn with_dtype(config: &str, kind: Dense) -> Result<String> {
    let mut json: serde_json::Value = serde_json::from_str(config)
        .map_err(|e| Error::invalid(format!("config.json in the file: {e}")))?;
    let name = match kind {
        Dense::F32 => "float32",
        Dense::F16 => "float16",
        Dense::Bf16 => "bfloat16",
    };
    if let Some(fields) = json.as_object_mut() {
        let newer = fields.contains_key("dtype");
        fields.insert(if newer { "dtype" } else { "torch_dtype" }.into(), name.into());
    }
    serde_json::to_string_pretty(&json).map_err(|e| Error::Internal { what: e.to_string() })
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| Error::io(path, e))
}
