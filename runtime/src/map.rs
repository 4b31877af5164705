//! [`Bytes`]: memory-mapped or owned bytes. Only this module maps files, and says what happened when one of them lost
//! its pages.

use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::path::Path;

use crate::error::{Error, Result};

/// Bytes of a mapped file, or of a buffer in memory.
#[derive(Debug)]
pub enum Bytes {
    /// Pages of the file, loaded when touched and shared between processes.
    Mapped(memmap2::Mmap),
    /// A copy in memory and its length in bytes. Its elements align tensors to 64 bytes, as
    /// in a mapping.
    Read(Vec<Line>, usize),
    /// Values in memory, such as dequantized weights.
    Floats(Vec<f32>),
}

/// A cache line. Buffers of copied files consist of these for an alignment of 64 bytes.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

impl Bytes {
    /// Opens `path`: maps it if `map` is set, else copies it into memory.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or is not a regular file.
    pub fn open(path: &Path, map: bool) -> Result<Self> {
        let fail = |e| Error::io(path, e);
        let mut file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() {
            let kind = std::io::ErrorKind::InvalidInput;
            return Err(fail(std::io::Error::new(kind, "not a regular file")));
        }
        let length = usize::try_from(metadata.len())
            .map_err(|_| fail(std::io::ErrorKind::FileTooLarge.into()))?;
        if map && length != 0 {
            // SAFETY: the mapping is private to this value and read-only, and no reference to it
            // outlives `Self`. All values read from it are validated or plain numbers. No system call
            // can prevent another process from changing or truncating the file while it is mapped;
            // the documentation makes that the user's responsibility. A page that is gone raises SIGBUS,
            // see `explain_sigbus`.
            return Ok(Self::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?));
        }
        let mut lines = vec![Line([0; 64]); length.div_ceil(64)];
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        file.read_exact(&mut buffer[..length]).map_err(fail)?;
        Ok(Self::Read(lines, length))
    }

    /// Locks mapped pages in memory: they are loaded immediately and never paged out.
    ///
    /// # Errors
    /// If the system refuses (see `ulimit -l`), or the bytes are not a mapping.
    pub fn lock(&self) -> std::io::Result<()> {
        match self {
            #[cfg(unix)]
            Self::Mapped(map) => map.lock(),
            _ => Err(std::io::Error::new(
                std::io::ErrorKind::Unsupported,
                "only a mapped file can be locked in memory",
            )),
        }
    }

    /// A copy of `bytes`, aligned like a mapping.
    #[must_use]
    pub fn copied(bytes: &[u8]) -> Self {
        let mut lines = vec![Line([0; 64]); bytes.len().div_ceil(64)];
        bytemuck::cast_slice_mut::<_, u8>(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Self::Read(lines, bytes.len())
    }
}

/// What a program prints before it ends because a mapped page is gone.
#[cfg(all(unix, not(target_vendor = "apple")))]
const SIGBUS_MESSAGE: &[u8] =
    b"a model file was truncated while it was in use, or its disk failed; replace a model file \
    by renaming a new one over it, not by overwriting it, and start again\n";

/// Lets the program end with a message and exit code 3 when a page of a mapped file is gone, because another program has
/// truncated the file or its disk failed; the system would end it with the words "Bus error". For programs, not for
/// libraries: it replaces the handler of SIGBUS. Does nothing on systems where a stack overflow raises the same signal.
pub fn explain_sigbus() {
    #[cfg(all(unix, not(target_vendor = "apple")))]
    {
        extern "C" fn handler(_: libc::c_int) {
            // SAFETY: the function may be called in a signal handler, and the text is a constant of this length.
            unsafe {
                libc::write(
                    libc::STDERR_FILENO,
                    SIGBUS_MESSAGE.as_ptr().cast(),
                    SIGBUS_MESSAGE.len(),
                );
            }
            // SAFETY: the function may be called in a signal handler.
            unsafe { libc::_exit(3) };
        }
        // SAFETY: a `sigaction` of zeros is valid: no flags, and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler touches no memory but a constant and does not return. The pointer to the old action may
        // be null.
        unsafe {
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(lines, length) => &bytemuck::cast_slice(lines)[..*length],
            Self::Floats(values) => bytemuck::cast_slice(values),
        }
    }
}
