//! Compresses the built-in calibration text (`data/calibration/`).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use flate2::Compression;
use flate2::write::DeflateEncoder;

fn main() -> io::Result<()> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    let source = variable("CARGO_MANIFEST_DIR")?.join("data/calibration");
    let target = variable("OUT_DIR")?;
    writeln!(io::stdout(), "cargo::rerun-if-changed={}", source.display())?;
    for entry in fs::read_dir(&source)? {
        let path = entry?.path();
        compress(&path, &target)?;
    }
    Ok(())
}

/// Writes the file at `path` to the folder `target`, compressed and with `.deflate` after its name.
fn compress(path: &Path, target: &Path) -> io::Result<()> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&fs::read(path)?)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    fs::write(target.join(format!("{name}.deflate")), encoder.finish()?)
}
