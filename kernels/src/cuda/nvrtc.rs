//! NVRTC, the run-time compiler of CUDA C++, loaded by path.
//!
//! cudarc is not used for this: it panics if the library is missing, takes no path, and knows the file
//! names of one version only. NVRTC from a package registry is not in the loader's path.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

use libloading::{Library, Symbol};

use super::error::{Error, Result};
use super::library_paths::folders;
use super::module::Header;

/// `nvrtcProgram`.
type NvrtcProgram = *mut c_void;
/// `NVRTC_SUCCESS`.
const SUCCESS: c_int = 0;

/// The loaded compiler.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    /// The path it was loaded from.
    path: PathBuf,
    version: (u32, u32),
    /// Its second library, kept loaded.
    _builtins: Option<Library>,
}

/// The output of NVRTC.
pub(super) struct NvrtcOutput {
    pub image: Vec<u8>,
    pub log: String,
}

/// A program, destroyed when dropped.
struct NvrtcSession<'a> {
    nvrtc: &'a Nvrtc,
    program: NvrtcProgram,
}

impl Drop for NvrtcSession<'_> {
    fn drop(&mut self) {
        type Destroy = unsafe extern "C" fn(*mut NvrtcProgram) -> c_int;
        if let Ok(destroy) = self.nvrtc.symbol::<Destroy>(c"nvrtcDestroyProgram") {
            // SAFETY: `program` was made by nvrtcCreateProgram and is destroyed once, here.
            unsafe { destroy(&raw mut self.program) };
        }
    }
}

impl Nvrtc {
    /// Loads NVRTC: `STB_NVRTC` if that is set, else the newest version up to `newest` (its major
    /// number, that of the driver; 0 for any) from the loader's path and the usual places.
    ///
    /// # Errors
    /// [`Error::Compiler`] with what to install.
    pub fn load(newest: u32) -> Result<Self> {
        if let Some(path) = env::var_os("STB_NVRTC") {
            let path = PathBuf::from(path);
            return Self::open(path.clone()).map_err(|e| Error::Compiler {
                why: format!("STB_NVRTC={}: {e}", path.display()),
            });
        }
        let mut too_new = None;
        for path in candidates() {
            let Ok(found) = Self::open(path) else { continue };
            if newest == 0 || found.version.0 <= newest {
                return Ok(found);
            }
            too_new.get_or_insert(found);
        }
        let install = match newest {
            0 | 13.. => "`pip install nvidia-cuda-nvrtc`".to_owned(),
            major => format!("`pip install nvidia-cuda-nvrtc-cu{major}`"),
        };
        let why = match too_new {
            Some(found) => format!(
                "the driver supports CUDA {newest}, but NVRTC in {} is version {}.{}: install an \
                 older one ({install}) or a newer driver",
                found.path.display(),
                found.version.0,
                found.version.1
            ),
            None => format!(
                "kernels are compiled for the device by NVRTC, which is not installed: {install}, or \
                 install the CUDA toolkit, or set STB_NVRTC to the library"
            ),
        };
        Err(Error::Compiler { why })
    }

    fn open(path: PathBuf) -> std::result::Result<Self, String> {
        // SAFETY: NVRTC's initializers may run in any thread and have no preconditions. The path is
        // the user's, a name the system's loader resolves, or in a folder of installed libraries.
        let library = unsafe { Library::new(&path) }.map_err(|e| e.to_string())?;
        let mut nvrtc = Self { library, path, version: (0, 0), _builtins: None };
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let (mut major, mut minor) = (0, 0);
        let version = nvrtc.symbol::<Version>(c"nvrtcVersion").map_err(|e| e.to_string())?;
        // SAFETY: the signature is that of nvrtc.h in all versions; both pointers are valid.
        let code = unsafe { version(&raw mut major, &raw mut minor) };
        if code != SUCCESS {
            return Err(format!("nvrtcVersion: {code}"));
        }
        nvrtc.version = (major.unsigned_abs(), minor.unsigned_abs());
        // NVRTC opens its second library by name. The loader finds it in its own path, or if it is loaded
        // already.
        let builtins = format!("libnvrtc-builtins.so.{major}.{minor}");
        if let Some(folder) = nvrtc.path.parent().filter(|folder| *folder != Path::new("")) {
            // SAFETY: as for NVRTC itself, in whose folder it is.
            nvrtc._builtins = unsafe { Library::new(folder.join(builtins)) }.ok();
        }
        Ok(nvrtc)
    }

    /// The version, major and minor.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The path it was loaded from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn symbol<T>(&self, name: &CStr) -> Result<Symbol<'_, T>> {
        // SAFETY: every caller gives the type that nvrtc.h declares for the name.
        unsafe { self.library.get(name) }.map_err(|e| Error::Compiler {
            why: format!("{} is no NVRTC: {e}", self.path.display()),
        })
    }

    /// The architectures that it compiles for: 80 for `sm_80`.
    pub(super) fn architectures(&self) -> Result<Vec<u32>> {
        type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
        type List = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut count = 0;
        let get = self.symbol::<Count>(c"nvrtcGetNumSupportedArchs")?;
        // SAFETY: the signature is that of nvrtc.h; the pointer is valid.
        self.check(unsafe { get(&raw mut count) })?;
        let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
        let get = self.symbol::<List>(c"nvrtcGetSupportedArchs")?;
        // SAFETY: the list has room for as many numbers as the library has just returned.
        self.check(unsafe { get(list.as_mut_ptr()) })?;
        Ok(list.into_iter().map(c_int::unsigned_abs).collect())
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(Error::Compiler {
            why: format!("NVRTC in {} failed: {}", self.path.display(), self.error_text(code)),
        })
    }

    fn error_text(&self, code: c_int) -> String {
        type Text = unsafe extern "C" fn(c_int) -> *const c_char;
        let Ok(text) = self.symbol::<Text>(c"nvrtcGetErrorString") else { return code.to_string() };
        // SAFETY: takes any number and returns a static string or null.
        let text = unsafe { text(code) };
        if text.is_null() {
            return code.to_string();
        }
        // SAFETY: not null, so a static string that ends with zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Compiles `source` with `headers`, to PTX or else to a CUBIN.
    ///
    /// # Errors
    /// The log of the compiler, or the text of an [`Error::Compiler`].
    pub(super) fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[Header],
        options: &[String],
        ptx: bool,
    ) -> std::result::Result<NvrtcOutput, String> {
        let text = |s: &str| CString::new(s).map_err(|e| e.to_string());
        let (name, source) = (text(name)?, text(source)?);
        let names =
            headers.iter().map(|h| text(h.name)).collect::<std::result::Result<Vec<_>, _>>()?;
        let texts =
            headers.iter().map(|h| text(h.text)).collect::<std::result::Result<Vec<_>, _>>()?;
        let options =
            options.iter().map(|o| text(o)).collect::<std::result::Result<Vec<_>, _>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));

        type Create = unsafe extern "C" fn(
            *mut NvrtcProgram,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(NvrtcProgram, c_int, *const *const c_char) -> c_int;
        let fail = |e: Error| e.to_string();
        let create = self.symbol::<Create>(c"nvrtcCreateProgram").map_err(fail)?;
        let compile = self.symbol::<Compile>(c"nvrtcCompileProgram").map_err(fail)?;
        let mut session = NvrtcSession { nvrtc: self, program: null_mut() };
        // SAFETY: all strings end with zero and outlive the call, and the two arrays have as many
        // strings as the count says. NVRTC copies the strings that it keeps.
        let code = unsafe {
            create(
                &raw mut session.program,
                source.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check(code).map_err(fail)?;
        // SAFETY: the program is live; the array has as many strings as the count says.
        let code = unsafe { compile(session.program, options.len() as c_int, options.as_ptr()) };
        let log = session.bytes(c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog").map_err(fail)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        if code != SUCCESS {
            return Err(format!("{}\n{log}", self.error_text(code)));
        }
        let image = if ptx {
            session.bytes(c"nvrtcGetPTXSize", c"nvrtcGetPTX")
        } else {
            session.bytes(c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN")
        };
        Ok(NvrtcOutput { image: image.map_err(fail)?, log })
    }
}

impl NvrtcSession<'_> {
    /// An output of the program, from the functions that return its size and its bytes.
    fn bytes(&self, size: &CStr, get: &CStr) -> Result<Vec<u8>> {
        type Size = unsafe extern "C" fn(NvrtcProgram, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(NvrtcProgram, *mut c_char) -> c_int;
        let (size, get) = (self.nvrtc.symbol::<Size>(size)?, self.nvrtc.symbol::<Get>(get)?);
        let mut length = 0;
        // SAFETY: the program is live and the pointer valid; all sizes have this signature.
        self.nvrtc.check(unsafe { size(self.program, &raw mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: the buffer has the size that the library has just returned.
        self.nvrtc.check(unsafe { get(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

/// Names and paths to try, in order.
fn candidates() -> Vec<PathBuf> {
    let names: &[&str] = if cfg!(windows) {
        &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    };
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    for folder in folders() {
        let files = names.iter().map(|name| folder.join(name));
        found.extend(files.filter(|file| file.is_file()));
    }
    found
}
