//! Files that appear whole or not at all.

use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use stb_runtime::{Error, Result};
use tempfile::TempPath;

/// The file being written, for the case that the program has to leave at once.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// A file in the making, beside its final place.
pub struct Output {
    file: BufWriter<std::fs::File>,
    temporary: TempPath,
    target: PathBuf,
    force: bool,
}

impl Output {
    /// Starts a file that will become `target`.
    ///
    /// # Errors
    /// [`Error::Usage`] if it exists and `force` is not set, [`Error::Io`] if its folder cannot be
    /// written.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        refuse_existing(target, force)?;
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let prefix = format!(".{name}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".partial");
        // Temporary files are private unless told otherwise; this one is to be as public as the
        // user's other files. The system applies the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder).map_err(|e| Error::io(folder, e))?;
        let (file, temporary) = file.into_parts();
        if let Ok(mut unfinished) = UNFINISHED.lock() {
            *unfinished = Some(temporary.to_path_buf());
        }
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            temporary,
            target: target.to_owned(),
            force,
        })
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`]; the unfinished file is removed.
    pub fn commit(self) -> Result<()> {
        let Self { file, temporary, target, force } = self;
        let fail = |e: std::io::Error| Error::io(&target, e);
        let file = file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)?;
        drop(file);
        // Somebody may have made the file since we looked.
        refuse_existing(&target, force)?;
        temporary.persist(&target).map_err(|e| fail(e.error))?;
        if let Ok(mut unfinished) = UNFINISHED.lock() {
            *unfinished = None;
        }
        // The new name has to survive a crash too; not all systems can open folders.
        if let Some(folder) = target.parent().filter(|f| !f.as_os_str().is_empty())
            && let Ok(folder) = std::fs::File::open(folder)
        {
            let _ = folder.sync_all();
        }
        Ok(())
    }

    /// The path for messages.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }
}

fn refuse_existing(target: &Path, force: bool) -> Result<()> {
    if !force && target.exists() {
        return Err(Error::usage(format!("{} exists; --force replaces it", target.display())));
    }
    Ok(())
}

/// Removes the unfinished file: for a second Ctrl-C, which does not wait.
pub fn remove_unfinished() {
    if let Ok(mut unfinished) = UNFINISHED.lock()
        && let Some(path) = unfinished.take()
    {
        let _ = std::fs::remove_file(path);
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Output {
    fn seek(&mut self, position: std::io::SeekFrom) -> std::io::Result<u64> {
        self.file.seek(position)
    }
}
