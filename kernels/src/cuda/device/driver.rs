//! A device of the CUDA driver.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUfunction_attribute_enum;
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use super::info::DeviceInfo;
use crate::cuda::compile::Compiler;
use crate::cuda::error::{Error, Result};
use crate::cuda::image::Image;
use crate::cuda::launch::Launch;
use crate::cuda::module::Module;
use crate::cuda::sync::lock;

/// A device of the driver: its context, one stream, and the kernels that are loaded.
pub(super) struct CudaDriver {
    ordinal: usize,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    compiler: Compiler,
    modules: Mutex<HashMap<Module, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Module, &'static str), CudaFunction>>,
    /// The memory that the graph being recorded uses, which has to outlive the graph.
    pub recorded: Mutex<Option<Vec<KeepAlive>>>,
}

/// Keeps something alive while it exists.
pub(in crate::cuda) type KeepAlive = Arc<dyn Any + Send + Sync>;

/// A recorded graph, with the memory that it uses.
pub(super) struct RecordedGraph {
    pub graph: CudaGraph,
    _kept: Vec<KeepAlive>,
}

/// The pool that allocations on a stream use; `None` if the device has no pools.
fn memory_pool(ordinal: usize) -> Option<sys::CUmemoryPool> {
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the driver returned the device, and the pointer is valid.
    let code = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device) };
    (code == sys::CUresult::CUDA_SUCCESS).then_some(pool)
}

/// Lets the pool keep released memory for later allocations. By default the driver unmaps it whenever
/// the host waits.
fn keep_memory(ordinal: usize) {
    let Some(pool) = memory_pool(ordinal) else { return };
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool is the device's, and the attribute is a number of 64 bits. If the driver does not
    // know the attribute, allocations are slower.
    let _ = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()) };
}

/// Whether the driver rejects an image, rather than failing itself.
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

impl CudaDriver {
    /// Opens a device for a driver of this version.
    pub(super) fn open(ordinal: usize, version: i32) -> Result<Self> {
        let fail = Error::driver("open a device");
        let context = CudaContext::new(ordinal).map_err(&fail)?;
        // SAFETY: memory of this context is used on one stream only, which orders allocation, use
        // and release. Copies to and from the host are on that stream too.
        unsafe { context.disable_event_tracking() };
        keep_memory(ordinal);
        Ok(Self {
            ordinal,
            stream: context.new_stream().map_err(&fail)?,
            context,
            compiler: Compiler::new(version.unsigned_abs() / 1000),
            modules: Mutex::default(),
            functions: Mutex::default(),
            recorded: Mutex::default(),
        })
    }

    /// Returns the unused memory of the pool to the driver.
    pub(super) fn trim(&self) {
        if let Some(pool) = memory_pool(self.ordinal) {
            // SAFETY: the pool is the device's. Memory in use is not released.
            let _ = unsafe { sys::cuMemPoolTrimTo(pool, 0) };
        }
    }

    /// Loads a module, and compiles it if it is not in the cache.
    fn load(&self, info: &DeviceInfo, module: &Module) -> Result<Arc<CudaModule>> {
        let mut modules = lock(&self.modules);
        if let Some(loaded) = modules.get(module) {
            return Ok(loaded.clone());
        }
        let fail = Error::driver("load kernels");
        let load = |image: &Image| {
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
            // The driver may have changed since the image was compiled: compile once more.
            if !is_refused(&e) {
                return Err(fail(e));
            }
            self.compiler.forget(&image);
            load(&self.compiler.image(module, info.arch())?).map_err(&fail)
        })?;
        modules.insert(*module, loaded.clone());
        Ok(loaded)
    }

    /// A kernel, ready to launch with all the shared memory that the device has.
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
        // Kernels have to ask for more than 48 KiB. The limit includes static shared memory.
        let fixed = function.shared_size_bytes().map_err(&fail)?;
        let most = i32::try_from(info.shared_memory).unwrap_or(i32::MAX) - fixed;
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, most).map_err(&fail)?;
        functions.insert((*module, name), function.clone());
        Ok(function)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The launch is a plan of this crate for addresses of live buffers of this device, which have
    /// the sizes that the plan assumes.
    pub(super) unsafe fn launch(&self, info: &DeviceInfo, launch: &Launch) -> Result<()> {
        let fail = Error::driver("start a kernel");
        self.context.bind_to_thread().map_err(&fail)?;
        let function = self.function(info, &launch.module, launch.kernel)?;
        let [x, y, z] = launch.blocks;
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the kernel has one parameter, a struct by value with the layout of `params` (the
        // plan guarantees it), which the driver copies before it returns. The caller guarantees the
        // memory that its addresses refer to.
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

    /// Records what `queue` queues, with the memory that it uses.
    pub(super) fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<RecordedGraph> {
        let fail = Error::driver("record a graph");
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(&fail)?;
        *lock(&self.recorded) = Some(Vec::new());
        let queued = queue();
        let kept = lock(&self.recorded).take().unwrap_or_default();
        // The recording has to end even if `queue` failed.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        queued?;
        match graph.map_err(&fail)? {
            Some(graph) => Ok(RecordedGraph { graph, _kept: kept }),
            None => Err(Error::Driver { what: "record a graph", error: "it is empty".into() }),
        }
    }

    /// The stream, with the context bound to the calling thread.
    pub(super) fn bound_stream(&self) -> Result<sys::CUstream> {
        self.context.bind_to_thread().map_err(Error::driver("use a device"))?;
        Ok(self.stream.cu_stream())
    }
}
