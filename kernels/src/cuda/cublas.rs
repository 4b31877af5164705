//! cuBLAS, the vendor's library for dense products, where it is installed: what our kernels are measured
//! against.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;

use libloading::{Library, Symbol};

use super::device::{Buffer, Device};
use super::nvrtc::folders;
use super::{Error, Result};

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    u64,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// `CUBLAS_OP_N`.
const OP_N: c_int = 0;
/// `CUBLAS_OP_T`.
const OP_T: c_int = 1;
/// `CUDA_R_16BF`.
const BF16: c_int = 14;
/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_GEMM_DEFAULT`.
const DEFAULT: c_int = -1;

/// cuBLAS on one device.
#[derive(Debug)]
pub struct Cublas {
    library: Library,
    handle: Handle,
    device: Device,
}

impl Cublas {
    /// Loads the library and opens it for `device`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it is not installed or does not work.
    pub fn new(device: &Device) -> Result<Self> {
        let missing = |what: &str| Error::Unavailable { why: format!("cuBLAS: {what}") };
        let library = candidates()
            .into_iter()
            // SAFETY: the library's initialisers have no preconditions; the path is a name the system's
            // loader resolves or lies in a folder of installed libraries.
            .find_map(|path| unsafe { Library::new(path) }.ok())
            .ok_or_else(|| missing("not installed (`pip install nvidia-cublas`)"))?;
        let stream = device.raw_stream()?;
        let mut handle = null_mut();
        {
            let create: Symbol<'_, Create> = symbol(&library, c"cublasCreate_v2")?;
            let set_stream: Symbol<'_, SetStream> = symbol(&library, c"cublasSetStream_v2")?;
            // SAFETY: the signature is that of cublas_v2.h; the context of the device is bound.
            let code = unsafe { create(&raw mut handle) };
            if code != 0 {
                return Err(missing(&format!("error {code} at the start")));
            }
            // SAFETY: the handle was just made; the stream lives as long as the device, which is kept.
            let code = unsafe { set_stream(handle, stream) };
            if code != 0 {
                return Err(missing(&format!("error {code} with the stream")));
            }
        }
        Ok(Self { library, handle, device: device.clone() })
    }

    /// Queues `y` = `x` · `w`ᵀ in bf16 with sums in f32: `w` [rows, cols], `x` [tokens, cols], `y` [tokens, rows],
    /// row-major.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small, or a size is no `i32`.
    pub fn queue_bf16(
        &self,
        w: &Buffer<u16>,
        x: &Buffer<u16>,
        y: &mut Buffer<u16>,
        [rows, cols, tokens]: [usize; 3],
    ) -> Result<()> {
        assert!(
            w.len() >= rows * cols && x.len() >= tokens * cols && y.len() >= tokens * rows,
            "matrices of these sizes"
        );
        let [m, n, k] = [rows, tokens, cols].map(|v| c_int::try_from(v).expect("a size"));
        let gemm: Symbol<'_, GemmEx> = symbol(&self.library, c"cublasGemmEx")?;
        self.device.raw_stream()?;
        let (one, zero) = (1.0f32, 0.0f32);
        let scalar = |v: &f32| std::ptr::from_ref(v).cast::<c_void>();
        let [a, b, c] = [w.address(), x.address(), y.address()];
        // SAFETY: the signature is that of cublas_v2.h; the buffers are live and have room for matrices
        // of these sizes, as checked; scalars are on the host, the default, and read before the call returns.
        let code = unsafe {
            gemm(
                self.handle,
                OP_T,
                OP_N,
                m,
                n,
                k,
                scalar(&one),
                a,
                BF16,
                k,
                b,
                BF16,
                k,
                scalar(&zero),
                c,
                BF16,
                m,
                COMPUTE_F32,
                DEFAULT,
            )
        };
        match code {
            0 => Ok(()),
            _ => {
                Err(Error::Driver { what: "multiply with cuBLAS", error: format!("error {code}") })
            }
        }
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        if let Ok(destroy) = symbol::<Destroy>(&self.library, c"cublasDestroy_v2") {
            // SAFETY: the handle is of this library and is not used again.
            unsafe { destroy(self.handle) };
        }
    }
}

fn symbol<'l, T>(library: &'l Library, name: &'static std::ffi::CStr) -> Result<Symbol<'l, T>> {
    // SAFETY: all callers give the signature of cublas_v2.h.
    unsafe { library.get(name.to_bytes_with_nul()) }
        .map_err(|e| Error::Unavailable { why: format!("cuBLAS: {e}") })
}

fn candidates() -> Vec<PathBuf> {
    let names = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    for folder in folders() {
        found.extend(names.iter().map(|name| folder.join(name)).filter(|file| file.is_file()));
    }
    found
}
