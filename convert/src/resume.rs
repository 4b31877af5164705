//! The state of an unfinished conversion, so that the same command resumes it.
//!
//! The folder `.NAME.unfinished` next to the output `NAME` holds the unfinished file, the packed tensors of every
//! finished decoder layer, and the inputs of the next layer. It is valid for one source, recipe, calibration text,
//! instruction set and version, and discarded otherwise. It is removed at the end of the conversion.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stb_runtime::{Error, Result};

use crate::report::{LayerReport, TensorReport};

/// The folders in use, outer ones first, for [`leave_at_once`].
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The first bytes of every file of this module; the last byte is the version.
const MAGIC: &[u8; 8] = b"stbwork\x01";
/// Bytes of a SHA-256.
const HASH: usize = 32;

/// If writing the inputs of a layer takes at most this long, they are written after every layer.
const FAST_SAVE: Duration = Duration::from_secs(2);
/// After a slower write, the time to the next one is at least this multiple of its duration.
const SAVE_INTERVAL: u32 = 20;

/// The folder of an unfinished conversion.
pub struct Workspace {
    folder: PathBuf,
    /// Held during the conversion; the system releases it with the process.
    _lock: File,
    /// Finished decoder layers, up to the last one after which the inputs of the next are saved.
    finished: usize,
    /// The time when the inputs of a layer were last saved, and the duration.
    last_save: Option<(Instant, Duration)>,
    /// Whether the folder held a different conversion, which has been discarded.
    pub discarded: bool,
}

/// A finished decoder layer.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedLayer {
    /// Its tensors, in file order.
    pub tensors: Vec<TensorReport>,
    /// Its error and times.
    pub layer: LayerReport,
    /// The packed tensors.
    #[serde(skip)]
    pub payloads: Vec<Vec<u8>>,
}

/// Hidden states, [tokens, hidden] for each sequence.
pub type States = Vec<Vec<f32>>;

impl Workspace {
    /// Opens or creates the folder for `target`; `key` is a text with everything on which the result depends.
    ///
    /// # Errors
    /// [`Error::Usage`] if another process is converting to the same file, [`Error::Io`].
    pub fn open(target: &Path, key: &str) -> Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let folder = target.with_file_name(format!(".{name}.unfinished"));
        match std::fs::create_dir(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(target, e));
            }
            _ => {}
        }
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(|e| Error::io(target, e))?;
        if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            return Err(Error::usage(format!(
                "another conversion to {} is running",
                target.display()
            )));
        }
        if let Ok(mut unfinished) = UNFINISHED.lock() {
            unfinished.push(folder.clone());
        }
        let mut workspace =
            Self { folder, _lock: lock, finished: 0, last_save: None, discarded: false };
        match workspace.read("key") {
            Some(found) if found == key.as_bytes() => {
                workspace.finished = workspace.count_finished()
            }
            _ => {
                workspace.discarded =
                    workspace.layer_path(0).exists() || workspace.has_conversions();
                workspace.clear()?;
                workspace.write("key", &[key.as_bytes()])?;
            }
        }
        Ok(workspace)
    }

    /// The number of decoder layers that need not be computed again.
    #[must_use]
    pub fn finished(&self) -> usize {
        self.finished
    }

    /// The path of the unfinished file.
    #[must_use]
    pub fn output(&self) -> PathBuf {
        self.folder.join("output")
    }

    /// The path of the distilled file, which is written while the unfinished file is read.
    #[must_use]
    pub fn tuned_output(&self) -> PathBuf {
        self.folder.join("tuned")
    }

    /// The folder, for messages.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Removes the folder.
    pub fn remove(self) {
        // If this fails, the next conversion uses or discards the folder.
        let _ = std::fs::remove_dir_all(&self.folder);
        self.release();
    }

    /// Leaves the folder as it is.
    pub fn release(self) {
        if let Ok(mut unfinished) = UNFINISHED.lock() {
            unfinished.retain(|folder| *folder != self.folder);
        }
    }

    /// Whether the folder holds a whole conversion of a search for a size, finished or not.
    #[must_use]
    pub fn has_conversions(&self) -> bool {
        has_conversions(&self.folder)
    }

    /// Saves a finished layer, then the inputs of the next; the layer counts as finished only with these. Inputs that
    /// take long to write are not saved after every layer: a conversion on a GPU would spend most of its time on that.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&mut self, index: usize, layer: &SavedLayer, states: &[&mut States]) -> Result<()> {
        let header =
            serde_json::to_vec(layer).map_err(|e| Error::Internal { what: e.to_string() })?;
        let length = (header.len() as u64).to_le_bytes();
        let parts: Vec<&[u8]> = [&length[..], &header]
            .into_iter()
            .chain(layer.payloads.iter().map(Vec::as_slice))
            .collect();
        self.write(&layer_name(index), &parts)?;
        let started = Instant::now();
        if let Some((last, took)) = self.last_save
            && took > FAST_SAVE
            && started - last < SAVE_INTERVAL * took
        {
            return Ok(());
        }
        let count = (index as u64 + 1).to_le_bytes();
        let values = states.iter().flat_map(|s| s.iter()).map(|s| bytemuck::cast_slice(s));
        let parts: Vec<&[u8]> = std::iter::once(&count[..]).chain(values).collect();
        self.write("states", &parts)?;
        self.finished = index + 1;
        let ended = Instant::now();
        self.last_save = Some((ended, ended - started));
        Ok(())
    }

    /// Loads a finished layer; `lengths` are the bytes of its tensors. `None` if the file is damaged.
    #[must_use]
    pub fn load(&self, index: usize, lengths: &[u64]) -> Option<SavedLayer> {
        let bytes = self.read(&layer_name(index))?;
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (header, mut rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        let mut layer: SavedLayer = serde_json::from_slice(header).ok()?;
        for length in lengths {
            let (payload, next) = rest.split_at_checked(usize::try_from(*length).ok()?)?;
            layer.payloads.push(payload.to_vec());
            rest = next;
        }
        (rest.is_empty() && layer.tensors.len() == lengths.len()).then_some(layer)
    }

    /// Replaces `states` by those after the last finished layer; `None` if the file is damaged.
    pub fn load_states(&self, states: &mut [&mut States]) -> Option<()> {
        let bytes = self.read("states")?;
        let mut rest = bytes.get(8..)?;
        for sequence in states.iter_mut().flat_map(|s| s.iter_mut()) {
            let (part, next) = rest.split_at_checked(sequence.len() * 4)?;
            bytemuck::cast_slice_mut(sequence).copy_from_slice(part);
            rest = next;
        }
        rest.is_empty().then_some(())
    }

    /// Resets the number of finished layers to zero, after one could not be read.
    pub fn forget(&mut self) {
        self.finished = 0;
    }

    fn layer_path(&self, index: usize) -> PathBuf {
        self.folder.join(layer_name(index))
    }

    /// The number of finished layers in the file of states; 0 if that is damaged or one of these layers is missing.
    fn count_finished(&self) -> usize {
        let count = self.read("states").and_then(|b| b.first_chunk::<8>().copied());
        let count = count.map_or(0, u64::from_le_bytes) as usize;
        if (0..count.min(1 << 16)).all(|i| self.layer_path(i).exists()) { count } else { 0 }
    }

    /// Removes everything but the lock.
    fn clear(&self) -> Result<()> {
        let fail = |e| Error::io(&self.folder, e);
        for entry in std::fs::read_dir(&self.folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.file_name().is_some_and(|name| name != "lock") {
                let removed = match path.is_dir() {
                    true => std::fs::remove_dir_all(&path),
                    false => std::fs::remove_file(&path),
                };
                removed.map_err(|e| Error::io(&path, e))?;
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        write_hashed(&self.folder.join(name), parts)
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        read_hashed(&self.folder.join(name))
    }
}

/// Writes a file atomically: magic, parts, SHA-256 of both.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_hashed(path: &Path, parts: &[&[u8]]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = std::io::BufWriter::new(File::create(&temporary)?);
        let mut hash = Sha256::new();
        for part in std::iter::once(&MAGIC[..]).chain(parts.iter().copied()) {
            hash.update(part);
            file.write_all(part)?;
        }
        file.write_all(&hash.finalize())?;
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|e| Error::io(path, e))
}

/// The concatenated parts of a file written by [`write_hashed`]; `None` if it is missing or damaged.
pub(crate) fn read_hashed(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let (content, hash) = bytes.split_last_chunk::<HASH>()?;
    if Sha256::digest(content).as_slice() != hash || !content.starts_with(MAGIC) {
        return None;
    }
    bytes.truncate(bytes.len() - HASH);
    bytes.drain(..MAGIC.len());
    Some(bytes)
}

fn layer_name(index: usize) -> String {
    format!("layer-{index:05}")
}

/// Whether `folder` holds the report of a finished conversion, or the folder of an unfinished one.
fn has_conversions(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|e| e.path())
        .any(|path| path.is_dir() || path.extension().is_some_and(|e| e == "json"))
}

/// Removes the unfinished file, and the folder if no layer is finished. For a second Ctrl-C, which exits at once.
pub fn leave_at_once() {
    let Ok(mut unfinished) = UNFINISHED.lock() else { return };
    // Inner folders first: an outer one stays if something in it does.
    for folder in unfinished.drain(..).rev() {
        if folder.join("states").exists() || has_conversions(&folder) {
            for name in ["output", "tuned"] {
                let _ = std::fs::remove_file(folder.join(name));
            }
        } else {
            let _ = std::fs::remove_dir_all(&folder);
        }
    }
}
