//! Where the program keeps what belongs to a user: the folders of the XDG base directory specification.

use std::path::{Path, PathBuf};

/// Saved chats: `XDG_DATA_HOME/stb/chats`.
pub(super) fn chats() -> Option<PathBuf> {
    base("XDG_DATA_HOME", ".local/share").map(|base| base.join("stb/chats"))
}

/// The lines that were typed in chats: `XDG_STATE_HOME/stb/history`.
pub(super) fn history() -> Option<PathBuf> {
    base("XDG_STATE_HOME", ".local/state").map(|base| base.join("stb/history"))
}

/// The home folder of the user.
pub(super) fn home() -> Option<PathBuf> {
    variable("HOME")
}

/// Makes a folder and those above it that are missing, for the eyes of the user only.
pub(super) fn make(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn base(name: &str, default: &str) -> Option<PathBuf> {
    variable(name).or_else(|| home().map(|home| home.join(default)))
}

/// The specification says to ignore relative paths.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}
