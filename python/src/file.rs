//! An open `.stb` file: its metadata, and what its tensors are.

use std::ops::Range;
use std::path::{Path, PathBuf};

use stb_convert::export::{CheckpointLayout, checkpoint_layout};
use stb_convert::quality::QualityReport;
use stb_format::{Encoding, Quality, Value};
use stb_runtime::{Bytes, Error, Result, open_stb_file};

/// A mapped file.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub path: PathBuf,
    pub parameters: u64,
    pub true_bits: f64,
    pub quality: Option<QualityReport>,
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<TensorEntry>,
    bytes: Bytes,
}

/// A tensor in a file.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub name: String,
    pub shape: Vec<u64>,
    pub encoding: Encoding,
    pub bits: f64,
    /// The payload in the file.
    pub range: Range<usize>,
    /// Rows and columns.
    matrix: (u64, u64),
}

impl OpenFile {
    /// Maps a file, or reads it if `map` is not set, and checks its structure.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] with the broken rule, [`Error::Invalid`] for a file of another kind.
    pub fn open(path: &Path, map: bool) -> Result<Self> {
        let bytes = Bytes::open(path, map)?;
        let file = open_stb_file(path, &bytes)?;
        let quality = Quality::read(file.meta());
        let metadata = file.meta().iter().map(|(key, value)| (key.to_owned(), value.to_value()));
        let tensors = file.tensors().iter().map(|tensor| {
            let start = usize::try_from(tensor.offset()).unwrap_or(usize::MAX);
            TensorEntry {
                name: tensor.name().to_owned(),
                shape: tensor.shape().to_vec(),
                encoding: tensor.encoding().clone(),
                bits: tensor.stored_bits(),
                range: start..start.saturating_add(tensor.payload().len()),
                matrix: tensor.matrix_shape(),
            }
        });
        Ok(Self {
            path: path.to_owned(),
            parameters: file.parameters(),
            true_bits: file.true_bits(),
            quality: quality.as_ref().map(QualityReport::from),
            metadata: metadata.collect(),
            tensors: tensors.collect(),
            bytes,
        })
    }

    /// How a checkpoint of the model's family has the tensors.
    ///
    /// # Errors
    /// Those of [`checkpoint_layout`].
    pub fn layout(&self) -> Result<CheckpointLayout> {
        checkpoint_layout(&open_stb_file(&self.path, &self.bytes)?, &self.path)
    }

    /// The stored bytes of a tensor.
    pub fn payload(&self, tensor: &TensorEntry) -> &[u8] {
        self.bytes.get(tensor.range.clone()).unwrap_or_default()
    }

    /// The weights of a tensor, row-major.
    ///
    /// # Errors
    /// [`Error::Format`] for an encoding of a newer version.
    pub fn decode(&self, tensor: &TensorEntry) -> Result<Vec<f32>> {
        let (rows, cols) = tensor.matrix;
        let view = tensor.encoding.view(rows, cols, self.payload(tensor));
        let named = |e: stb_format::Error| Error::format(&self.path, e.in_tensor(&tensor.name));
        Ok(view.map_err(named)?.decode())
    }
}
