//! The one place where files are mapped into memory.

use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::path::Path;

use crate::error::{Error, Result};

/// The bytes of a file, mapped or read, or values made in memory.
#[derive(Debug)]
pub enum Bytes {
    /// Pages of the file, loaded when touched and shared between processes.
    Mapped(memmap2::Mmap),
    /// A copy in memory. Cache-line-sized elements give the alignment of a mapping's tensors.
    Read(Vec<Line>, usize),
    /// Numbers made in memory, such as dequantized weights.
    Floats(Vec<f32>),
}

/// A cache line: what buffers of copied files are made of, for the alignment of 64 bytes.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

impl Bytes {
    /// Opens `path`, mapped if `map` is set, else copied into memory.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read or is not a regular file.
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
            // SAFETY: the mapping is private to this value and read-only. That the file is not
            // changed or cut while it is mapped is asked of the user in the documentation: no
            // operating system call can guarantee it. All values read from it are validated or
            // plain numbers, and no reference to it outlives `Self`.
            return Ok(Self::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?));
        }
        let mut lines = vec![Line([0; 64]); length.div_ceil(64)];
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        file.read_exact(&mut buffer[..length]).map_err(fail)?;
        Ok(Self::Read(lines, length))
    }

    /// Locks mapped pages in memory: they are loaded now and never paged out.
    ///
    /// # Errors
    /// If the system refuses (see `ulimit -l`), or it is no mapping.
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
