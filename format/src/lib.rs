//! The `.stb` container and its weight encodings.
//!
//! This crate turns bytes into validated views and values into bytes. It holds the *exact* scalar
//! encoder and decoder of every registered encoding; faster code elsewhere is checked against it.
//! The normative text is `spec/README.md` and the files beside it; each rule there has an id
//! (`STB-R-nnn`), which the errors of this crate carry.
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
//! A file is hostile until proven otherwise: there is no `unsafe` here, no indexing, no unchecked
//! arithmetic, and nothing is allocated from a count that has not been compared with the number of
//! bytes that are really there.

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
pub mod encoding;
mod error;
mod limits;
mod meta;
mod num;
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
pub use reader::{File, Section};
pub use tensors::Tensor;
pub use writer::{Writer, file_size};

/// XXH3-64 with seed 0 over `bytes`: the checksum of heads, sections and tensors (spec §3.4).
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
