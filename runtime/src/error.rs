//! Errors, their kinds, and the exit codes of the programs.

use std::path::{Path, PathBuf};

/// The result of runtime operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the runtime. Messages include a remedy if there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// A file is not a valid `.stb` file, or needs a newer version.
    #[error("{}: {error}{}", path.display(), advice(error.rule()))]
    Format {
        /// The file.
        path: PathBuf,
        /// The broken rule, with offset and tensor.
        error: stb_format::Error,
    },
    /// A checkpoint, configuration, tokenizer or template has invalid content.
    #[error("{what}")]
    Invalid {
        /// The problem and its remedy.
        what: String,
    },
    /// The content may be valid, but this version does not support it.
    #[error("{what}")]
    Unsupported {
        /// The missing feature and its remedy.
        what: String,
    },
    /// The request is wrong: an invalid option, or a prompt that is too long.
    #[error("{what}")]
    Usage {
        /// The problem and its remedy.
        what: String,
    },
    /// A device cannot be used, or failed.
    #[error("{error}")]
    Device {
        /// The error of the device.
        error: stb_kernels::cuda::Error,
    },
    /// The caller has stopped the work.
    #[error("interrupted")]
    Interrupted,
    /// A bug in this crate.
    #[error("internal error: {what}; please report it")]
    Internal {
        /// The violated assumption.
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

    /// An [`Error::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    /// An [`Error::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }

    /// The kind of the error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage { .. } => ErrorKind::Usage,
            Self::Io { .. } => ErrorKind::Io,
            Self::Format { error, .. } => match error.rule().class() {
                stb_format::Class::Invalid => ErrorKind::Invalid,
                stb_format::Class::Unsupported => ErrorKind::Unsupported,
            },
            Self::Invalid { .. } => ErrorKind::Invalid,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Device { error } => match error {
                stb_kernels::cuda::Error::Compile { .. }
                | stb_kernels::cuda::Error::Driver { .. } => ErrorKind::DeviceFailed,
                _ => ErrorKind::DeviceUnavailable,
            },
            Self::Interrupted => ErrorKind::Interrupted,
            Self::Internal { .. } => ErrorKind::Internal,
        }
    }

    /// The exit code of `stb-run` and `stb-convert` for this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.kind().exit_code()
    }
}

/// Kinds of errors. Each has an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is wrong.
    Usage,
    /// A file cannot be read or written.
    Io,
    /// A file has invalid content.
    Invalid,
    /// This version does not support the content.
    Unsupported,
    /// The device does not exist, or lacks memory or a feature.
    DeviceUnavailable,
    /// A device failed.
    DeviceFailed,
    /// The caller has stopped the work.
    Interrupted,
    /// A bug in this crate.
    Internal,
}

impl ErrorKind {
    /// The exit code of the programs (documented in the README).
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Internal | Self::DeviceFailed => 1,
            Self::Usage => 2,
            Self::Io => 3,
            Self::Invalid => 4,
            Self::Unsupported | Self::DeviceUnavailable => 5,
            Self::Interrupted => 130,
        }
    }

    /// Whether a missing device or feature caused the error, so that the CPU may be used instead.
    #[must_use]
    pub fn is_unsupported(self) -> bool {
        matches!(self, Self::Unsupported | Self::DeviceUnavailable)
    }
}

impl From<stb_kernels::cuda::Error> for Error {
    fn from(error: stb_kernels::cuda::Error) -> Self {
        Self::Device { error }
    }
}

/// What to do about a file that breaks `rule`.
fn advice(rule: stb_format::Rule) -> &'static str {
    use stb_format::Rule;
    match rule {
        Rule::HeadLength
        | Rule::HeadChecksum
        | Rule::FileSize
        | Rule::SectionChecksum
        | Rule::TensorChecksum => "; the file is damaged or incomplete: download or copy it again",
        _ => "",
    }
}

/// The exit code for an error of any type: the code of the first error in its chain of sources that has
/// one, else 1.
#[must_use]
pub fn exit_code(error: &(dyn std::error::Error + 'static)) -> u8 {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<Error>() {
            return error.exit_code();
        }
        if error.is::<std::io::Error>() {
            return ErrorKind::Io.exit_code();
        }
        next = error.source();
    }
    ErrorKind::Internal.exit_code()
}
