//! [`MetaPatch`]: other metadata for a file that exists.

use crate::error::Result;
use crate::meta::Meta;
use crate::num::len_u64;
use crate::reader::{File, META};
use crate::writer::{head, section_entry};

/// The bytes that give a file other metadata. Tensors and their table stay where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaPatch {
    /// The offset of the metadata in the file.
    pub offset: u64,
    /// The metadata, which end the file.
    pub meta: Vec<u8>,
    /// The head, which starts the file.
    pub head: Vec<u8>,
}

impl MetaPatch {
    /// The bytes that replace the metadata of `file` by `meta`; `None` if another section follows the metadata,
    /// which none does in files of a [`Writer`](crate::Writer).
    ///
    /// # Errors
    /// The rule that `meta` breaks.
    pub fn new(file: &File<'_>, meta: &Meta) -> Result<Option<Self>> {
        let Some((last, before)) = file.sections().split_last().filter(|(s, _)| s.kind == META)
        else {
            return Ok(None);
        };
        let min_reader = meta.min_reader();
        let meta = meta.to_bytes()?;
        let mut entries: Vec<_> = before
            .iter()
            .map(|s| {
                section_entry(s.kind, s.critical, s.offset, len_u64(s.bytes.len()), s.checksum)
            })
            .collect();
        let checksum = crate::checksum(&meta);
        entries.push(section_entry(META, true, last.offset, len_u64(meta.len()), checksum));
        let size = last.offset.saturating_add(len_u64(meta.len()));
        Ok(Some(Self { offset: last.offset, meta, head: head(min_reader, size, &entries) }))
    }

    /// The size of the file with the new metadata, in bytes.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.offset.saturating_add(len_u64(self.meta.len()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::encoding::Dense;
    use crate::{Encoding, Value, Writer};

    fn meta(entries: &[(&str, &str)]) -> Meta {
        let mut meta = Meta::new();
        for (key, value) in entries {
            meta.set(key, Value::Text((*value).into())).unwrap();
        }
        meta
    }

    fn file(meta: &Meta) -> Vec<u8> {
        let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
        writer.tensor("t", &[3], &Encoding::Dense(Dense::F32), &[7; 12]).unwrap();
        writer.finish(meta).unwrap().into_inner()
    }

    /// A patched file has the bytes of one that was written with these metadata.
    #[test]
    fn a_patched_file_is_the_file_with_the_other_metadata() {
        let old = file(&meta(&[("a", "some text"), ("b", "more")]));
        for new in [meta(&[]), meta(&[("a", "short")]), meta(&[("c", &"long ".repeat(2000))])] {
            let patch = MetaPatch::new(&File::open(&old).unwrap(), &new).unwrap().unwrap();
            let mut patched = old[..usize::try_from(patch.offset).unwrap()].to_vec();
            patched.extend(&patch.meta);
            patched[..patch.head.len()].copy_from_slice(&patch.head);
            assert_eq!(len_u64(patched.len()), patch.file_bytes());
            assert!(File::open(&patched).is_ok());
            assert_eq!(patched, file(&new));
        }
    }
}
