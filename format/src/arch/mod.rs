//! Descriptions of model architectures (spec, metadata §2): the decoder block, the tensors of a model with
//! their roles, and one file per family with its tensor names and the fields of its `config.json`.
//!
//! Tensor names appear only in this module. Other code uses roles.

mod block;
mod config;
mod family;
mod gemma;
mod gguf;
mod gpt2;
mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod opt;
mod options;
mod phi3;
mod qwen;
mod registry;
mod roles;
mod smollm3;
mod spec;
mod tensors;

pub use block::{
    Activation, Attention, Block, Experts, Mlp, MlpKind, Norm, NormKind, NormPlacement, QkNorm,
    RopeTable,
};
pub use config::{ConfigError, ConfigFields};
pub use family::{Family, SourceTensor};
pub use gguf::{
    GGUF_LONG_FACTORS, GGUF_ROPE_DIVISORS, GGUF_SHORT_FACTORS, GgufArchitecture, GgufField,
    Implied, gguf_name,
};
pub use roles::{InputMap, Linear, LinearInput, LinearMap, NormSite, Role, TensorSpec};
pub use spec::{Biases, ExpertsSpec, LayerSet, ModelSpec, RopePairing, RopeScaling, Window};
