//! Errors of GGUF files: the problem, the place in the file, and the key or tensor.

use std::fmt;

use crate::error::Class;

/// What is wrong with a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgufProblem {
    /// The file does not start with `GGUF`.
    Magic,
    /// The file is big-endian.
    ByteOrder,
    /// The version is not 2 or 3.
    Version,
    /// The file ends inside what it announces.
    Truncated,
    /// A count exceeds what the rest of the file can hold.
    Count,
    /// A text is not UTF-8.
    Text,
    /// A key or a tensor name is empty or too long.
    Name,
    /// A key or a tensor appears twice.
    Duplicate,
    /// The type of a metadata value is unknown.
    ValueType,
    /// A boolean is neither 0 nor 1, or arrays are nested too deeply.
    Value,
    /// The alignment of tensors is not a power of two.
    Alignment,
    /// The dimensions of a tensor are impossible, or do not consist of whole blocks of its type.
    Dimensions,
    /// A tensor does not start at a multiple of the alignment, or ends outside the file.
    Range,
    /// Two tensors share bytes.
    Overlap,
    /// The type of a tensor that is needed is unknown.
    TensorType,
}

impl GgufProblem {
    /// The kind of failure.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            Self::ByteOrder | Self::Version | Self::TensorType => Class::Unsupported,
            _ => Class::Invalid,
        }
    }
}

/// A problem with a description, and the offset in the file and the key or tensor if known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufError {
    problem: GgufProblem,
    offset: Option<u64>,
    subject: Option<String>,
    detail: String,
}

impl GgufError {
    pub(super) fn new(problem: GgufProblem, detail: impl Into<String>) -> Self {
        Self { problem, offset: None, subject: None, detail: detail.into() }
    }

    /// Adds the offset in the file in bytes, unless the error has one.
    pub(super) fn at(mut self, offset: u64) -> Self {
        self.offset.get_or_insert(offset);
        self
    }

    /// Adds the key or tensor, such as `tensor output.weight`, unless the error has one.
    pub(super) fn of(mut self, subject: impl Into<String>) -> Self {
        self.subject.get_or_insert(subject.into());
        self
    }

    /// The problem.
    #[must_use]
    pub fn problem(&self) -> GgufProblem {
        self.problem
    }

    /// The offset in the file in bytes, if known.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(subject) = &self.subject {
            write!(f, "{subject}: ")?;
        }
        f.write_str(&self.detail)?;
        match self.offset {
            Some(offset) => write!(f, " (at byte {offset})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for GgufError {}
