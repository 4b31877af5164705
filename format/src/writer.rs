//! [`Writer`]: writes tensors in sequence, then the tensor table, the metadata and the head.

use std::collections::HashSet;
use std::io::{self, Seek, SeekFrom, Write};

use zerocopy::IntoBytes;

use crate::encoding::Encoding;
use crate::error::{Error, Result, Rule};
use crate::limits::{
    HEAD_BYTES, MAGIC, MAX_DIM, MAX_DIMS, MAX_ELEMENTS, MAX_NAME_BYTES, MAX_TENSORS, SECTION_ALIGN,
    TENSOR_ALIGN, VERSION,
};
use crate::meta::Meta;
use crate::num::{align_up, len_u64};
use crate::raw::{Header, SectionEntry, TENSOR_ENTRY_BYTES, TableHeader, TensorEntry};
use crate::reader::{CRITICAL, DATA, META, TENSORS};

/// Writes one `.stb` file. Equal calls give equal bytes.
///
/// The head is written last, so that an incomplete file is invalid. For an atomic operation, write to
/// a temporary file and rename it.
pub struct Writer<W> {
    out: W,
    /// Bytes written so far.
    position: u64,
    entries: Vec<TensorEntry>,
    names: Vec<u8>,
    seen: HashSet<String>,
}

impl<W: Write + Seek> Writer<W> {
    /// Starts a file at the beginning of `out`.
    ///
    /// # Errors
    /// I/O errors of `out`.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&[0; HEAD_BYTES])?;
        let position = len_u64(HEAD_BYTES);
        Ok(Self { out, position, entries: Vec::new(), names: Vec::new(), seen: HashSet::new() })
    }

    /// Appends a tensor. `payload` is the packed content in `encoding`.
    ///
    /// # Errors
    /// `InvalidInput` with the broken [`Rule`] if readers would reject the tensor; I/O errors of `out`.
    pub fn tensor(
        &mut self,
        name: &str,
        shape: &[u64],
        encoding: &Encoding,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut entry = self.new_entry(name, shape, encoding, payload).map_err(invalid)?;
        self.pad(TENSOR_ALIGN)?;
        let offset = self.position.saturating_sub(len_u64(HEAD_BYTES));
        entry.offset = offset.into();
        self.out.write_all(payload)?;
        self.position = self.position.saturating_add(len_u64(payload.len()));
        self.names.extend(name.as_bytes());
        self.seen.insert(name.to_owned());
        self.entries.push(entry);
        Ok(())
    }

    /// Bytes written so far, including head and padding.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Writes tensor table, metadata and head, flushes the output and returns it.
    ///
    /// # Errors
    /// The errors of [`Writer::tensor`].
    pub fn finish(mut self, meta: &Meta) -> io::Result<W> {
        if self.entries.is_empty() {
            return Err(invalid(Error::new(Rule::TensorTable, "a file needs a tensor")));
        }
        let data_start = len_u64(HEAD_BYTES);
        let data_length = self.position.saturating_sub(data_start);
        let data = section_entry(DATA, true, data_start, data_length, 0);

        let table = self.table().map_err(invalid)?;
        let table = self.section(TENSORS, &table)?;
        let min_reader = meta.min_reader();
        let meta = self.section(META, &meta.to_bytes().map_err(invalid)?)?;

        let head = head(min_reader, self.position, &[data, table, meta]);
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&head)?;
        self.out.seek(SeekFrom::End(0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn new_entry(
        &self,
        name: &str,
        shape: &[u64],
        encoding: &Encoding,
        payload: &[u8],
    ) -> Result<TensorEntry> {
        let fail = |rule, detail: String| Err(Error::new(rule, detail).in_tensor(name));
        let length_ok = (1..=MAX_NAME_BYTES).contains(&name.len());
        if !length_ok || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return fail(Rule::TensorName, format!("name {name:?}"));
        }
        if self.seen.contains(name) {
            return fail(Rule::TensorUnique, "the name is taken".into());
        }
        if len_u64(self.entries.len()) >= u64::from(MAX_TENSORS) {
            return fail(Rule::TensorTable, format!("more than {MAX_TENSORS} tensors"));
        }
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        if shape.is_empty()
            || shape.len() > MAX_DIMS
            || shape.iter().any(|&d| d == 0 || d > MAX_DIM)
            || elements.is_none_or(|n| n > MAX_ELEMENTS)
        {
            return fail(Rule::TensorShape, format!("shape {shape:?}"));
        }
        let encoding = Encoding::parse(encoding.id(), encoding.params())?;
        let needed = encoding.payload_len(shape)?;
        if needed.is_some_and(|n| n != len_u64(payload.len())) {
            let detail = format!("{} bytes given, {needed:?} needed", payload.len());
            return fail(Rule::TensorLength, detail);
        }
        let mut dims = shape.iter().copied().chain(std::iter::repeat(0));
        Ok(TensorEntry {
            name_offset: u32::try_from(self.names.len()).unwrap_or(u32::MAX).into(),
            name_length: u16::try_from(name.len()).unwrap_or(u16::MAX).into(),
            ndim: u8::try_from(shape.len()).unwrap_or(u8::MAX),
            reserved0: 0,
            encoding: encoding.id().into(),
            reserved1: 0.into(),
            params: encoding.params(),
            dims: [(); 4].map(|()| dims.next().unwrap_or(0).into()),
            offset: 0.into(),
            length: len_u64(payload.len()).into(),
            checksum: crate::checksum(payload).into(),
            reserved2: 0.into(),
        })
    }

    fn table(&self) -> Result<Vec<u8>> {
        let count = u32::try_from(self.entries.len())
            .map_err(|_| Error::new(Rule::TensorTable, "too many tensors"))?;
        let header = TableHeader {
            count: count.into(),
            entry_size: u32::try_from(TENSOR_ENTRY_BYTES).unwrap_or(0).into(),
            names_length: len_u64(self.names.len()).into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        for entry in &self.entries {
            bytes.extend(entry.as_bytes());
        }
        bytes.extend(&self.names);
        Ok(bytes)
    }

    fn section(&mut self, kind: u32, content: &[u8]) -> io::Result<SectionEntry> {
        self.pad(SECTION_ALIGN)?;
        let offset = self.position;
        self.out.write_all(content)?;
        self.position = offset.saturating_add(len_u64(content.len()));
        Ok(section_entry(kind, true, offset, len_u64(content.len()), crate::checksum(content)))
    }

    fn pad(&mut self, align: u64) -> io::Result<()> {
        let end = align_up(self.position, align)
            .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "file too large"))?;
        io::copy(
            &mut io::Read::take(io::repeat(0), end.saturating_sub(self.position)),
            &mut self.out,
        )?;
        self.position = end;
        Ok(())
    }
}

/// The size in bytes of the file that a [`Writer`] writes for tensors with these names and payload
/// lengths.
#[must_use]
pub fn file_size<'a>(tensors: impl Iterator<Item = (&'a str, u64)>, meta: &Meta) -> u64 {
    let align = |n, to| align_up(n, to).unwrap_or(u64::MAX);
    let (mut data, mut table) = (0u64, 16u64);
    for (name, length) in tensors {
        data = align(data, TENSOR_ALIGN).saturating_add(length);
        table =
            table.saturating_add(len_u64(TENSOR_ENTRY_BYTES)).saturating_add(len_u64(name.len()));
    }
    let end = len_u64(HEAD_BYTES).saturating_add(data);
    let end = align(end, SECTION_ALIGN).saturating_add(table);
    align(end, SECTION_ALIGN).saturating_add(meta.len())
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

pub(crate) fn section_entry(
    kind: u32,
    critical: bool,
    offset: u64,
    length: u64,
    checksum: u64,
) -> SectionEntry {
    SectionEntry {
        kind: kind.into(),
        flags: if critical { CRITICAL } else { 0 }.into(),
        offset: offset.into(),
        length: length.into(),
        checksum: checksum.into(),
        reserved: [0; 16],
    }
}

/// The 4096 bytes of the head.
pub(crate) fn head(min_reader: u16, file_size: u64, sections: &[SectionEntry]) -> Vec<u8> {
    let header = Header {
        magic: MAGIC,
        min_reader: min_reader.into(),
        written: VERSION.into(),
        header_size: 64.into(),
        file_size: file_size.into(),
        section_count: u32::try_from(sections.len()).unwrap_or(u32::MAX).into(),
        section_entry_size: 48.into(),
        flags: 0.into(),
        reserved: [0; 24],
    };
    let mut head = header.as_bytes().to_vec();
    for section in sections {
        head.extend(section.as_bytes());
    }
    head.resize(HEAD_BYTES.saturating_sub(8), 0);
    let sum = crate::checksum(&head);
    head.extend(sum.to_le_bytes());
    head
}
