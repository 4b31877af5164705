//! What the tests share: where things are, test vectors, a small deterministic generator.

pub mod paths;
pub mod random;
pub mod vectors;
