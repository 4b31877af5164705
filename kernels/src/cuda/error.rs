//! Errors of device operations.

/// The oldest compute capability that the kernels support: they need asynchronous copies, bf16 and
/// `mma.sp`.
pub const OLDEST: (u32, u32) = (8, 0);

/// The result of device operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a device cannot be used, or which operation on it failed. Every message says what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver, or the driver finds no device.
    #[error("no CUDA device: {why}")]
    Unavailable {
        /// What is missing.
        why: String,
    },
    /// The device, its number, a shape or an encoding is not supported.
    #[error("{why}")]
    Unsupported {
        /// What was asked for, and what is supported instead.
        why: String,
    },
    /// NVRTC is missing or too new for the driver.
    #[error("{why}")]
    Compiler {
        /// What to install.
        why: String,
    },
    /// cuBLAS or cuSOLVER is missing or does not work.
    #[error("{why}")]
    Library {
        /// Which library, and what to install.
        why: String,
    },
    /// A kernel does not compile. This is a defect of the program.
    #[error("kernel {module} does not compile for {arch}:\n{log}")]
    Compile {
        /// The name of the module.
        module: String,
        /// The architecture.
        arch: String,
        /// The compiler's log.
        log: String,
    },
    /// The device has too little memory.
    #[error("{what} needs {} of device memory, {} are free", mib(*needed), mib(*free))]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A call of the driver failed.
    #[error("the CUDA driver failed to {what}: {error}")]
    Driver {
        /// What the driver was asked to do.
        what: &'static str,
        /// The driver's error.
        error: String,
    },
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl Error {
    /// Converts a driver error that occurred while doing `what`.
    pub(super) fn driver(what: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Self {
        move |e| {
            let text = |s: std::result::Result<&std::ffi::CStr, _>| {
                s.map(|s: &std::ffi::CStr| s.to_string_lossy().into_owned()).unwrap_or_default()
            };
            let error = format!("{} ({})", text(e.error_string()), text(e.error_name()));
            Self::Driver { what, error }
        }
    }
}
