//! Errors by who can act on them, with the exit codes of the programs.

use std::path::{Path, PathBuf};

/// The result of runtime operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Messages say what to do where something can be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file is not a valid `.stb` file, or not one that this version can use.
    #[error("{}: {error}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The rule that is broken, with offset and tensor.
        error: stb_format::Error,
    },
    /// A file has the wrong content: a checkpoint, configuration, tokenizer or template.
    #[error("{what}")]
    Invalid {
        /// What is wrong, and what to do.
        what: String,
    },
    /// The content is fine, but this version has no support for it.
    #[error("{what}")]
    Unsupported {
        /// What is not supported, and what to do.
        what: String,
    },
    /// The request makes no sense: wrong option, prompt too long.
    #[error("{what}")]
    Usage {
        /// What to change.
        what: String,
    },
    /// A device cannot be used, or failed.
    #[error("{error}")]
    Device {
        /// What is wrong, and what to do.
        error: stb_kernels::cuda::Error,
    },
    /// Something that should not happen.
    #[error("internal error: {what}; please report it")]
    Internal {
        /// What happened.
        what: String,
    },
}

impl Error {
    /// An I/O error with its file.
    pub fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    /// A format error with its file.
    pub fn format(path: &Path, error: stb_format::Error) -> Self {
        Self::Format { path: path.to_owned(), error }
    }

    /// Wrong content.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// Missing support.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    /// A request that makes no sense.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }

    /// The exit code of the programs for this error (documented in the README).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Io { .. } => 3,
            Self::Format { error, .. } => match error.rule().class() {
                stb_format::Class::Invalid => 4,
                stb_format::Class::Unsupported => 5,
            },
            Self::Invalid { .. } => 4,
            Self::Unsupported { .. } => 5,
            Self::Device { error } => match error {
                stb_kernels::cuda::Error::Compile { .. }
                | stb_kernels::cuda::Error::Driver { .. } => 1,
                _ => 5,
            },
            Self::Internal { .. } => 1,
        }
    }
}

impl From<stb_kernels::cuda::Error> for Error {
    fn from(error: stb_kernels::cuda::Error) -> Self {
        Self::Device { error }
    }
}

/// The exit code for any error that reaches `main`.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(error) = error.downcast_ref::<Error>() {
        return error.exit_code();
    }
    match error.downcast_ref::<std::io::Error>() {
        Some(_) => 3,
        None => 1,
    }
}
