//! Quantizers: from a dense weight matrix and the Hessian of its inputs to packed weights.
//!
//! Each method has a file with its options, which implement [`LinearQuantizer`]; [`Method`] lists them.

mod binarize_error;
mod binarize_error_means;
mod compensation;
mod fit;
pub mod int_group;
mod kept;
mod method;
pub mod metric;
pub mod mixed_rows;
pub mod nm;
pub mod pb_llm;
pub mod prune;
mod quantiles;
mod quantizer;
mod refit;
pub mod search;
pub mod search_error;
pub mod stbllm;
pub(crate) mod tile_scales;
pub mod trellis;

pub use compensation::Propagation;
pub use kept::{Allocation, KeptByLayer};
pub use method::Method;
pub use quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds, memory, relative_error};
pub(crate) use quantizer::{column_spreads, decode};
