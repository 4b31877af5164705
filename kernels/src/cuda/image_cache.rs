//! The disk cache of compiled kernels. A file that is damaged or cannot be written counts as absent:
//! the kernels are then compiled again.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// First bytes of a file; the last one is the version of this layout.
const MAGIC: [u8; 8] = *b"stbcuda\x01";
/// Magic, key, checksum.
const HEADER: usize = 8 + 16 + 8;
/// The largest file that is read. All images are far smaller.
const MOST_BYTES: u64 = 64 << 20;

/// A folder of images by key.
#[derive(Clone, Debug)]
pub(super) struct ImageCache {
    folder: PathBuf,
}

/// A hash of everything that an image depends on.
#[derive(Default)]
pub(super) struct ImageKey(Xxh3);

impl ImageKey {
    /// Adds one part. The hash depends on where one part ends and the next begins.
    pub(super) fn add(&mut self, part: &str) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part.as_bytes());
    }

    /// The hash.
    pub(super) fn value(&self) -> u128 {
        self.0.digest128()
    }
}

impl ImageCache {
    /// A cache in `folder`.
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The cache in `STB_CACHE`, or else in the user's cache folder; `None` if there is neither.
    pub(super) fn of_user() -> Option<Self> {
        let path = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(folder) = path("STB_CACHE") {
            return Some(Self::new(folder));
        }
        let base = if cfg!(windows) {
            path("LOCALAPPDATA")
        } else {
            path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")))
        };
        base.filter(|p| p.is_absolute()).map(|base| Self::new(base.join("stb").join("cuda")))
    }

    fn path(&self, key: u128) -> PathBuf {
        self.folder.join(format!("{key:032x}.image"))
    }

    /// The image of `key`, if the cache has a valid one.
    pub(super) fn get(&self, key: u128) -> Option<Vec<u8>> {
        let path = self.path(key);
        if fs::metadata(&path).ok()?.len() > MOST_BYTES {
            return None;
        }
        let file = fs::read(&path).ok()?;
        let (header, image) = file.split_at_checked(HEADER)?;
        (header == Self::header(key, image)).then(|| image.to_vec())
    }

    /// Stores the image of `key`. The file gets its name when it is complete.
    pub(super) fn put(&self, key: u128, image: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(&Self::header(key, image))?;
        file.write_all(image)?;
        file.persist(self.path(key)).map_err(|e| e.error)?;
        Ok(())
    }

    /// Removes the image of `key`, which the driver rejected.
    pub(super) fn remove(&self, key: u128) {
        // If the removal fails, the next program compiles again too.
        let _ = fs::remove_file(self.path(key));
    }

    fn header(key: u128, image: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..24].copy_from_slice(&key.to_le_bytes());
        header[24..].copy_from_slice(&xxh3_64(image).to_le_bytes());
        header
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_files_count_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(folder.path().join("new"));
        assert_eq!(cache.get(7), None);
        cache.put(7, b"image").unwrap();
        assert_eq!(cache.get(7).as_deref(), Some(&b"image"[..]));
        assert_eq!(cache.get(8), None);
        let good = fs::read(cache.path(7)).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(cache.path(7), &bad).unwrap();
            assert_eq!(cache.get(7), None, "byte {at}");
            fs::write(cache.path(7), &good[..at]).unwrap();
            assert_eq!(cache.get(7), None, "cut at {at}");
        }
        // The image of another key under this name.
        cache.put(8, b"other").unwrap();
        fs::copy(cache.path(8), cache.path(7)).unwrap();
        assert_eq!(cache.get(7), None);
        cache.put(7, b"image").unwrap();
        assert_eq!(cache.get(7).as_deref(), Some(&b"image"[..]));
    }

    #[test]
    fn parts_of_a_key_are_kept_apart() {
        let key = |parts: &[&str]| {
            let mut key = ImageKey::default();
            parts.iter().for_each(|p| key.add(p));
            key.value()
        };
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    }
}
