//! Operations that do not depend on how weights are stored.

mod activation;
pub mod kv;
pub(crate) mod panels;
pub mod probe;
pub(crate) mod q8;
pub(crate) mod q8_batch;
pub mod trellis;
mod vector;

pub use activation::{activate, activate_mul, soft_cap};
pub use vector::{dot, layer_norm, log_sum_exp, rms_norm, rms_norm_plus_one, softmax};
