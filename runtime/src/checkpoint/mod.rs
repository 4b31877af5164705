//! Checkpoints, the models that conversions start from: folders in the Hugging Face layout and GGUF files.

mod folder;
mod gguf;
mod gguf_config;
mod gguf_texts;
mod hub;
mod license;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stb_format::ModelSpec;
use stb_format::arch::Family;
use stb_format::encoding::{Dense, Encoding};

use crate::config::TokenConfig;
use crate::error::{Error, Result};
use crate::map::Bytes;
use crate::weights::Weight;
use source::Source;

pub use gguf_texts::gguf_vocabulary;
pub(crate) use hub::resolve;

/// An open checkpoint: validated configuration, weights in place, and texts. The texts of a GGUF file are what
/// its metadata say in the files of the Hugging Face layout.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder or the GGUF file.
    pub source: PathBuf,
    /// The family, which reads the configuration.
    pub family: &'static Family,
    /// The architecture.
    pub spec: ModelSpec,
    /// Token ids from `config.json` and `generation_config.json`.
    pub tokens: TokenConfig,
    /// The text of `config.json`.
    pub config: String,
    /// The text of `generation_config.json`, if it exists.
    pub generation_config: Option<String>,
    /// The text of `tokenizer.json`, or one that is built from the vocabulary of a GGUF file or from the other
    /// files of a tokenizer, if there are any.
    pub tokenizer: Option<String>,
    /// The text of `tokenizer_config.json`, if it exists.
    pub tokenizer_config: Option<String>,
    /// The chat template.
    pub chat_template: Option<String>,
    /// The license of the weights as an SPDX expression, if the card of the model or the GGUF file names one.
    pub license: Option<String>,
    /// The weight files.
    pub files: Vec<SourceFile>,
    weights: BTreeMap<String, Source>,
    /// Weights that are not in place and in use: a second request gets the same memory.
    owned: Mutex<BTreeMap<String, Weak<Bytes>>>,
}

/// A weight file of a checkpoint.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// The file name without the folder.
    pub name: String,
    /// The content.
    pub bytes: Arc<Bytes>,
}

impl Checkpoint {
    /// Opens `source`: a folder, a `.safetensors` file, an index of shards, or a `.gguf` file, of which any part
    /// of a split one stands for all. A path that does not exist may be the id of a model, `owner/name`, in the
    /// cache of the Hugging Face hub. With `map`, weight files are mapped instead of read.
    ///
    /// # Errors
    /// [`Error::Io`] for unreadable files; [`Error::Invalid`] for broken files and for tensors that
    /// are missing or contradict the configuration; [`Error::Unsupported`] for unknown architectures,
    /// element types and tensors.
    pub fn open(source: &Path, map: bool) -> Result<Self> {
        let source = &*resolve(source)?;
        if Self::is_gguf(source) { gguf::open(source, map) } else { folder::open(source, map) }
    }

    /// Whether `path` has the name of a checkpoint: a folder, or a file with a known ending.
    #[must_use]
    pub fn is_checkpoint(path: &Path) -> bool {
        let ending = |e: &std::ffi::OsStr| e == "safetensors" || e == "json";
        path.is_dir() || path.extension().is_some_and(ending) || Self::is_gguf(path)
    }

    fn is_gguf(path: &Path) -> bool {
        !path.is_dir() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    }

    /// The weight called `name`, dense: in place if the file stores it so, else in memory of its own, which lasts
    /// as long as the weight or a clone of it. A vector is a matrix of one row.
    ///
    /// # Errors
    /// [`Error::Internal`] if the architecture has no such tensor. [`Checkpoint::open`] checks that
    /// all others exist.
    pub fn weight(&self, name: &str) -> Result<Weight> {
        let source = self.source_of(name)?;
        if source.is_in_place() {
            return source.load();
        }
        let mut owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = owned.get(name).and_then(Weak::upgrade) {
            let (rows, cols) = source.matrix_shape();
            let range = 0..bytes.len();
            return Weight::new(bytes, range, Encoding::Dense(source.kind()), rows, cols);
        }
        drop(owned);
        let weight = source.load()?;
        owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
        owned.insert(name.to_owned(), Arc::downgrade(weight.shared_bytes()));
        Ok(weight)
    }

    /// The element type of the weight called `name`, without loading it.
    ///
    /// # Errors
    /// [`Error::Internal`] if the architecture has no such tensor.
    pub fn element_type(&self, name: &str) -> Result<Dense> {
        self.source_of(name).map(Source::kind)
    }

    /// Bytes of memory that all weights take together; those in place take none.
    #[must_use]
    pub fn owned_bytes(&self) -> u64 {
        self.weights.values().map(Source::owned_bytes).sum()
    }

    /// Like [`Checkpoint::owned_bytes`], with one decoder layer at a time.
    #[must_use]
    pub fn owned_bytes_by_layer(&self) -> u64 {
        let (mut outside, mut layers) = (0, BTreeMap::new());
        for tensor in self.spec.tensors() {
            let bytes = self.weights.get(&tensor.name).map_or(0, Source::owned_bytes);
            match tensor.layer {
                Some(layer) => *layers.entry(layer).or_insert(0) += bytes,
                None => outside += bytes,
            }
        }
        outside + layers.into_values().max().unwrap_or(0)
    }

    fn source_of(&self, name: &str) -> Result<&Source> {
        let missing = || Error::Internal { what: format!("no tensor {name}") };
        self.weights.get(name).ok_or_else(missing)
    }
}
