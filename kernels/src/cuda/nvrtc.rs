//! NVRTC, the run-time compiler of CUDA C++, loaded by path.
//!
//! Not through cudarc: that panics where the library is absent, cannot take a path, and knows the names
//! of one version only; NVRTC from a package registry lies outside the loader's path.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

use libloading::{Library, Symbol};

use super::{Error, Result};

/// NVRTC's handle of a program.
type Program = *mut c_void;
/// `NVRTC_SUCCESS`.
const SUCCESS: c_int = 0;

/// The loaded compiler.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    /// Where it was found.
    path: PathBuf,
    version: (u32, u32),
    /// Its second part, kept loaded.
    _builtins: Option<Library>,
}

/// What NVRTC makes of a source.
pub(super) struct Compiled {
    pub image: Vec<u8>,
    pub log: String,
}

/// A program that is destroyed in the end.
struct Session<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
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
        // NVRTC opens its second part by name alone, which the loader finds only in its own path: unless it is loaded
        // already.
        let builtins = format!("libnvrtc-builtins.so.{major}.{minor}");
        if let Some(folder) = nvrtc.path.parent().filter(|folder| *folder != Path::new("")) {
            // SAFETY: as for NVRTC itself, beside which it lies.
            nvrtc._builtins = unsafe { Library::new(folder.join(builtins)) }.ok();
        }
        Ok(nvrtc)
    }

    /// Major and minor number.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was found.
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

    /// Architectures it has code generators for: 80 for `sm_80`.
    pub(super) fn architectures(&self) -> Result<Vec<u32>> {
        type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
        type List = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut count = 0;
        let get = self.symbol::<Count>(c"nvrtcGetNumSupportedArchs")?;
        // SAFETY: the signature is that of nvrtc.h; the pointer is valid.
        self.check(unsafe { get(&raw mut count) })?;
        let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
        let get = self.symbol::<List>(c"nvrtcGetSupportedArchs")?;
        // SAFETY: the list has room for as many numbers as the library has just said.
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

    /// Compiles `source` with `headers` (name, text); `ptx` for PTX, else a CUBIN.
    ///
    /// # Errors
    /// The log of the compiler, or [`Error::Compiler`] as its text.
    pub(super) fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        options: &[String],
        ptx: bool,
    ) -> std::result::Result<Compiled, String> {
        let text = |s: &str| CString::new(s).map_err(|e| e.to_string());
        let (name, source) = (text(name)?, text(source)?);
        let names =
            headers.iter().map(|h| text(h.0)).collect::<std::result::Result<Vec<_>, _>>()?;
        let texts =
            headers.iter().map(|h| text(h.1)).collect::<std::result::Result<Vec<_>, _>>()?;
        let options =
            options.iter().map(|o| text(o)).collect::<std::result::Result<Vec<_>, _>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));

        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        let fail = |e: Error| e.to_string();
        let create = self.symbol::<Create>(c"nvrtcCreateProgram").map_err(fail)?;
        let compile = self.symbol::<Compile>(c"nvrtcCompileProgram").map_err(fail)?;
        let mut session = Session { nvrtc: self, program: null_mut() };
        // SAFETY: all strings end with zero and outlive the call, and the two arrays have as many of
        // them as the count says. NVRTC copies what it keeps.
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
        Ok(Compiled { image: image.map_err(fail)?, log })
    }
}

impl Session<'_> {
    /// An output of the program, by the functions for its size and its bytes.
    fn bytes(&self, size: &CStr, get: &CStr) -> Result<Vec<u8>> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        let (size, get) = (self.nvrtc.symbol::<Size>(size)?, self.nvrtc.symbol::<Get>(get)?);
        let mut length = 0;
        // SAFETY: the program is live and the pointer valid; all sizes have this signature.
        self.nvrtc.check(unsafe { size(self.program, &raw mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: the buffer has the size that the library has just asked for.
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

/// Folders of Python's packages with libraries: all of CUDA 13, those of CUDA 12 one by one.
const PACKAGES: [&str; 5] = ["cu13", "cuda_nvrtc", "cublas", "cusolver", "cu12"];

/// Where the toolkit and Python's packages put libraries.
pub(super) fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in ["CUDA_PATH", "CUDA_HOME", "CUDA_ROOT"] {
        if let Some(root) = env::var_os(variable).map(PathBuf::from) {
            folders.extend(["lib64", "lib", "bin"].map(|sub| root.join(sub)));
        }
    }
    for root in children("/usr/local".into(), "cuda") {
        folders.push(root.join("lib64"));
    }
    folders.extend(
        [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib64",
            "/opt/cuda/lib64",
        ]
        .map(PathBuf::from),
    );
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let home = variable("HOME").map(|home| home.join(".local"));
    let prefixes = [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX"), home];
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    // Of environments that are on the path without being active.
    let path = env::var_os("PATH").unwrap_or_default();
    let pythons = env::split_paths(&path)
        .filter(|bin| bin.ends_with("bin") && bin.join("python3").is_file())
        .filter_map(|bin| bin.parent().map(Path::to_owned));
    for prefix in prefixes.into_iter().flatten().chain(pythons).chain(system) {
        folders.push(prefix.join("lib"));
        for python in children(prefix.join("lib"), "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                folders.extend(PACKAGES.map(|package| nvidia.join(package).join("lib")));
            }
        }
        // Windows.
        let nvidia = prefix.join("Lib").join("site-packages").join("nvidia");
        folders.extend(PACKAGES.map(|package| nvidia.join(package).join("bin")));
    }
    folders
}

/// Entries of `folder` whose names start with `prefix`, in order.
fn children(folder: PathBuf, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}
