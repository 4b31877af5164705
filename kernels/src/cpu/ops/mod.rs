//! Operations that do not depend on how weights are stored.

pub mod kv;
pub(crate) mod panels;
pub mod probe;
pub(crate) mod q8;
pub(crate) mod q8_batch;
mod vector;

pub use vector::{dot, log_sum_exp, rms_norm, silu_mul, softmax};
