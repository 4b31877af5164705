//! GGUF files, versions 2 and 3: metadata, tensors in place, and exact decoding of their types.
//!
//! The layout is that of llama.cpp (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). A file starts
//! with the magic bytes, version, number of tensors and number of metadata entries; metadata and tensor entries
//! follow, then, at a multiple of the alignment, the data of the tensors.

mod block;
mod cursor;
mod error;
mod file;
mod grid_iq1;
mod grid_iq2;
mod grid_iq3;
mod iq;
mod k_quants;
mod legacy;
mod ternary;
mod types;
mod value;

pub use error::{GgufError, GgufProblem};
pub use file::{Gguf, GgufTensor};
pub use types::GgufType;
pub use value::{GgufArray, GgufValue};
