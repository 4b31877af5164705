//! Kernels for NVIDIA GPUs of compute capability 8.0 and newer.
//!
//! The kernels are CUDA C++ (`kernels/cuda`), whose text is part of the program. NVRTC compiles them for the
//! device, and [`Compiler`] caches the result on disk. The driver and NVRTC are loaded when a device is
//! requested, so the program builds and runs where neither is installed: [`devices`] then reports why
//! there is no device.
//!
//! All work of a [`Device`] runs in order on one stream. A call returns when its work is queued;
//! downloads wait for it.

mod activations;
mod attention;
mod blas;
mod compile;
mod device;
mod encoding;
mod error;
mod gemm;
mod gemv;
mod hessian;
mod image;
mod image_cache;
mod input;
mod launch;
mod library_paths;
mod matrix;
mod mixed_rows;
mod module;
mod modules;
mod nvrtc;
mod precision;
mod scratch;
pub mod simulated;
mod sync;
mod top_k;

pub use activations::{ActivationOps, plan_activations};
pub use attention::{
    Attention, AttentionAddresses, AttentionArgs, AttentionBatch, AttentionShape, KvCache, KvSlot,
    RopeAddresses, SlotMapping,
};
pub use blas::{Blas, GemmSize, MatrixSize, Operand, OperandMut};
pub use compile::Compiler;
pub use device::{Buffer, Device, DeviceInfo, Graph, devices};
pub use encoding::MatrixParams;
pub use error::{Error, OLDEST, Result};
pub use gemm::{
    Gemm, GemmAddresses, GemmPlan, GemmProblem, gemm_prepared, gemm_scales, gemm_units,
    plan_prepare,
};
pub use gemv::{Gemv, GemvPlan, GemvProblem, plan_dequantize};
pub use hessian::{HessianFactors, LinearAlgebra};
pub use image::Arch;
pub use input::ActivationInput;
pub use launch::{DeviceLimits, Launch, ScratchAddresses, ScratchSize};
pub use matrix::Matrix;
pub use module::Module;
pub use modules::{ModuleLog, compile_all, modules};
pub use nvrtc::Nvrtc;
pub use precision::{ActivationPrecision, PrefillPrecision};
pub use top_k::{TopK, TopKRequest};
