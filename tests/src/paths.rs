//! Paths that the tests use.

use std::path::{Path, PathBuf};

/// The root of the repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository")
}

/// The bundled model.
#[must_use]
pub fn quill() -> PathBuf {
    root().join("tests/models/quill-4m")
}

/// A file of the material next to the repository on development machines. Tests that need such a file are
/// skipped without it.
#[must_use]
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = root().parent()?.join("shared").join(path);
    path.exists().then_some(path)
}
