//! Kernels for NVIDIA GPUs of compute capability 8.0 and newer.
//!
//! The kernels are CUDA C++ (`kernels/cuda`), part of the program as text. NVRTC compiles them for the
//! device found; the result is kept on disk ([`Compiler`]). Driver and NVRTC are loaded when a device is
//! asked for, so the program builds and runs where neither is installed: [`devices`] then says why there
//! is no device.
//!
//! Everything here runs in order on one stream per [`Device`]. A call returns when its work is queued;
//! downloads wait for it.

mod attention;
mod cache;
mod candidates;
mod compile;
mod device;
mod gemm;
mod gemv;
mod launch;
mod matrix;
mod moments;
mod nvrtc;
mod ops;
pub mod simulated;
mod vendor;

pub use attention::{Attend, Attention, KvCache, KvSlot, Slots};
pub use candidates::{Candidates, Wanted};
pub use compile::{Arch, Compiler, Module, compile_all};
pub use device::{Buffer, Device, DeviceInfo, Graph, devices};
pub use gemm::{
    Gemm, GemmPlan, Product, PromptNumbers, gemm_prepared, gemm_scales, plan_prepare, prompt_units,
};
pub use gemv::{Gemv, Input, MatVecPlan, Numbers, plan_decode};
pub use launch::{Launch, Limits};
pub use matrix::{Matrix, MatrixParams};
pub use moments::{Dense, Factors};
pub use nvrtc::Nvrtc;
pub use ops::{Ops, plan_materialize};
pub use vendor::{Blas, Operand};

/// The oldest compute capability the kernels are written for: asynchronous copies, bf16, `mma.sp`.
pub const OLDEST: (u32, u32) = (8, 0);

/// The result of device operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a device cannot be used, or what failed on it. Messages say what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver, or it finds no device.
    #[error("no CUDA device: {why}")]
    Unavailable {
        /// What is missing.
        why: String,
    },
    /// There is a device, but not one these kernels run on, or not with that number.
    #[error("{why}")]
    Unsupported {
        /// What it is and what is needed.
        why: String,
    },
    /// The compiler of kernels is missing or too new for the driver.
    #[error("{why}")]
    Compiler {
        /// What to install.
        why: String,
    },
    /// A library of the vendor is missing or does not work.
    #[error("{why}")]
    Library {
        /// Which, and what to install.
        why: String,
    },
    /// A kernel does not compile: a defect of this program.
    #[error("kernel {module} does not compile for {arch}:\n{log}")]
    Compile {
        /// The source.
        module: String,
        /// The architecture.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// The device has too little memory.
    #[error("{what} needs {} of device memory, {} are free", mib(*needed), mib(*free))]
    Memory {
        /// What for.
        what: String,
        /// Bytes.
        needed: u64,
        /// Bytes.
        free: u64,
    },
    /// A call of the driver failed.
    #[error("the CUDA driver failed to {what}: {error}")]
    Driver {
        /// What was asked of it.
        what: &'static str,
        /// What it says.
        error: String,
    },
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl Error {
    /// An error of the driver while doing `what`.
    fn driver(what: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Self {
        move |e| {
            let text = |s: std::result::Result<&std::ffi::CStr, _>| {
                s.map(|s: &std::ffi::CStr| s.to_string_lossy().into_owned()).unwrap_or_default()
            };
            let error = format!("{} ({})", text(e.error_string()), text(e.error_name()));
            Self::Driver { what, error }
        }
    }
}
