//! Errors with the broken rule of the spec, the offset and the tensor.

use std::fmt;

/// The kind of failure that a broken rule means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The file breaks the format: damaged, truncated or written by a faulty program.
    Invalid,
    /// The file may be valid, but this reader cannot use it: a newer version, an unknown encoding or
    /// an unknown architecture.
    Unsupported,
}

macro_rules! rules {
    ($($name:ident $id:literal $class:ident $title:literal,)*) => {
        /// The rules of the spec that a file can break.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Rule {
            $(#[doc = concat!($id, ": ", $title, ".")] $name,)*
        }

        impl Rule {
            /// Every rule, in the order of the spec.
            pub const ALL: &'static [Rule] = &[$(Rule::$name),*];

            /// The id in the spec and in the manifest of test vectors.
            #[must_use]
            pub fn id(self) -> &'static str {
                match self { $(Rule::$name => $id,)* }
            }

            /// The requirement in one sentence.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Rule::$name => $title,)* }
            }

            /// The kind of failure that breaking the rule means.
            #[must_use]
            pub fn class(self) -> Class {
                match self { $(Rule::$name => Class::$class,)* }
            }
        }
    };
}

rules! {
    HeadLength "STB-R-001" Invalid "a file holds at least the 4096 bytes of its head",
    Magic "STB-R-002" Invalid "a file starts with the magic bytes",
    MinReader "STB-R-003" Unsupported "the reader supports the minimum reader version",
    HeadChecksum "STB-R-004" Invalid "the head matches its checksum",
    HeadFields "STB-R-005" Invalid "header size, entry size and versions have the values of this version",
    HeadReserved "STB-R-006" Invalid "flags, reserved fields and padding of the head are zero",
    SectionCount "STB-R-007" Invalid "a file has 1 to 64 sections",
    FileSize "STB-R-008" Invalid "the file is exactly as long as its header says",
    SectionFields "STB-R-010" Invalid "section type, flags and reserved fields are valid",
    SectionOffset "STB-R-011" Invalid "sections follow one another at the next multiple of 4096",
    SectionBounds "STB-R-012" Invalid "sections lie inside the file and the last one ends it",
    SectionSet "STB-R-013" Invalid "DATA, TENSORS and META are each present once",
    SectionCritical "STB-R-014" Unsupported "every critical section is of a known type",
    SectionPadding "STB-R-015" Invalid "padding between sections is zero",
    SectionChecksum "STB-R-016" Invalid "sections match their checksums",
    MetaStructure "STB-R-020" Invalid "metadata entries fill the META section exactly",
    MetaLimits "STB-R-021" Invalid "metadata stays within the limits",
    MetaKey "STB-R-022" Invalid "metadata keys use the allowed characters",
    MetaOrder "STB-R-023" Invalid "metadata keys are strictly ascending",
    MetaType "STB-R-024" Invalid "metadata value types are known",
    MetaValue "STB-R-025" Invalid "metadata values have the length and content of their type",
    MetaDeflate "STB-R-026" Invalid "deflated texts are whole DEFLATE streams of UTF-8 in the stated length",
    TensorTable "STB-R-030" Invalid "the TENSORS section has the length its counts give",
    TensorShape "STB-R-031" Invalid "tensor dimensions are valid and within the limits",
    TensorName "STB-R-032" Invalid "tensor names are printable ASCII, 1 to 255 bytes, stored in order",
    TensorUnique "STB-R-033" Invalid "tensor names are unique",
    TensorReserved "STB-R-034" Invalid "reserved fields of tensor entries are zero",
    TensorOffset "STB-R-035" Invalid "tensors follow one another at the next multiple of 64 and fill DATA",
    EncodingParams "STB-R-036" Invalid "encoding parameters are valid",
    EncodingShape "STB-R-037" Invalid "the encoding allows the tensor's shape",
    TensorLength "STB-R-038" Invalid "a tensor is as long as shape and encoding require",
    TensorPadding "STB-R-039" Invalid "padding between tensors is zero",
    TensorChecksum "STB-R-040" Invalid "tensors match their checksums",
    PayloadPadding "STB-R-041" Invalid "padding and unused bits inside a tensor are zero",
    PayloadFinite "STB-R-042" Invalid "stored numbers are finite",
    StbllmCount "STB-R-043" Invalid "each group of 8 weights keeps exactly as many as N:8 allows",
    StbllmState "STB-R-044" Invalid "weights in salient columns use states 0, 1 and 2",
    PayloadRows "STB-R-045" Invalid "the listed rows of a matrix are ascending and exist",
    TrellisTables "STB-R-046" Invalid "the largest entries of two tables of a trellis add up to at most 127",
    EncodingUnknown "STB-R-050" Unsupported "the encoding of a tensor to be decoded is known",
    ModelKey "STB-R-060" Invalid "required model keys are present with the right type",
    ModelArchitecture "STB-R-061" Unsupported "the model architecture and its options are known",
    ModelValue "STB-R-062" Invalid "model keys have consistent values",
    ModelTensor "STB-R-063" Invalid "the tensors of the model are present with the shapes of its keys",
    ModelParameters "STB-R-064" Invalid "the parameter count is the number of tensor elements",
}

/// The broken rule, with a description, and the offset and tensor if known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    // Boxed so that a `Result` on the hot path stays one word wide.
    inner: Box<Inner>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    rule: Rule,
    offset: Option<u64>,
    tensor: Option<String>,
    detail: String,
}

/// The result of operations on a file.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error for `rule`. `detail` describes the violation.
    #[must_use]
    pub fn new(rule: Rule, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { inner: Box::new(Inner { rule, offset: None, tensor: None, detail }) }
    }

    /// Adds the byte offset in the file, unless the error has one.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.inner.offset.get_or_insert(offset);
        self
    }

    /// Adds `base` to the byte offset, for checks of a part of the file.
    #[must_use]
    pub fn shifted(mut self, base: u64) -> Self {
        self.inner.offset = Some(self.inner.offset.unwrap_or(0).saturating_add(base));
        self
    }

    /// Adds the name of the tensor.
    #[must_use]
    pub fn in_tensor(mut self, name: &str) -> Self {
        self.inner.tensor = Some(name.to_owned());
        self
    }

    /// The broken rule.
    #[must_use]
    pub fn rule(&self) -> Rule {
        self.inner.rule
    }

    /// The byte offset in the file, if known.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.inner.offset
    }

    /// The name of the tensor, if the error is about one.
    #[must_use]
    pub fn tensor(&self) -> Option<&str> {
        self.inner.tensor.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { rule, offset, tensor, detail } = &*self.inner;
        write!(f, "{}: {detail}", rule.id())?;
        if let Some(name) = tensor {
            write!(f, ", tensor {name}")?;
        }
        if let Some(offset) = offset {
            write!(f, ", at byte {offset}")?;
        }
        write!(f, " (rule: {})", rule.title())
    }
}

impl std::error::Error for Error {}
