//! Runs the last layers of a model and the lm_head on a GPU; with all layers, the embeddings too.
//!
//! The forward pass is [`crate::block`]. Kernels of linear layers fuse norm and SwiGLU into their input
//! and the residual sum into their output, so a layer takes six launches. A step of one token is
//! recorded as a CUDA graph and replayed.

mod caches;
mod choice;
mod common;
mod exact;
mod model;
mod scratch;
mod step;

pub(crate) use caches::DeviceCaches;
pub use choice::DeviceChoice;
pub use exact::{DeviceLayers, DeviceObserver, DeviceSublayer};
pub(crate) use model::{DeviceModel, DeviceOptions};
