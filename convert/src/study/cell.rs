//! A finished measurement. Each has its own file, so that a study can be resumed.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stb_runtime::{Checkpoint, Error, Estimate, Result};

use crate::digest::hex;

/// Everything on which a measurement depends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellInputs {
    /// See [`fingerprint`].
    pub model_hash: String,
    /// The whole recipe as TOML.
    pub recipe: String,
    /// Name and SHA-256 of the calibration text; empty for recipes that need none.
    pub calibration: String,
    /// SHA-256 of the evaluation text.
    pub text_hash: String,
    /// The layout of the text; see [`stb_runtime::TextLayout::describe`].
    pub layout: String,
    /// Tokens per window.
    pub context: usize,
    /// The most windows.
    pub windows: Option<usize>,
}

impl CellInputs {
    /// The path of the measurement's file in `folder`.
    #[must_use]
    pub fn file(&self, folder: &Path) -> PathBuf {
        let mut hash = Sha256::new();
        let windows = self.windows.map_or("all".into(), |n| n.to_string());
        let context = self.context.to_string();
        let parts = [
            &self.model_hash,
            &self.recipe,
            &self.calibration,
            &self.text_hash,
            &self.layout,
            &context,
            &windows,
        ];
        for part in parts {
            // Lengths make the concatenation unambiguous.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        folder.join(format!("{}.json", &hex(&hash.finalize())[..24]))
    }
}

/// A mean with its standard error, as stored; an unknown error is `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The mean.
    pub value: f64,
    /// One standard error over windows.
    pub standard_error: Option<f64>,
}

impl From<Estimate> for Measured {
    fn from(e: Estimate) -> Self {
        let standard_error = Some(e.standard_error).filter(|e| e.is_finite());
        Self { value: e.value, standard_error }
    }
}

/// A finished measurement: one model, one recipe, one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Everything on which it depends.
    pub inputs: CellInputs,
    /// The build that measured it.
    pub build: String,
    /// The instruction set it ran on.
    pub isa: String,
    /// Model parameters.
    pub parameters: u64,
    /// Bytes of the converted file.
    pub file_bytes: u64,
    /// 8 × file bytes ÷ parameters.
    pub true_bits: f64,
    /// Stored bits per weight of the decoder's linear layers.
    pub body_bits: f64,
    /// (1 + share of salient columns) · N/8, as the paper counts; not what is stored.
    pub nominal_bits_paper: Option<f64>,
    /// Seconds of conversion.
    pub convert_seconds: f64,
    /// Seconds of evaluation, of model and checkpoint.
    pub evaluate_seconds: f64,
    /// Windows used.
    pub windows: usize,
    /// Tokens of the text.
    pub tokens: usize,
    /// exp of the mean loss.
    pub perplexity: Measured,
    /// The perplexity of the dense checkpoint.
    pub dense_perplexity: Measured,
    /// Loss minus the loss of the checkpoint, nats per token.
    pub nll_difference: Measured,
    /// KL(checkpoint ‖ model), nats per token.
    pub kl: Measured,
    /// Share of tokens with the same best prediction.
    pub top1: Measured,
}

impl Cell {
    /// Loads the measurement in `path`; `None` if it does not exist, is damaged or has other inputs.
    ///
    /// # Errors
    /// [`Error::Io`] if the file exists and cannot be read.
    pub fn load(path: &Path, inputs: &CellInputs) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        let cell: Option<Self> = serde_json::from_str(&text).ok();
        Ok(cell.filter(|cell| cell.inputs == *inputs))
    }

    /// Writes the measurement atomically.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn store(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Internal { what: e.to_string() })?;
        write_whole(path, &(json + "\n"))
    }
}

/// Writes a file atomically; replaces an existing one.
///
/// # Errors
/// [`Error::Io`].
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let fail = |e: std::io::Error| Error::io(path, e);
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(".partial");
    // Temporary files are private by default; the system applies the umask to these permissions.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

/// A hash of all parts of a checkpoint that a conversion reads.
#[must_use]
pub fn fingerprint(checkpoint: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    hash.update(checkpoint.config.as_bytes());
    for text in [
        &checkpoint.tokenizer,
        &checkpoint.tokenizer_config,
        &checkpoint.generation_config,
        &checkpoint.chat_template,
    ] {
        hash.update([0, u8::from(text.is_some())]);
        hash.update(text.as_deref().unwrap_or_default().as_bytes());
    }
    for file in &checkpoint.files {
        hash.update(file.name.as_bytes());
        hash.update(stb_format::checksum(&file.bytes).to_le_bytes());
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> CellInputs {
        CellInputs {
            model_hash: "m".into(),
            recipe: "r".into(),
            calibration: String::new(),
            text_hash: "t".into(),
            layout: "one document".into(),
            context: 256,
            windows: None,
        }
    }

    #[test]
    fn every_input_is_part_of_the_name() {
        let folder = Path::new("x");
        let changes: [fn(&mut CellInputs); 7] = [
            |i| i.model_hash.push('1'),
            |i| i.recipe.push('1'),
            |i| i.calibration.push('1'),
            |i| i.text_hash.push('1'),
            |i| i.layout.push('1'),
            |i| i.context += 1,
            |i| i.windows = Some(1),
        ];
        let mut names = std::collections::BTreeSet::from([inputs().file(folder)]);
        for change in changes {
            let mut inputs = inputs();
            change(&mut inputs);
            assert!(names.insert(inputs.file(folder)));
        }
        assert_eq!(inputs().file(folder), inputs().file(folder));
    }

    #[test]
    fn cells_survive_and_damaged_ones_count_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.json");
        let value = Measured { value: 0.1 + 0.2, standard_error: None };
        let cell = Cell {
            inputs: inputs(),
            build: "b".into(),
            isa: "scalar".into(),
            parameters: 1,
            file_bytes: 2,
            true_bits: 16.0,
            body_bits: 3.0,
            nominal_bits_paper: None,
            convert_seconds: 0.1,
            evaluate_seconds: 0.2,
            windows: 1,
            tokens: 9,
            perplexity: value,
            dense_perplexity: value,
            nll_difference: value,
            kl: value,
            top1: value,
        };
        assert_eq!(Cell::load(&path, &inputs()).unwrap(), None);
        cell.store(&path).unwrap();
        assert_eq!(Cell::load(&path, &inputs()).unwrap(), Some(cell));
        let other = CellInputs { context: 3, ..inputs() };
        assert_eq!(Cell::load(&path, &other).unwrap(), None);
        let bytes = std::fs::read(&path).unwrap();
        for damaged in [&bytes[..bytes.len() / 2], b"\xff\xfe", b""] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(Cell::load(&path, &inputs()).unwrap(), None);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
