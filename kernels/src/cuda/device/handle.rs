//! An open device.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use super::driver::{CudaDriver, KeepAlive};
use super::info::{DeviceInfo, devices, load_driver};
use crate::cuda::error::{Error, OLDEST, Result};
use crate::cuda::launch::{DeviceLimits, Launch};
use crate::cuda::simulated::{SimulatedMemory, SimulatedRun};
use crate::cuda::sync::lock;

/// An open device. Clones share one context, one stream and the kernels loaded so far.
#[derive(Clone)]
pub struct Device {
    state: Arc<DeviceState>,
}

struct DeviceState {
    info: DeviceInfo,
    backend: DeviceBackend,
}

/// What runs the launches of a device.
pub(super) enum DeviceBackend {
    Driver(Box<CudaDriver>),
    Simulated(SimulatedMemory),
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.state.info)
    }
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver or a device, [`Error::Unsupported`] for a number that
    /// does not exist or a device that is too old, [`Error::Driver`].
    pub fn open(ordinal: usize) -> Result<Self> {
        let version = load_driver()?;
        let all = devices()?;
        let count = all.len();
        let Some(info) = all.into_iter().nth(ordinal) else {
            let why =
                format!("there is no device cuda:{ordinal}, only {count}; see --list-devices");
            return Err(Error::Unsupported { why });
        };
        if !info.is_supported() {
            let (major, minor) = info.capability;
            let why = format!(
                "{} has compute capability {major}.{minor}; the kernels need {}.{} (Ampere) or newer",
                info.name, OLDEST.0, OLDEST.1
            );
            return Err(Error::Unsupported { why });
        }
        let driver = CudaDriver::open(ordinal, version)?;
        Ok(Self::with_backend(info, DeviceBackend::Driver(Box::new(driver))))
    }

    fn with_backend(info: DeviceInfo, backend: DeviceBackend) -> Self {
        Self { state: Arc::new(DeviceState { info, backend }) }
    }

    /// A simulated device: its memory is the host's, and `run` runs the queued launches. Tests use it
    /// to run programs down to the kernels on machines without a GPU.
    #[must_use]
    pub fn simulated(info: DeviceInfo, run: Box<SimulatedRun>) -> Self {
        Self::with_backend(info, DeviceBackend::Simulated(SimulatedMemory::new(run)))
    }

    /// The driver's description.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.state.info
    }

    /// The properties that plans for this device depend on.
    #[must_use]
    pub fn limits(&self) -> DeviceLimits {
        let info = self.info();
        // Every kernel has a few bytes of static shared memory.
        DeviceLimits {
            multiprocessors: info.multiprocessors.max(1),
            shared: info.shared_memory.saturating_sub(1 << 10),
        }
    }

    /// Bytes of free memory.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn free_memory(&self) -> Result<u64> {
        match &self.state.backend {
            DeviceBackend::Driver(d) => {
                self.synchronize()?;
                d.trim();
                let (free, _) = d.context.mem_get_info().map_err(Error::driver("count memory"))?;
                Ok(free as u64)
            }
            DeviceBackend::Simulated(s) => Ok(self.state.info.memory.saturating_sub(s.used())),
        }
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// [`Error::Driver`] with the failure of any queued work.
    pub fn synchronize(&self) -> Result<()> {
        match &self.state.backend {
            DeviceBackend::Driver(d) => {
                d.stream.synchronize().map_err(Error::driver("run kernels"))
            }
            DeviceBackend::Simulated(s) => s.synchronize(),
        }
    }

    /// The stream, for cuBLAS and cuSOLVER. Binds the context to this thread.
    pub(in crate::cuda) fn raw_stream(&self) -> Result<*mut c_void> {
        match &self.state.backend {
            DeviceBackend::Driver(d) => Ok(d.bound_stream()?.cast()),
            DeviceBackend::Simulated(_) => {
                Err(Error::Unavailable { why: "a simulated one has no stream".into() })
            }
        }
    }

    /// The memory, if the device is simulated.
    pub(in crate::cuda) fn simulated_memory(&self) -> Option<&SimulatedMemory> {
        match &self.state.backend {
            DeviceBackend::Driver(_) => None,
            DeviceBackend::Simulated(s) => Some(s),
        }
    }

    /// The backend.
    pub(super) fn backend(&self) -> &DeviceBackend {
        &self.state.backend
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The launch is a plan of this crate for addresses of live buffers of this device, which have
    /// the sizes that the plan assumes.
    pub(in crate::cuda) unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        match &self.state.backend {
            // SAFETY: the caller guarantees what `CudaDriver::launch` requires.
            DeviceBackend::Driver(d) => unsafe { d.launch(&self.state.info, launch) },
            DeviceBackend::Simulated(s) => {
                s.launch(launch);
                Ok(())
            }
        }
    }

    /// Keeps `what` alive as long as the graph that is being recorded, if there is one.
    pub(in crate::cuda) fn keep(&self, what: &KeepAlive) {
        if let DeviceBackend::Driver(d) = &self.state.backend
            && let Some(kept) = &mut *lock(&d.recorded)
        {
            kept.push(what.clone());
        }
    }
}
