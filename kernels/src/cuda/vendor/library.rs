//! cuBLAS and cuSOLVER themselves, where they are installed. They are looked for where NVRTC is: cudarc's own
//! bindings know only the loader's path, not the packages of Python.

use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;

use libloading::{Library as Loaded, Symbol};

use super::super::device::{Buffer, Device};
use super::super::nvrtc::folders;
use super::super::{Error, Result};
use super::{Columns, Number, Op};

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
type Ssyrk = unsafe extern "C" fn(
    Handle,
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
type Dtrsm = unsafe extern "C" fn(
    Handle,
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
type DpotrfSize = unsafe extern "C" fn(Handle, c_int, c_int, u64, c_int, *mut c_int) -> c_int;
type Dpotrf = unsafe extern "C" fn(Handle, c_int, c_int, u64, c_int, u64, c_int, u64) -> c_int;

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
struct Opened {
    /// For the rest of the process: the library does not bear being unloaded while the device is in use.
    library: &'static Loaded,
    handle: Handle,
    destroy: &'static CStr,
    name: &'static str,
    device: Device,
}

/// How a library is called and found.
struct Names {
    name: &'static str,
    package: &'static str,
    files: &'static [&'static str],
    create: &'static CStr,
    destroy: &'static CStr,
    set_stream: &'static CStr,
}

const CUBLAS: Names = Names {
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
const CUSOLVER: Names = Names {
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

impl Opened {
    fn new(names: &Names, device: &Device) -> Result<Self> {
        let Names { name, package, .. } = *names;
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
                // A name that the loader does not know is no news.
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

    fn start(library: Loaded, names: &Names, device: &Device, stream: *mut c_void) -> Result<Self> {
        let name = names.name;
        let missing = |what: &str| Error::Library { why: format!("{name}: {what}") };
        let library = Box::leak(Box::new(library));
        let device = device.clone();
        let mut opened = Self { library, handle: null_mut(), destroy: names.destroy, name, device };
        let mut handle = null_mut();
        // SAFETY: the signature is that of the library's header; the context of the device is bound.
        let code = unsafe { opened.symbol::<Create>(names.create)?(&raw mut handle) };
        if code != 0 {
            return Err(missing(&format!("error {code} at the start")));
        }
        opened.handle = handle;
        // SAFETY: as above; the stream lives as long as the device, which whoever calls this keeps.
        let code = unsafe { opened.symbol::<SetStream>(names.set_stream)?(handle, stream) };
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

impl Drop for Opened {
    fn drop(&mut self) {
        if !self.handle.is_null()
            && self.device.raw_stream().is_ok()
            && let Ok(destroy) = self.symbol::<Destroy>(self.destroy)
        {
            // SAFETY: the handle is of this library and is not used again.
            unsafe { destroy(self.handle) };
        }
    }
}

/// cuSOLVER with the memory it works in.
#[derive(Debug)]
struct Solver {
    opened: Opened,
    work: Buffer<f64>,
    info: Buffer<i32>,
}

/// Both libraries for one device; cuSOLVER from the first time it is needed.
#[derive(Debug)]
pub(super) struct Library {
    cublas: Opened,
    cusolver: Option<Solver>,
}

// SAFETY: the libraries' handles may be used from any thread that has bound the context, one at a time: every
// call binds it (`raw_stream`), and what could run at once takes `&mut self` or is behind the owner's lock.
unsafe impl Send for Library {}

impl Library {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { cublas: Opened::new(&CUBLAS, device)?, cusolver: None })
    }

    /// # Safety
    /// The matrices lie in live memory of `device`, which is this library's.
    pub(super) unsafe fn gemm(
        &self,
        device: &Device,
        number: Number,
        [op_a, op_b]: [Op; 2],
        [m, n, k]: [i32; 3],
        alpha: f32,
        a: Columns,
        b: Columns,
        beta: f32,
        c: Columns,
    ) -> Result<()> {
        let gemm: Symbol<'_, GemmEx> = self.cublas.symbol(c"cublasGemmEx")?;
        device.raw_stream()?;
        let scalar = |v: &f32| std::ptr::from_ref(v).cast::<c_void>();
        let number = number as c_int;
        // SAFETY: the signature is that of cublas_api.h; the matrices are the caller's promise; scalars are on
        // the host, the default, and read before the call returns.
        let code = unsafe {
            gemm(
                self.cublas.handle,
                op_a as c_int,
                op_b as c_int,
                m,
                n,
                k,
                scalar(&alpha),
                a.address,
                number,
                a.stride,
                b.address,
                number,
                b.stride,
                scalar(&beta),
                c.address,
                number,
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
    /// As for [`Library::gemm`].
    pub(super) unsafe fn syrk(
        &self,
        device: &Device,
        n: i32,
        k: i32,
        a: Columns,
        c: Columns,
    ) -> Result<()> {
        let syrk: Symbol<'_, Ssyrk> = self.cublas.symbol(c"cublasSsyrk_v2")?;
        device.raw_stream()?;
        let one = 1.0f32;
        // SAFETY: as above.
        let code = unsafe {
            syrk(
                self.cublas.handle,
                UPPER,
                Op::None as c_int,
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
        self.cublas.check("sum second moments", code)
    }

    /// B [n, n] = B · A⁻¹ with A [n, n] upper triangular, f64.
    ///
    /// # Safety
    /// As for [`Library::gemm`].
    pub(super) unsafe fn trsm(
        &self,
        device: &Device,
        n: i32,
        a: Columns,
        b: Columns,
    ) -> Result<()> {
        let trsm: Symbol<'_, Dtrsm> = self.cublas.symbol(c"cublasDtrsm_v2")?;
        device.raw_stream()?;
        let one = 1.0f64;
        // SAFETY: as above.
        let code = unsafe {
            trsm(
                self.cublas.handle,
                RIGHT,
                UPPER,
                Op::None as c_int,
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

    /// The upper triangle of A [n, n] becomes that of U with Uᵀ U = A, f64. What LAPACK calls info.
    ///
    /// # Safety
    /// As for [`Library::gemm`].
    pub(super) unsafe fn potrf(&mut self, device: &Device, n: i32, a: Columns) -> Result<i32> {
        let solver = match self.cusolver.take() {
            Some(solver) => solver,
            None => Solver {
                opened: Opened::new(&CUSOLVER, device)?,
                work: device.zeros("a factorization", 0)?,
                info: device.zeros("a factorization", 1)?,
            },
        };
        let solver = self.cusolver.insert(solver);
        device.raw_stream()?;
        let handle = solver.opened.handle;
        let mut work = 0;
        let size: Symbol<'_, DpotrfSize> = solver.opened.symbol(c"cusolverDnDpotrf_bufferSize")?;
        // SAFETY: the signature is that of cusolverDn.h; nothing of the matrix is read.
        let code = unsafe { size(handle, UPPER, n, a.address, a.stride, &raw mut work) };
        solver.opened.check("plan a factorization", code)?;
        let needed = usize::try_from(work).unwrap_or(0);
        if needed > solver.work.len() {
            solver.work = device.zeros("a factorization", needed)?;
        }
        let potrf: Symbol<'_, Dpotrf> = solver.opened.symbol(c"cusolverDnDpotrf")?;
        let (space, info) = (solver.work.address(), solver.info.address());
        // SAFETY: the signature is that of cusolverDn.h; the matrix is the caller's promise; the work space is as
        // large as was asked for, and there is room for one integer.
        let code = unsafe { potrf(handle, UPPER, n, a.address, a.stride, space, work, info) };
        solver.opened.check("factorize", code)?;
        let mut found = [0];
        solver.info.read(&mut found)?;
        Ok(found[0])
    }
}

fn candidates(names: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    for folder in folders() {
        found.extend(names.iter().map(|name| folder.join(name)).filter(|file| file.is_file()));
    }
    found
}
