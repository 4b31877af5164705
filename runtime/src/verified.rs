//! Large files whose checksums were compared before: while they do not change, comparing them again is a waste.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A file that was changed so recently may change again without another time of change.
const SETTLED: Duration = Duration::from_secs(2);

/// The files that were found intact, in the cache folder of the user.
#[derive(Debug)]
pub(crate) struct VerifiedFiles {
    /// `None` without a cache folder: nothing is remembered.
    folder: Option<PathBuf>,
}

impl VerifiedFiles {
    /// The folder is that of `STB_CACHE`, or `stb` in the cache folder of the user.
    pub(crate) fn of_user() -> Self {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let base = || {
            let cache = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
            let home = || variable("HOME").map(|home| home.join(".cache"));
            cache.or_else(home).map(|cache| cache.join("stb"))
        };
        let own = variable("STB_CACHE").filter(|path| !path.as_os_str().is_empty());
        let folder = own.or_else(base).filter(|path| path.is_absolute());
        Self { folder: folder.map(|folder| folder.join("verified")) }
    }

    /// Whether the file was found intact and is the same since.
    pub(crate) fn has(&self, file: &Path) -> bool {
        let Some((entry, identity)) = self.entry(file) else { return false };
        std::fs::read(entry).is_ok_and(|found| found == identity.as_bytes())
    }

    /// Remembers that the file is intact. Nothing depends on it: a failure to write only costs time later.
    pub(crate) fn remember(&self, file: &Path) {
        if let Some((entry, identity)) = self.entry(file)
            && let Some(folder) = entry.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            let _ = std::fs::write(entry, identity);
        }
    }

    /// The entry of a file in the cache, and what tells this file from others and from its later versions: path, size,
    /// time of change, and number in its file system. `None` if it cannot be told.
    fn entry(&self, file: &Path) -> Option<(PathBuf, String)> {
        let path = file.canonicalize().ok()?;
        let metadata = path.metadata().ok()?;
        let modified = metadata.modified().ok()?;
        if SystemTime::now().duration_since(modified).ok()? < SETTLED {
            return None;
        }
        let time = modified.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        let number = file_number(&metadata);
        let identity = format!("{}\n{} {time} {number}\n", path.display(), metadata.len());
        // One entry for each path.
        let name = stb_format::checksum(path.as_os_str().as_encoded_bytes());
        Some((self.folder.as_ref()?.join(format!("{name:016x}")), identity))
    }
}

/// The number of a file in its file system, which a replaced file does not keep, and the time of its last change of
/// any kind, which cannot be set.
#[cfg(unix)]
fn file_number(metadata: &std::fs::Metadata) -> String {
    use std::os::unix::fs::MetadataExt;
    let (device, inode) = (metadata.dev(), metadata.ino());
    format!("{device} {inode} {} {}", metadata.ctime(), metadata.ctime_nsec())
}

#[cfg(not(unix))]
fn file_number(_: &std::fs::Metadata) -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets the time of change, to `seconds` ago.
    fn age(file: &Path, seconds: u64) {
        let file = std::fs::File::options().append(true).open(file).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }

    #[test]
    fn files_are_known_until_they_change() {
        let folder = tempfile::tempdir().unwrap();
        let verified = VerifiedFiles { folder: Some(folder.path().join("cache/verified")) };
        let file = folder.path().join("a.stb");
        std::fs::write(&file, "one").unwrap();
        // It may change within the resolution of the clock.
        verified.remember(&file);
        assert!(!verified.has(&file));
        age(&file, 100);
        assert!(!verified.has(&file));
        verified.remember(&file);
        assert!(verified.has(&file));
        age(&file, 50);
        assert!(!verified.has(&file));
        verified.remember(&file);
        assert!(verified.has(&file));
        // A replaced file of the same size.
        let other = folder.path().join("b.stb");
        std::fs::write(&other, "two").unwrap();
        age(&other, 50);
        std::fs::rename(&other, &file).unwrap();
        assert!(!verified.has(&file));
        assert_eq!(std::fs::read_dir(folder.path().join("cache/verified")).unwrap().count(), 1);
        assert!(!verified.has(&other));
        let nowhere = VerifiedFiles { folder: None };
        nowhere.remember(&file);
        assert!(!nowhere.has(&file));
    }
}
