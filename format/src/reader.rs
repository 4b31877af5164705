//! Opens and validates a file in the normative order of spec, container §4.

use zerocopy::FromBytes;

use crate::error::{Error, Result, Rule};
use crate::limits::{HEAD_BYTES, MAGIC, MAX_SECTIONS, SECTION_ALIGN, VERSION};
use crate::meta::MetaView;
use crate::num::{align_up, first_nonzero, len_u64, slice};
use crate::raw::{HEADER_BYTES, Header, SECTION_ENTRY_BYTES, SectionEntry};
use crate::tensors::{Tensor, parse_table};

/// Section type of the tensor payloads.
pub(crate) const DATA: u32 = 1;
/// Section type of the tensor table.
pub(crate) const TENSORS: u32 = 2;
/// Section type of the metadata.
pub(crate) const META: u32 = 3;
/// Flag bit: readers that do not know the section type must reject the file.
pub(crate) const CRITICAL: u32 = 1;

/// A section of an open file.
#[derive(Clone, Copy, Debug)]
pub struct Section<'a> {
    /// The registered type (spec, container §3.2): 1 DATA, 2 TENSORS, 3 META.
    pub kind: u32,
    /// Whether readers that do not know the type must reject the file.
    pub critical: bool,
    /// Offset in the file in bytes.
    pub offset: u64,
    /// The content, without the padding after it.
    pub bytes: &'a [u8],
    pub(crate) checksum: u64,
}

/// An open file. Everything is validated except the content of the tensors.
#[derive(Clone, Debug)]
pub struct File<'a> {
    bytes: &'a [u8],
    min_reader: u16,
    written: u16,
    sections: Vec<Section<'a>>,
    tensors: Vec<Tensor<'a>>,
    meta: MetaView<'a>,
}

impl<'a> File<'a> {
    /// Validates head, sections, tensor table and metadata of `bytes` in the order of spec, container §4.
    /// Tensor payloads are not read; [`File::verify`] checks them.
    ///
    /// # Errors
    /// The first broken rule, with its offset and tensor.
    pub fn open(bytes: &'a [u8]) -> Result<Self> {
        let header = check_head(bytes)?;
        let sections = check_sections(bytes, header)?;
        check_gaps(bytes, &sections)?;
        for section in &sections {
            check_section_sum(section)?;
        }
        let find = |kind| {
            sections.iter().find(|s| s.kind == kind).ok_or_else(|| {
                Error::new(Rule::SectionSet, format!("there is no section of type {kind}"))
            })
        };
        let (data, table, meta) = (find(DATA)?, find(TENSORS)?, find(META)?);
        let tensors = parse_table(table.bytes, table.offset, data.bytes, data.offset)?;
        let (min_reader, written) = (header.min_reader.get(), header.written.get());
        let meta = MetaView::parse(meta.bytes, meta.offset, min_reader)?;
        Ok(Self { bytes, min_reader, written, sections, tensors, meta })
    }

    /// Validates all payloads: checksums, padding, finite values, masks. Reads every byte.
    ///
    /// # Errors
    /// The first broken rule in the order of spec, container §4.
    pub fn verify(&self) -> Result<()> {
        self.verify_padding()?;
        for tensor in &self.tensors {
            tensor.verify_checksum()?;
            tensor.verify_payload()?;
        }
        Ok(())
    }

    /// Checks that the gaps between tensors are zero (STB-R-039).
    ///
    /// # Errors
    /// STB-R-039 with the offset of the first nonzero byte.
    pub fn verify_padding(&self) -> Result<()> {
        let mut end = self.sections.iter().find(|s| s.kind == DATA).map_or(0, |s| s.offset);
        for tensor in &self.tensors {
            let gap = tensor.offset().saturating_sub(end);
            if let Some(i) = slice(self.bytes, end, gap).and_then(first_nonzero) {
                return Err(Error::new(Rule::TensorPadding, "padding before the tensor")
                    .at(end.saturating_add(len_u64(i)))
                    .in_tensor(tensor.name()));
            }
            end = tensor.offset().saturating_add(len_u64(tensor.payload().len()));
        }
        Ok(())
    }

    /// All bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The oldest reader version that can read this file.
    #[must_use]
    pub fn min_reader(&self) -> u16 {
        self.min_reader
    }

    /// The format version that the file was written with.
    #[must_use]
    pub fn written(&self) -> u16 {
        self.written
    }

    /// The sections in file order.
    #[must_use]
    pub fn sections(&self) -> &[Section<'a>] {
        &self.sections
    }

    /// The tensors in file order.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor<'a>] {
        &self.tensors
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.iter().find(|t| t.name() == name)
    }

    /// The metadata.
    #[must_use]
    pub fn meta(&self) -> &MetaView<'a> {
        &self.meta
    }

    /// The number of model parameters, which is the number of elements of all tensors.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().fold(0, |n, t| n.saturating_add(t.elements()))
    }

    /// True bits per parameter: 8 × file bytes ÷ parameters.
    #[must_use]
    #[allow(clippy::as_conversions, reason = "a ratio for display")]
    pub fn true_bits(&self) -> f64 {
        self.bytes.len() as f64 * 8.0 / self.parameters() as f64
    }
}

/// STB-R-001 to STB-R-008.
fn check_head(bytes: &[u8]) -> Result<&Header> {
    let Some((head, _)) = bytes.split_at_checked(HEAD_BYTES) else {
        let detail = format!("the file has {} bytes", bytes.len());
        return Err(Error::new(Rule::HeadLength, detail).at(len_u64(bytes.len())));
    };
    let Ok((header, _)) = Header::ref_from_prefix(head) else {
        return Err(Error::new(Rule::HeadLength, "no room for the header"));
    };
    if header.magic != MAGIC {
        let detail = format!("the file starts with {:02x?}: not an .stb file", header.magic);
        return Err(Error::new(Rule::Magic, detail).at(0));
    }
    if header.min_reader.get() > VERSION {
        let detail = format!(
            "the file needs a reader of version {}, this one has {VERSION}",
            header.min_reader.get()
        );
        return Err(Error::new(Rule::MinReader, detail).at(8));
    }
    let (covered, stored) = head.split_at_checked(HEAD_BYTES.saturating_sub(8)).unwrap_or_default();
    if crate::checksum(covered).to_le_bytes() != *stored {
        return Err(Error::new(Rule::HeadChecksum, "the head is damaged").at(4088));
    }
    let sizes = (header.header_size.get(), header.section_entry_size.get());
    if sizes != (64, 48)
        || header.min_reader.get() == 0
        || header.written.get() < header.min_reader.get()
    {
        let detail = format!(
            "header of {} bytes, section entries of {}, written by version {} for readers from {}",
            sizes.0,
            sizes.1,
            header.written.get(),
            header.min_reader.get()
        );
        return Err(Error::new(Rule::HeadFields, detail).at(8));
    }
    let count = header.section_count.get();
    let directory =
        usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(SECTION_ENTRY_BYTES);
    let directory_end = HEADER_BYTES.saturating_add(directory);
    let unused = covered.get(directory_end..).and_then(first_nonzero);
    if header.flags.get() != 0 || header.reserved != [0; 24] || unused.is_some() {
        return Err(Error::new(Rule::HeadReserved, "a byte that must be zero is not").at(32));
    }
    if count == 0 || count > MAX_SECTIONS {
        let detail = format!("{count} sections, 1 to {MAX_SECTIONS} are allowed");
        return Err(Error::new(Rule::SectionCount, detail).at(24));
    }
    if header.file_size.get() != len_u64(bytes.len()) {
        let detail = format!(
            "the header states {} bytes, but the file has {}: it was truncated or extended",
            header.file_size.get(),
            bytes.len()
        );
        return Err(Error::new(Rule::FileSize, detail).at(16));
    }
    Ok(header)
}

/// STB-R-010 to STB-R-014.
fn check_sections<'a>(bytes: &'a [u8], header: &Header) -> Result<Vec<Section<'a>>> {
    let count = usize::try_from(header.section_count.get()).unwrap_or(0);
    let directory = bytes.get(HEADER_BYTES..).unwrap_or_default();
    let (entries, _) = <[SectionEntry]>::ref_from_prefix_with_elems(directory, count)
        .map_err(|_| Error::new(Rule::SectionCount, "the directory does not fit"))?;
    let mut sections: Vec<Section> = Vec::new();
    let mut end = len_u64(HEAD_BYTES);
    for (index, entry) in entries.iter().enumerate() {
        let kind = entry.kind.get();
        let at = len_u64(index.saturating_mul(SECTION_ENTRY_BYTES).saturating_add(HEADER_BYTES));
        let flags = entry.flags.get();
        if kind == 0 || flags & !CRITICAL != 0 || entry.reserved != [0; 16] {
            let detail = format!("section {index} has type {kind}, flags {flags:#x}");
            return Err(Error::new(Rule::SectionFields, detail).at(at));
        }
        let offset = entry.offset.get();
        if align_up(end, SECTION_ALIGN) != Some(offset) {
            let detail =
                format!("section {index} starts at {offset}, the one before ends at {end}");
            return Err(Error::new(Rule::SectionOffset, detail).at(at));
        }
        let length = entry.length.get();
        let Some(content) = slice(bytes, offset, length) else {
            let detail = format!("section {index} of {length} bytes ends outside the file");
            return Err(Error::new(Rule::SectionBounds, detail).at(at));
        };
        end = offset.saturating_add(length);
        if (DATA..=META).contains(&kind) {
            if sections.iter().any(|s| s.kind == kind) {
                let detail = format!("a second section of type {kind}");
                return Err(Error::new(Rule::SectionSet, detail).at(at));
            }
        } else if flags & CRITICAL != 0 {
            let detail = format!("section {index} has the unknown type {kind} and is critical");
            return Err(Error::new(Rule::SectionCritical, detail).at(at));
        }
        let (critical, checksum) = (flags & CRITICAL != 0, entry.checksum.get());
        sections.push(Section { kind, critical, offset, bytes: content, checksum });
    }
    if end != len_u64(bytes.len()) {
        let detail = format!("the last section ends at {end}, the file at {}", bytes.len());
        return Err(Error::new(Rule::SectionBounds, detail).at(end));
    }
    for kind in DATA..=META {
        if !sections.iter().any(|s| s.kind == kind) {
            let detail = format!("there is no section of type {kind}");
            return Err(Error::new(Rule::SectionSet, detail).at(64));
        }
    }
    Ok(sections)
}

/// STB-R-015.
fn check_gaps(bytes: &[u8], sections: &[Section]) -> Result<()> {
    let mut end = len_u64(HEAD_BYTES);
    for section in sections {
        let gap = slice(bytes, end, section.offset.saturating_sub(end)).unwrap_or_default();
        if let Some(i) = first_nonzero(gap) {
            let at = end.saturating_add(len_u64(i));
            return Err(Error::new(Rule::SectionPadding, "a padding byte is not zero").at(at));
        }
        end = section.offset.saturating_add(len_u64(section.bytes.len()));
    }
    Ok(())
}

/// STB-R-016. The bytes of DATA are covered by tensor checksums, so its field is zero.
fn check_section_sum(section: &Section) -> Result<()> {
    let found = if section.kind == DATA { 0 } else { crate::checksum(section.bytes) };
    if found == section.checksum {
        return Ok(());
    }
    let detail = format!(
        "section of type {} has checksum {found:016x}, expected {:016x}",
        section.kind, section.checksum
    );
    Err(Error::new(Rule::SectionChecksum, detail).at(section.offset))
}
