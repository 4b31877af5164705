//! Helpers of the tests: paths, running the programs, conversions, test vectors, small random checkpoints.

pub mod choices;
pub mod conversion;
pub mod gguf;
pub mod paths;
pub mod programs;
pub mod random_model;
pub mod server;
pub mod tiny;
pub mod vectors;
