//! Atomic output: a file appears complete or not at all.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use stb_format::MetaPatch;
use stb_runtime::{Error, Result};

/// An unfinished file, on the file system of its target.
pub struct OutputFile {
    file: BufWriter<std::fs::File>,
    temporary: PathBuf,
    target: PathBuf,
    force: bool,
}

impl OutputFile {
    /// Creates the file `temporary`, which [`OutputFile::commit`] renames to `target`.
    ///
    /// # Errors
    /// [`Error::Usage`] if `target` exists and `force` is not set, [`Error::Io`] if it cannot be written.
    pub fn create(target: &Path, temporary: PathBuf, force: bool) -> Result<Self> {
        refuse_existing(target, force)?;
        let file = std::fs::File::create(&temporary).map_err(|e| Error::io(target, e))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            temporary,
            target: target.to_owned(),
            force,
        })
    }

    /// Syncs the file to disk and renames it to the target.
    ///
    /// # Errors
    /// [`Error::Usage`] if a file of that name has appeared, [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let Self { file, temporary, target, force } = self;
        let fail = |e: std::io::Error| Error::io(&target, e);
        let file = file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)?;
        drop(file);
        move_into_place(&temporary, &target, force)
    }

    /// Closes the temporary file without renaming it, so that it can be read. Returns its path.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn close(self) -> Result<PathBuf> {
        let fail = |e: std::io::IntoInnerError<_>| Error::io(&self.temporary, e.into_error());
        self.file.into_inner().map_err(fail)?;
        Ok(self.temporary)
    }

    /// Writes out what is buffered, and returns the path of the temporary file, so that it can be read.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn readable(&mut self) -> Result<&Path> {
        self.file.flush().map_err(|e| Error::io(&self.temporary, e))?;
        Ok(&self.temporary)
    }

    /// Replaces the metadata. Nobody may have the file mapped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn patch(&mut self, patch: &MetaPatch) -> Result<()> {
        let mut write = || -> std::io::Result<()> {
            self.file.seek(SeekFrom::Start(patch.offset))?;
            self.file.write_all(&patch.meta)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&patch.head)?;
            self.file.flush()?;
            self.file.get_ref().set_len(patch.file_bytes())
        };
        write().map_err(|e| Error::io(&self.temporary, e))
    }

    /// The target, for messages.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }
}

/// Renames a finished file to its target.
///
/// # Errors
/// [`Error::Usage`] if a file of that name has appeared, [`Error::Io`].
pub(crate) fn move_into_place(file: &Path, target: &Path, force: bool) -> Result<()> {
    // Another program may have created the file in the meantime.
    refuse_existing(target, force)?;
    std::fs::rename(file, target).map_err(|e| Error::io(target, e))?;
    // Sync the folder, so that the rename survives a crash; not all systems can open folders.
    if let Some(folder) = target.parent().filter(|f| !f.as_os_str().is_empty())
        && let Ok(folder) = std::fs::File::open(folder)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Fails if `target` exists, unless it is a regular file and `force` is set, or if its folder does not exist.
///
/// # Errors
/// [`Error::Usage`], [`Error::Io`].
pub fn refuse_existing(target: &Path, force: bool) -> Result<()> {
    let Ok(found) = std::fs::metadata(target) else { return require_folder(target) };
    let name = target.display();
    if !found.is_file() {
        return Err(Error::usage(format!("{name} is not a regular file; give the output a name")));
    }
    if !force {
        return Err(Error::usage(format!("{name} exists; --force replaces it")));
    }
    Ok(())
}

/// Fails if the folder of `target` does not exist.
fn require_folder(target: &Path) -> Result<()> {
    let Some(folder) = target.parent().filter(|f| !f.as_os_str().is_empty()) else { return Ok(()) };
    if folder.is_dir() {
        return Ok(());
    }
    let what = format!("there is no folder {}; make it first", folder.display());
    Err(Error::io(target, std::io::Error::new(std::io::ErrorKind::NotFound, what)))
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Seek for OutputFile {
    fn seek(&mut self, position: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(position)
    }
}
