//! Descriptions of model architectures (spec, metadata §2): the decoder block, the tensors of a model with
//! their roles, and one file per family with its tensor names and the fields of its `config.json`.
//!
//! Tensor names appear only in this module. Other code uses roles.

mod block;
mod config;
mod gguf;
mod llama;
mod mistral;
mod options;
mod registry;
mod roles;
mod spec;
mod tensors;

pub use block::{Attention, Block, Experts, Mlp, MlpKind, Norm, NormKind, NormPlacement, Position};
pub use config::{ConfigError, ConfigFields};
pub use gguf::{GGUF_ROPE_DIVISORS, GgufArchitecture, GgufField, gguf_name};
pub use roles::{InputMap, Linear, LinearInput, LinearMap, NormSite, Role, TensorSpec};
pub use spec::{Activation, Architecture, Family, ModelSpec, RopePairing, RopeScaling};
