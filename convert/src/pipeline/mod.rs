//! The conversion: one decoder layer at a time through calibration, quantization and output.

mod conversion;
mod device;
mod distill;
mod experts;
mod job;
mod layer;
pub(crate) mod limits;
pub(crate) mod memory;
mod refresh;
mod run;
mod tables;
mod tensor;

pub use conversion::convert;
pub use job::{Job, Progress};
pub(crate) use tensor::decode_finite;
