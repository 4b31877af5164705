//! The machine: memory, disks and threads, and whether they suffice.

use std::path::Path;

use stb_runtime::{Error, Result};

/// The default number of threads of conversions: as many as this process may use.
#[must_use]
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that are free for programs; `None` where the system does not say (only Linux does).
#[must_use]
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kilobytes.saturating_mul(1024))
}

/// Fails before hours of work if less than `needed` bytes of memory are available (checked on Linux only). The
/// message begins with `what`, which needs the memory, and ends with `advice`.
pub(crate) fn check_memory(needed: u64, what: &str, advice: impl Fn() -> String) -> Result<()> {
    match available_memory() {
        Some(available) if needed > available => Err(Error::usage(format!(
            "{what} needs up to {} MB of memory, {} MB are available: {}",
            needed / 1_000_000,
            available / 1_000_000,
            advice()
        ))),
        _ => Ok(()),
    }
}

/// Fails before hours of work if the file system of `out` has less than `needed` bytes left.
pub(crate) fn check_disk(out: &Path, needed: u64) -> Result<()> {
    let folder = folder_of(out);
    // A folder that does not exist is reported when the file is created.
    match fs4::available_space(folder) {
        Ok(available) if needed > available => Err(Error::usage(format!(
            "the conversion needs up to {} MB of disk space, {} has {} MB: free some, or write to another disk",
            needed / 1_000_000,
            folder.display(),
            available / 1_000_000
        ))),
        _ => Ok(()),
    }
}

/// The folder of a file.
pub(crate) fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
