//! Files of other programs, recognized by their first bytes, so that an error can say what to do with them.

use std::path::Path;

use stb_format::{File, MAGIC, Rule};

use crate::error::{Error, Result};

/// Archives name their parts near the start.
const NAME_BYTES: usize = 512;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    Stb,
    Gguf,
    Safetensors,
    Pickle,
    Onnx,
    Html,
    LfsPointer,
    Gzip,
}

/// Opens the bytes of an `.stb` file.
///
/// # Errors
/// [`Error::Invalid`] for a file of another kind, with what to do about it; [`Error::Format`] with the broken rule.
pub fn open_stb_file<'a>(path: &Path, bytes: &'a [u8]) -> Result<File<'a>> {
    File::open(bytes).map_err(|e| {
        let is_foreign = matches!(e.rule(), Rule::Magic | Rule::HeadLength);
        let foreign = is_foreign.then(|| explain(path, bytes, FileKind::Stb)).flatten();
        foreign.unwrap_or_else(|| Error::format(path, e))
    })
}

/// The error for a file that has the name of a safetensors file and is something else.
pub(crate) fn not_safetensors(path: &Path, bytes: &[u8]) -> Option<Error> {
    explain(path, bytes, FileKind::Safetensors)
}

/// The error for a file that has the name of a GGUF file and is something else.
pub(crate) fn not_gguf(path: &Path, bytes: &[u8]) -> Option<Error> {
    explain(path, bytes, FileKind::Gguf)
}

/// The error for a file whose name is not that of a checkpoint, by its first bytes.
pub(crate) fn no_checkpoint(path: &Path) -> Option<Error> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, 4096), &mut bytes).ok()?;
    let name = path.display();
    match kind(&bytes)? {
        FileKind::Stb => Some(Error::invalid(format!(
            "{name} is an .stb file already: stb-run runs it; to convert again, give the original model"
        ))),
        found => Some(error(path, found)),
    }
}

/// The error if the bytes are of a kind other than `wanted`.
fn explain(path: &Path, bytes: &[u8], wanted: FileKind) -> Option<Error> {
    kind(bytes).filter(|found| *found != wanted).map(|found| error(path, found))
}

fn error(path: &Path, found: FileKind) -> Error {
    Error::invalid(format!("{} {}", path.display(), found.advice()))
}

impl FileKind {
    /// What it is, and what to do.
    fn advice(self) -> &'static str {
        match self {
            Self::Stb => "is an .stb file: give its name the ending .stb",
            Self::Gguf => {
                "is a GGUF file: give its name the ending .gguf; stb-run and stb-convert read it then"
            }
            Self::Safetensors => {
                "is a safetensors file: give its name the ending .safetensors and put config.json and the \
                 tokenizer beside it; stb-run and stb-convert read it then"
            }
            Self::Pickle => {
                "is a PyTorch file (pickle), which may run code and is not read: use the model's safetensors files, \
                 or write them with save_pretrained of transformers"
            }
            Self::Onnx => {
                "is an ONNX model, which is not read: use the checkpoint that it was exported from"
            }
            Self::Html => {
                "is a web page, so the download has failed: download the file again, for instance with hf download"
            }
            Self::LfsPointer => {
                "is a Git LFS pointer instead of the file: run git lfs pull in its folder, or download it with hf \
                 download"
            }
            Self::Gzip => "is compressed with gzip: run gunzip first",
        }
    }
}

/// The kind of a file by its first bytes.
fn kind(bytes: &[u8]) -> Option<FileKind> {
    let start = &bytes[..bytes.len().min(NAME_BYTES)];
    let contains = |text: &[u8]| start.windows(text.len()).any(|w| w == text);
    let lower = start.trim_ascii_start().to_ascii_lowercase();
    let header = bytes.first_chunk().map(|length| u64::from_le_bytes(*length));
    let is_pickle = matches!(bytes, [0x80, 2..=5, ..]);
    Some(match bytes {
        _ if bytes.starts_with(&MAGIC) => FileKind::Stb,
        _ if bytes.starts_with(b"GGUF") => FileKind::Gguf,
        _ if bytes.starts_with(b"version https://git-lfs") => FileKind::LfsPointer,
        _ if lower.starts_with(b"<!doctype") || lower.starts_with(b"<html") => FileKind::Html,
        _ if is_pickle || bytes.starts_with(b"PK\x03\x04") && contains(b"data.pkl") => {
            FileKind::Pickle
        }
        _ if bytes.starts_with(&[0x1f, 0x8b]) => FileKind::Gzip,
        // The length of a header of JSON.
        [_, _, _, _, _, _, _, _, b'{', ..] if header.is_some_and(|n| (2..1 << 27).contains(&n)) => {
            FileKind::Safetensors
        }
        // The fields ir_version, a small number, and producer_name, a text.
        [8, 1..=30, 0x12, 1..=40, letter, ..] if letter.is_ascii_alphabetic() => FileKind::Onnx,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognized_by_their_first_bytes() {
        let mut zip = b"PK\x03\x04\x00\x00\x08\x08".to_vec();
        zip.extend([0; 22]);
        zip.extend(b"archive/data.pkl");
        for (bytes, expected) in [
            (&MAGIC[..], Some(FileKind::Stb)),
            (b"GGUF\x03\0\0\0", Some(FileKind::Gguf)),
            (b"\x10\0\0\0\0\0\0\0{\"a\":{}}", Some(FileKind::Safetensors)),
            (b"\x80\x02}q\x00", Some(FileKind::Pickle)),
            (&zip, Some(FileKind::Pickle)),
            (b"\x08\x08\x12\x07pytorch\x1a", Some(FileKind::Onnx)),
            (b"\n <!DOCTYPE html><html>", Some(FileKind::Html)),
            (b"version https://git-lfs.github.com/spec/v1\n", Some(FileKind::LfsPointer)),
            (b"\x1f\x8b\x08", Some(FileKind::Gzip)),
            (b"PK\x03\x04 something else", None),
            (b"", None),
            (b"Once upon a time", None),
        ] {
            assert_eq!(kind(bytes), expected, "{bytes:?}");
        }
    }
}
