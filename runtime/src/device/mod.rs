//! The last layers of a model, the lm_head, and with all layers the embeddings, on a GPU.
//!
//! The block is that of [`crate::block`]. Norm and SiLU happen at the input of a product, the
//! residual sum at its output: six launches per layer. A step of one token is recorded once as a CUDA
//! graph and replayed from then on.

mod caches;
mod choice;
mod common;
mod exact;
mod model;
mod scratch;
mod step;

pub(crate) use caches::{DeviceCache, DeviceCaches};
pub use choice::DeviceChoice;
pub use exact::{DeviceLayers, DeviceObserver, DeviceSublayer};
pub(crate) use model::{DeviceModel, DeviceOptions};
