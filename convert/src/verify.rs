//! Checks every rule and every checksum of a file.

use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use stb_format::ModelSpec;
use stb_runtime::{Bytes, Error, Result, open_stb_file};

use crate::inspect::inspect;

/// What a check of a file has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// True; a file that is not valid is an error.
    pub valid: bool,
    /// Whether the file is a model; otherwise it is a set of tensors.
    pub model: bool,
    /// Tensors.
    pub tensors: usize,
    /// Tensors of an encoding of a newer version, of which only the checksum was checked.
    pub unknown_encodings: usize,
}

/// Checks every rule of the format.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] with the first broken rule; [`Error::Invalid`] for a file of another kind.
pub fn verify_file(path: &Path) -> Result<Verified> {
    let bytes = Bytes::open(path, true)?;
    let fail = |e| Error::format(path, e);
    let file = open_stb_file(path, &bytes)?;
    file.verify_padding().map_err(fail)?;
    let check = |tensor: &stb_format::Tensor<'_>| {
        tensor.verify_checksum()?;
        tensor.verify_payload()
    };
    // The first failure in file order, whichever thread finds one first.
    let results: Vec<_> = file.tensors().par_iter().map(check).collect();
    results.into_iter().collect::<stb_format::Result<()>>().map_err(fail)?;
    let model = file.meta().get("model.architecture").is_some();
    if model {
        ModelSpec::from_file(&file).map_err(fail)?;
    }
    let unknown_encodings = inspect(&file).unknown_encodings(&file);
    Ok(Verified { valid: true, model, tensors: file.tensors().len(), unknown_encodings })
}
