//! Export to safetensors: dequantized weights with their configuration and tokenizer, for other frameworks.

use std::borrow::Cow;
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::View;
use stb_format::encoding::Dense;
use stb_format::{File, Tensor};
use stb_runtime::{Error, Result};

/// A tensor that is decoded when it is written, so that only one is in memory.
struct Decoded<'a> {
    tensor: &'a Tensor<'a>,
    shape: Vec<usize>,
    kind: Dense,
}

impl View for &Decoded<'_> {
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
        // `export` has made sure that every tensor can be decoded.
        let Ok(view) = self.tensor.view() else { return Cow::Borrowed(&[]) };
        let mut values = vec![0.0; view.rows() * view.cols()];
        let rows = values.par_chunks_exact_mut(view.cols()).enumerate();
        rows.for_each(|(r, row)| view.decode_row(r, row));
        Cow::Owned(self.kind.encode(&values))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.kind.bytes() as usize
    }
}

/// Writes `model.safetensors`, `config.json` and tokenizer files of an open file into `folder`,
/// which must not exist yet or be empty.
///
/// # Errors
/// [`Error::Usage`] if the folder is in use, [`Error::Format`] for tensors of unknown encoding,
/// [`Error::Io`].
pub fn export(file: &File<'_>, source: &Path, folder: &Path, kind: Dense) -> Result<()> {
    for tensor in file.tensors() {
        tensor.view().map_err(|e| Error::format(source, e))?;
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let mut entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    if entries.next().is_some() {
        return Err(Error::usage(format!("{} is not empty; give a new folder", folder.display())));
    }
    let decoded: Vec<Decoded<'_>> = file
        .tensors()
        .iter()
        .map(|tensor| {
            let shape = tensor.shape().iter().map(|d| *d as usize).collect();
            Decoded { tensor, shape, kind }
        })
        .collect();
    let weights = folder.join("model.safetensors");
    let format = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(
        decoded.iter().map(|d| (d.tensor.name(), d)),
        Some(format),
        &weights,
    )
    .map_err(|e| Error::io(&weights, std::io::Error::other(e.to_string())))?;
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
    if let Some(config) = file.meta().text("source.config.json") {
        write(&folder.join("config.json"), &with_dtype(config, kind)?)?;
    }
    Ok(())
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
