//! `tests/compare.rs` compares stb's reader of GGUF files with an independent one, the crate `gguf-rs`.
