//! cuBLAS and cuSOLVER, loaded from the folders that NVRTC is loaded from: cudarc's bindings search only
//! the loader's path, not Python's packages.

use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;

use libloading::{Library as Loaded, Symbol};

use super::column_major::{ColumnMajor, DataType, GemmCall, MatrixOp};
use crate::cuda::device::{Buffer, Device};
use crate::cuda::error::{Error, Result};
use crate::cuda::library_paths::folders;

type LibraryHandle = *mut c_void;
type CreateFn = unsafe extern "C" fn(*mut LibraryHandle) -> c_int;
type DestroyFn = unsafe extern "C" fn(LibraryHandle) -> c_int;
type SetStreamFn = unsafe extern "C" fn(LibraryHandle, *mut c_void) -> c_int;
type GemmExFn = unsafe extern "C" fn(
    LibraryHandle,
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
type SsyrkFn = unsafe extern "C" fn(
    LibraryHandle,
    c_int,
    c_int,
    c_int,
    c_int,
    *const f32,
    u64,
    c_int,
    *const f32,
    u64,
    c_int,
) -> c_int;
type DtrsmFn = unsafe extern "C" fn(
    LibraryHandle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const f64,
    u64,
    c_int,
    u64,
    c_int,
) -> c_int;
type DpotrfSizeFn =
    unsafe extern "C" fn(LibraryHandle, c_int, c_int, u64, c_int, *mut c_int) -> c_int;
type DpotrfFn =
    unsafe extern "C" fn(LibraryHandle, c_int, c_int, u64, c_int, u64, c_int, u64) -> c_int;

/// `CUBLAS_FILL_MODE_UPPER`.
const UPPER: c_int = 1;
/// `CUBLAS_SIDE_RIGHT`.
const RIGHT: c_int = 1;
/// `CUBLAS_DIAG_NON_UNIT`.
const NON_UNIT: c_int = 0;
/// `CUBLAS_COMPUTE_32F`: products of f32 are not rounded to fewer bits.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_GEMM_DEFAULT`.
const DEFAULT: c_int = -1;

/// A library with a handle for one device.
#[derive(Debug)]
struct OpenLibrary {
    /// Never unloaded: the library must not be unloaded while the device is in use.
    library: &'static Loaded,
    handle: LibraryHandle,
    destroy: &'static CStr,
    name: &'static str,
    device: Device,
}

/// The names of a library, its files and its functions.
struct LibraryNames {
    name: &'static str,
    package: &'static str,
    files: &'static [&'static str],
    create: &'static CStr,
    destroy: &'static CStr,
    set_stream: &'static CStr,
}

const CUBLAS: LibraryNames = LibraryNames {
    name: "cuBLAS",
    package: "nvidia-cublas",
    files: &[
        "libcublas.so.13",
        "libcublas.so.12",
        "libcublas.so",
        "cublas64_13.dll",
        "cublas64_12.dll",
    ],
    create: c"cublasCreate_v2",
    destroy: c"cublasDestroy_v2",
    set_stream: c"cublasSetStream_v2",
};
const CUSOLVER: LibraryNames = LibraryNames {
    name: "cuSOLVER",
    package: "nvidia-cusolver",
    files: &[
        "libcusolver.so.12",
        "libcusolver.so.11",
        "libcusolver.so",
        "cusolver64_12.dll",
        "cusolver64_11.dll",
    ],
    create: c"cusolverDnCreate",
    destroy: c"cusolverDnDestroy",
    set_stream: c"cusolverDnSetStream",
};

impl OpenLibrary {
    fn new(names: &LibraryNames, device: &Device) -> Result<Self> {
        let LibraryNames { name, package, .. } = *names;
        let missing = |what: &str| Error::Library { why: format!("{name}: {what}") };
        let stream = device.raw_stream()?;
        let mut trouble = None;
        for path in candidates(names.files) {
            // SAFETY: the library's initializers have no preconditions; the path is a name the system's
            // loader resolves or lies in a folder of installed libraries.
            let opened = match unsafe { Loaded::new(&path) } {
                Ok(library) => {
                    Self::start(library, names, device, stream).map_err(|e| e.to_string())
                }
                // The loader may not find this name; the next one is tried.
                Err(_) if !path.is_absolute() => continue,
                Err(e) => Err(e.to_string()),
            };
            match opened {
                Ok(opened) => return Ok(opened),
                Err(e) => trouble = Some(format!("{}: {e}", path.display())),
            }
        }
        Err(match trouble {
            Some(why) => missing(&why),
            None => missing(&format!("not installed (`pip install {package}`)")),
        })
    }

    fn start(
        library: Loaded,
        names: &LibraryNames,
        device: &Device,
        stream: *mut c_void,
    ) -> Result<Self> {
        let name = names.name;
        let missing = |what: &str| Error::Library { why: format!("{name}: {what}") };
        let library = Box::leak(Box::new(library));
        let device = device.clone();
        let mut opened = Self { library, handle: null_mut(), destroy: names.destroy, name, device };
        let mut handle = null_mut();
        // SAFETY: the signature is that of the library's header; the context of the device is bound.
        let code = unsafe { opened.symbol::<CreateFn>(names.create)?(&raw mut handle) };
        if code != 0 {
            return Err(missing(&format!("error {code} at the start")));
        }
        opened.handle = handle;
        // SAFETY: as above. The stream lives as long as the device, which this library keeps.
        let code = unsafe { opened.symbol::<SetStreamFn>(names.set_stream)?(handle, stream) };
        match code {
            0 => Ok(opened),
            _ => Err(missing(&format!("error {code} with the stream"))),
        }
    }

    fn symbol<T>(&self, name: &'static CStr) -> Result<Symbol<'_, T>> {
        // SAFETY: all callers give the signature of the library's header.
        unsafe { self.library.get(name.to_bytes_with_nul()) }
            .map_err(|e| Error::Library { why: format!("{}: {e}", self.name) })
    }

    fn check(&self, what: &'static str, code: c_int) -> Result<()> {
        match code {
            0 => Ok(()),
            _ => Err(Error::Driver { what, error: format!("{}: error {code}", self.name) }),
        }
    }
}

impl Drop for OpenLibrary {
    fn drop(&mut self) {
        if !self.handle.is_null()
            && self.device.raw_stream().is_ok()
            && let Ok(destroy) = self.symbol::<DestroyFn>(self.destroy)
        {
            // SAFETY: the handle is of this library and is not used again.
            unsafe { destroy(self.handle) };
        }
    }
}

/// cuSOLVER with its workspace.
#[derive(Debug)]
struct Cusolver {
    opened: OpenLibrary,
    workspace: Buffer<f64>,
    info: Buffer<i32>,
}

/// Both libraries for one device. cuSOLVER is loaded on first use.
#[derive(Debug)]
pub(super) struct CudaLibraries {
    cublas: OpenLibrary,
    cusolver: Option<Cusolver>,
}

// SAFETY: one thread at a time may use the libraries' handles, if it has bound the context. Every call binds
// it (`raw_stream`), and callers that could run at once take `&mut self` or hold the owner's lock.
unsafe impl Send for CudaLibraries {}

impl CudaLibraries {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { cublas: OpenLibrary::new(&CUBLAS, device)?, cusolver: None })
    }

    /// The product that `call` describes, with A, B and C of type `data` and sums in f32.
    ///
    /// # Safety
    /// The matrices lie in live memory of `device`, which is this library's.
    pub(super) unsafe fn gemm(
        &self,
        device: &Device,
        data: DataType,
        call: &GemmCall,
    ) -> Result<()> {
        let gemm: Symbol<'_, GemmExFn> = self.cublas.symbol(c"cublasGemmEx")?;
        device.raw_stream()?;
        let scalar = |v: &f32| std::ptr::from_ref(v).cast::<c_void>();
        let GemmCall { m, n, k, a, b, c, .. } = *call;
        let data = data as c_int;
        // SAFETY: the signature is that of cublas_api.h. The caller guarantees the matrices. Scalars are
        // on the host, which is the default, and read before the call returns.
        let code = unsafe {
            gemm(
                self.cublas.handle,
                a.op as c_int,
                b.op as c_int,
                m,
                n,
                k,
                scalar(&call.alpha),
                a.matrix.address,
                data,
                a.matrix.stride,
                b.matrix.address,
                data,
                b.matrix.stride,
                scalar(&call.beta),
                c.address,
                data,
                c.stride,
                COMPUTE_F32,
                DEFAULT,
            )
        };
        self.cublas.check("multiply", code)
    }

    /// The upper triangle of C [n, n] += A · Aᵀ, A [n, k], f32.
    ///
    /// # Safety
    /// As for [`CudaLibraries::gemm`].
    pub(super) unsafe fn syrk(
        &self,
        device: &Device,
        n: i32,
        k: i32,
        a: ColumnMajor,
        c: ColumnMajor,
    ) -> Result<()> {
        let syrk: Symbol<'_, SsyrkFn> = self.cublas.symbol(c"cublasSsyrk_v2")?;
        device.raw_stream()?;
        let one = 1.0f32;
        // SAFETY: as above.
        let code = unsafe {
            syrk(
                self.cublas.handle,
                UPPER,
                MatrixOp::None as c_int,
                n,
                k,
                &raw const one,
                a.address,
                a.stride,
                &raw const one,
                c.address,
                c.stride,
            )
        };
        self.cublas.check("sum the Hessian", code)
    }

    /// B [n, n] = B · A⁻¹ with A [n, n] upper triangular, f64.
    ///
    /// # Safety
    /// As for [`CudaLibraries::gemm`].
    pub(super) unsafe fn trsm(
        &self,
        device: &Device,
        n: i32,
        a: ColumnMajor,
        b: ColumnMajor,
    ) -> Result<()> {
        let trsm: Symbol<'_, DtrsmFn> = self.cublas.symbol(c"cublasDtrsm_v2")?;
        device.raw_stream()?;
        let one = 1.0f64;
        // SAFETY: as above.
        let code = unsafe {
            trsm(
                self.cublas.handle,
                RIGHT,
                UPPER,
                MatrixOp::None as c_int,
                NON_UNIT,
                n,
                n,
                &raw const one,
                a.address,
                a.stride,
                b.address,
                b.stride,
            )
        };
        self.cublas.check("invert a triangle", code)
    }

    /// Replaces the upper triangle of A [n, n] by that of U with Uᵀ U = A, f64. Returns the `info` of LAPACK.
    ///
    /// # Safety
    /// As for [`CudaLibraries::gemm`].
    pub(super) unsafe fn potrf(&mut self, device: &Device, n: i32, a: ColumnMajor) -> Result<i32> {
        let solver = match self.cusolver.take() {
            Some(solver) => solver,
            None => Cusolver {
                opened: OpenLibrary::new(&CUSOLVER, device)?,
                workspace: device.zeros("a factorization", 0)?,
                info: device.zeros("a factorization", 1)?,
            },
        };
        let solver = self.cusolver.insert(solver);
        device.raw_stream()?;
        let handle = solver.opened.handle;
        let mut length = 0;
        let size: Symbol<'_, DpotrfSizeFn> =
            solver.opened.symbol(c"cusolverDnDpotrf_bufferSize")?;
        // SAFETY: the signature is that of cusolverDn.h. The matrix is not read.
        let code = unsafe { size(handle, UPPER, n, a.address, a.stride, &raw mut length) };
        solver.opened.check("plan a factorization", code)?;
        let needed = usize::try_from(length).unwrap_or(0);
        if needed > solver.workspace.len() {
            solver.workspace = device.zeros("a factorization", needed)?;
        }
        let potrf: Symbol<'_, DpotrfFn> = solver.opened.symbol(c"cusolverDnDpotrf")?;
        let (workspace, info) = (solver.workspace.address(), solver.info.address());
        // SAFETY: the signature is that of cusolverDn.h. The caller guarantees the matrix, the workspace
        // is as large as the library requires, and there is room for one integer.
        let code = unsafe { potrf(handle, UPPER, n, a.address, a.stride, workspace, length, info) };
        solver.opened.check("factorize", code)?;
        let mut found = [0];
        solver.info.read(&mut found)?;
        Ok(found[0])
    }
}

/// Names and paths to try, in order.
fn candidates(names: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    for folder in folders() {
        found.extend(names.iter().map(|name| folder.join(name)).filter(|file| file.is_file()));
    }
    found
}
