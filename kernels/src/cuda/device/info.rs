//! The driver and its devices.

use std::fmt;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{result, sys};

use crate::cuda::error::{Error, OLDEST, Result};
use crate::cuda::image::Arch;

/// The oldest driver with all functions that are called, and its name for users.
const OLDEST_DRIVER: (i32, &str) = (12_000, "CUDA 12.0 (driver 525)");

/// The driver's description of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The device number.
    pub ordinal: usize,
    /// The name.
    pub name: String,
    /// The compute capability, major and minor.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The most bytes of shared memory that a block may use.
    pub shared_memory: u32,
}

impl DeviceInfo {
    /// Whether the kernels support the device.
    #[must_use]
    pub fn is_supported(&self) -> bool {
        self.capability >= OLDEST
    }

    /// The architecture.
    #[must_use]
    pub fn arch(&self) -> Arch {
        Arch(self.capability.0 * 10 + self.capability.1)
    }

    fn read(ordinal: usize) -> Result<Self> {
        let fail = Error::driver("describe a device");
        let device =
            result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(&fail)?;
        let attribute = |a| {
            // SAFETY: the driver has just returned this handle.
            let value = unsafe { result::device::get_attribute(device, a) };
            value.map(i32::unsigned_abs).map_err(&fail)
        };
        // SAFETY: as above.
        let memory = unsafe { result::device::total_mem(device) }.map_err(&fail)? as u64;
        Ok(Self {
            ordinal,
            name: result::device::get_name(device).map_err(&fail)?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            memory,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
        })
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ordinal, name, capability: (major, minor), memory, multiprocessors, .. } = self;
        let gib = *memory as f64 / f64::from(1 << 30);
        write!(
            f,
            "cuda:{ordinal}  {name}, compute capability {major}.{minor}, {gib:.1} GiB, \
             {multiprocessors} multiprocessors"
        )
    }
}

/// Loads the driver and returns its CUDA version, 1000 · major + 10 · minor.
pub(super) fn load_driver() -> Result<i32> {
    let missing = |why: &str| Error::Unavailable { why: why.into() };
    // cudarc panics at its first call if the library is missing.
    // SAFETY: loading the driver's library runs its initializers, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing("the NVIDIA driver (libcuda) is not installed"));
    }
    let mut version = 0;
    // SAFETY: the pointer is valid. All versions have this function, and it may be called any time.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    code.result().map_err(Error::driver("tell its version"))?;
    if version < OLDEST_DRIVER.0 {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        let why = format!(
            "the driver supports CUDA {major}.{minor}; {} or newer is needed",
            OLDEST_DRIVER.1
        );
        return Err(Error::Unavailable { why });
    }
    match result::init() {
        Ok(()) => Ok(version),
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            Err(missing("the driver finds no device"))
        }
        Err(e) => Err(missing(&Error::driver("start")(e).to_string())),
    }
}

/// All devices, including unsupported ones.
///
/// # Errors
/// [`Error::Unavailable`] with the reason if there is no device.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    load_driver()?;
    let count = result::device::get_count().map_err(Error::driver("count devices"))?;
    if count == 0 {
        return Err(Error::Unavailable { why: "the driver finds no device".into() });
    }
    (0..count.unsigned_abs() as usize).map(DeviceInfo::read).collect()
}
