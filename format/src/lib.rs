//! The `.stb` container and its weight encodings.
//!
//! This crate reads and writes files and has the exact scalar encoder and decoder of every registered
//! encoding, against which the kernels are tested. The normative text is `spec/README.md` and the
//! other files in that folder. Each rule there has an id (`STB-R-nnn`), which errors include.
//!
//! ```no_run
//! let bytes = std::fs::read("model.stb")?;
//! let file = stb_format::File::open(&bytes)?;
//! for tensor in file.tensors() {
//!     println!("{} {:?} {}", tensor.name(), tensor.shape(), tensor.encoding());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Files are untrusted: there is no `unsafe` here, no indexing, no unchecked arithmetic, and no
//! allocation from a count that has not been compared with the number of bytes present.

#![forbid(unsafe_code)]
#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

pub mod arch;
mod deflate;
pub mod encoding;
mod error;
pub mod gguf;
mod limits;
mod meta;
mod num;
mod patch;
mod profile;
mod raw;
mod reader;
mod tensors;
mod writer;

pub use arch::{Activation, ModelSpec, RopePairing, RopeScaling};
pub use encoding::Encoding;
pub use error::{Class, Error, Result, Rule};
pub use half;
pub use limits::*;
pub use meta::{Meta, MetaView, Value, ValueRef};
pub use patch::MetaPatch;
pub use profile::{Figure, Quality, QualityFigures, Verdict};
pub use reader::{File, Section};
pub use tensors::Tensor;
pub use writer::{Writer, file_size};

/// XXH3-64 with seed 0 over `bytes`: the checksum of heads, sections and tensors (spec, container §3.4).
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
