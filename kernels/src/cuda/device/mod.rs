//! Devices, their memory, and launching kernels on them.

mod buffer;

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUfunction_attribute_enum};
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use super::compile::{Arch, Compiler, Module};
use super::launch::Launch;
use super::simulated::{Run, Simulated};
use super::{Error, OLDEST, Result};
pub use buffer::Buffer;

/// The oldest driver whose functions are all there, and its name for users.
const OLDEST_DRIVER: (i32, &str) = (12_000, "CUDA 12.0 (driver 525)");

/// A device as the driver describes it.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Major and minor compute capability.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// The most bytes of shared memory that a block may ask for.
    pub shared_memory: u32,
}

impl DeviceInfo {
    /// Whether the kernels run on it.
    #[must_use]
    pub fn is_supported(&self) -> bool {
        self.capability >= OLDEST
    }

    /// Its architecture.
    #[must_use]
    pub fn arch(&self) -> Arch {
        Arch(self.capability.0 * 10 + self.capability.1)
    }

    fn read(ordinal: usize) -> Result<Self> {
        let fail = Error::driver("describe a device");
        let device =
            result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(&fail)?;
        let attribute = |a| {
            // SAFETY: the handle is of this driver, as the driver has just given it.
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

/// The pool that memory on a stream comes from; `None` where there are no pools.
fn memory_pool(ordinal: usize) -> Option<sys::CUmemoryPool> {
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device is one of the driver's, and the pointer is valid.
    let code = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device) };
    (code == sys::CUresult::CUDA_SUCCESS).then_some(pool)
}

/// Lets the pool keep what is released for what comes next. By default it is unmapped whenever the host waits.
fn keep_memory(ordinal: usize) {
    let Some(pool) = memory_pool(ordinal) else { return };
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool is the device's, and the attribute is a number of 64 bits. Where it is not known,
    // memory is slower to come by, no more.
    let _ = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()) };
}

/// Loads the driver; its version of CUDA as 1000 · major + 10 · minor.
fn driver() -> Result<i32> {
    let missing = |why: &str| Error::Unavailable { why: why.into() };
    // cudarc panics at the first call if there is no library.
    // SAFETY: loading the driver's library runs its initializers, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing("the NVIDIA driver (libcuda) is not installed"));
    }
    let mut version = 0;
    // SAFETY: the pointer is valid; the function is in all versions and may be called at any time.
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

/// All devices, also those that are too old.
///
/// # Errors
/// [`Error::Unavailable`] if there is none, with the reason.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    driver()?;
    let count = result::device::get_count().map_err(Error::driver("count devices"))?;
    if count == 0 {
        return Err(Error::Unavailable { why: "the driver finds no device".into() });
    }
    (0..count.unsigned_abs() as usize).map(DeviceInfo::read).collect()
}

/// An open device: its context, one stream, and the kernels loaded so far. Cheap to clone.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
}

struct Shared {
    info: DeviceInfo,
    backend: Backend,
}

/// What a device is.
enum Backend {
    Driver(Box<Driver>),
    Simulated(Simulated),
}

/// A device of the driver.
struct Driver {
    ordinal: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    compiler: Compiler,
    modules: Mutex<HashMap<Module, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Module, &'static str), CudaFunction>>,
    /// What a graph that is being recorded uses, so that it stays.
    recorded: Mutex<Option<Vec<Keep>>>,
}

/// Something that is not released while this exists.
pub(super) type Keep = Arc<dyn Any + Send + Sync>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.shared.info)
    }
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without driver or device, [`Error::Unsupported`] for a number that does not
    /// exist or a device that is too old, [`Error::Driver`].
    pub fn open(ordinal: usize) -> Result<Self> {
        let version = driver()?;
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
        let fail = Error::driver("open a device");
        let context = CudaContext::new(ordinal).map_err(&fail)?;
        // SAFETY: memory of this context is used on one stream only, which orders allocation, use and
        // release; copies to and from the host are on that stream too.
        unsafe { context.disable_event_tracking() };
        keep_memory(ordinal);
        let driver = Driver {
            ordinal,
            stream: context.new_stream().map_err(&fail)?,
            context,
            compiler: Compiler::new(version.unsigned_abs() / 1000),
            modules: Mutex::default(),
            functions: Mutex::default(),
            recorded: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(Shared { info, backend: Backend::Driver(Box::new(driver)) }) })
    }

    /// A device that is none: memory is the host's, and `run` does what is queued. So programs can be
    /// tested from their model down to the kernels where there is no device.
    #[must_use]
    pub fn simulated(info: DeviceInfo, run: Box<Run>) -> Self {
        let backend = Backend::Simulated(Simulated::new(run));
        Self { shared: Arc::new(Shared { info, backend }) }
    }

    /// What it is.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    /// Bytes of free memory.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn free_memory(&self) -> Result<u64> {
        match &self.shared.backend {
            Backend::Driver(d) => {
                self.synchronize()?;
                d.trim();
                let (free, _) = d.context.mem_get_info().map_err(Error::driver("count memory"))?;
                Ok(free as u64)
            }
            Backend::Simulated(s) => Ok(self.shared.info.memory.saturating_sub(s.used())),
        }
    }

    /// Waits for everything that is queued.
    ///
    /// # Errors
    /// [`Error::Driver`] with what went wrong in any of it.
    pub fn synchronize(&self) -> Result<()> {
        match &self.shared.backend {
            Backend::Driver(d) => d.stream.synchronize().map_err(Error::driver("run kernels")),
            Backend::Simulated(s) => s.synchronize(),
        }
    }

    /// The stream, for libraries of the vendor. Binds the context to this thread.
    pub(super) fn raw_stream(&self) -> Result<*mut c_void> {
        match &self.shared.backend {
            Backend::Driver(d) => {
                d.context.bind_to_thread().map_err(Error::driver("use a device"))?;
                Ok(d.stream.cu_stream().cast())
            }
            Backend::Simulated(_) => {
                Err(Error::Unavailable { why: "a simulated one has no stream".into() })
            }
        }
    }

    /// The memory, if it is simulated.
    pub(super) fn simulated_memory(&self) -> Option<&Simulated> {
        match &self.shared.backend {
            Backend::Driver(_) => None,
            Backend::Simulated(s) => Some(s),
        }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The launch is a plan of this crate for addresses of live buffers of this device, which have room for
    /// what the plan's shapes say.
    pub(super) unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        match &self.shared.backend {
            // SAFETY: the caller's promise.
            Backend::Driver(d) => unsafe { d.launch(&self.shared.info, launch) },
            Backend::Simulated(s) => {
                s.launch(launch);
                Ok(())
            }
        }
    }

    /// Records what `queue` queues instead of running it, to be run many times at little cost. All memory
    /// that it uses stays until the graph is dropped. Kernels that it uses must be loaded, and it must neither
    /// allocate nor wait.
    ///
    /// # Errors
    /// What `queue` returns; [`Error::Driver`].
    pub fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let work = match &self.shared.backend {
            Backend::Driver(d) => {
                let (graph, _kept) = d.record(queue)?;
                Recorded::Driver { graph, _kept }
            }
            Backend::Simulated(s) => Recorded::Simulated(s.record(queue)?),
        };
        Ok(Graph { work, device: self.clone() })
    }

    /// Keeps `what` for the graph that is being recorded, if one is.
    pub(super) fn keep(&self, what: &Keep) {
        if let Backend::Driver(d) = &self.shared.backend
            && let Some(kept) = &mut *lock(&d.recorded)
        {
            kept.push(what.clone());
        }
    }
}

/// Whether a driver does not take an image, rather than being in trouble itself.
fn is_refused(error: &cudarc::driver::DriverError) -> bool {
    use sys::CUresult as Code;
    matches!(
        error.0,
        Code::CUDA_ERROR_INVALID_IMAGE
            | Code::CUDA_ERROR_NO_BINARY_FOR_GPU
            | Code::CUDA_ERROR_INVALID_PTX
            | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | Code::CUDA_ERROR_INVALID_SOURCE
    )
}

impl Driver {
    /// Gives back what the pool keeps unused.
    fn trim(&self) {
        if let Some(pool) = memory_pool(self.ordinal) {
            // SAFETY: the pool is the device's; what is in use stays.
            let _ = unsafe { sys::cuMemPoolTrimTo(pool, 0) };
        }
    }

    /// Loads `module`, compiled if need be.
    fn load(&self, info: &DeviceInfo, module: &Module) -> Result<Arc<CudaModule>> {
        let mut modules = lock(&self.modules);
        if let Some(loaded) = modules.get(module) {
            return Ok(loaded.clone());
        }
        let fail = Error::driver("load kernels");
        let load = |image: &super::compile::Image| {
            let code = if image.is_ptx {
                let text = String::from_utf8_lossy(&image.bytes);
                Ptx::from_src(text.trim_end_matches('\0'))
            } else {
                Ptx::from_binary(image.bytes.clone())
            };
            self.context.load_module(code)
        };
        let image = self.compiler.image(module, info.arch())?;
        let loaded = load(&image).or_else(|e| {
            // Perhaps the driver has changed since: compile again, once.
            if !is_refused(&e) {
                return Err(fail(e));
            }
            self.compiler.forget(&image);
            load(&self.compiler.image(module, info.arch())?).map_err(&fail)
        })?;
        modules.insert(*module, loaded.clone());
        Ok(loaded)
    }

    fn function(
        &self,
        info: &DeviceInfo,
        module: &Module,
        name: &'static str,
    ) -> Result<CudaFunction> {
        let loaded = self.load(info, module)?;
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(&(*module, name)) {
            return Ok(function.clone());
        }
        let fail = Error::driver("find a kernel");
        let function = loaded.load_function(name).map_err(&fail)?;
        // Above 48 KiB a kernel has to ask; the limit includes what it has statically.
        let fixed = function.shared_size_bytes().map_err(&fail)?;
        let most = i32::try_from(info.shared_memory).unwrap_or(i32::MAX) - fixed;
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, most).map_err(&fail)?;
        functions.insert((*module, name), function.clone());
        Ok(function)
    }

    /// # Safety
    /// As for [`Device::launch`].
    unsafe fn launch(&self, info: &DeviceInfo, launch: &Launch) -> Result<()> {
        let fail = Error::driver("start a kernel");
        self.context.bind_to_thread().map_err(&fail)?;
        let function = self.function(info, &launch.module, launch.kernel)?;
        let [x, y, z] = launch.blocks;
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the kernel has one parameter, a struct by value with the layout of `params` (the plan's
        // promise), which the driver copies before it returns; the memory is the caller's promise.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared,
                self.stream.cu_stream(),
                &mut params,
            )
        };
        launched.map_err(fail)
    }

    fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<(CudaGraph, Vec<Keep>)> {
        let fail = Error::driver("record a graph");
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(&fail)?;
        *lock(&self.recorded) = Some(Vec::new());
        let queued = queue();
        let kept = lock(&self.recorded).take().unwrap_or_default();
        // Ends the recording also where something in it failed.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        queued?;
        match graph.map_err(&fail)? {
            Some(graph) => Ok((graph, kept)),
            None => Err(Error::Driver { what: "record a graph", error: "it is empty".into() }),
        }
    }

    /// The stream, from the calling thread.
    fn stream(&self) -> Result<sys::CUstream> {
        self.context.bind_to_thread().map_err(Error::driver("use a device"))?;
        Ok(self.stream.cu_stream())
    }
}

/// Recorded work, with the memory it uses.
pub struct Graph {
    work: Recorded,
    device: Device,
}

enum Recorded {
    Driver { graph: CudaGraph, _kept: Vec<Keep> },
    Simulated(Vec<Launch>),
}

// SAFETY: a graph must not be used from two threads at once, which `&mut self` of `run` excludes, and may
// move between threads: every call binds the context to the calling thread.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph on {:?}", self.device)
    }
}

impl Graph {
    /// Queues it.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn run(&mut self) -> Result<()> {
        match (&self.work, &self.device.shared.backend) {
            (Recorded::Driver { graph, .. }, _) => {
                graph.launch().map_err(Error::driver("start a graph"))
            }
            (Recorded::Simulated(launches), Backend::Simulated(s)) => {
                launches.iter().for_each(|launch| s.launch(launch));
                Ok(())
            }
            (Recorded::Simulated(_), Backend::Driver(_)) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a machine without a device says; on one with a device, that it opens.
    #[test]
    fn a_machine_without_a_device_says_why() {
        match devices() {
            Err(e) => {
                let text = e.to_string();
                assert!(matches!(e, Error::Unavailable { .. }), "{text}");
                assert!(text.starts_with("no CUDA device: "), "{text}");
                assert!(!text.contains('\n'), "{text}");
                assert!(Device::open(0).is_err());
            }
            Ok(all) => {
                let device = Device::open(all[0].ordinal).unwrap();
                let mut buffer = device.upload("numbers", &[1.0f32, 2.0, 3.0]).unwrap();
                buffer.write(&[5.0]).unwrap();
                let mut back = [0.0; 3];
                buffer.read(&mut back).unwrap();
                assert_eq!(back, [5.0, 2.0, 3.0]);
                assert!(Device::open(all.len()).is_err());
            }
        }
    }
}
