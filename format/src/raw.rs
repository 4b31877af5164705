//! The fixed-size records of the container, read in place (spec, container §3.1 to §3.3).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first 64 bytes of a file.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub magic: [u8; 8],
    pub min_reader: U16,
    pub written: U16,
    pub header_size: U32,
    pub file_size: U64,
    pub section_count: U32,
    pub section_entry_size: U32,
    pub flags: U64,
    pub reserved: [u8; 24],
}

/// One entry of the section directory.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SectionEntry {
    pub kind: U32,
    pub flags: U32,
    pub offset: U64,
    pub length: U64,
    pub checksum: U64,
    pub reserved: [u8; 16],
}

/// The start of the TENSORS section.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct TableHeader {
    pub count: U32,
    pub entry_size: U32,
    pub names_length: U64,
}

/// One tensor of the TENSORS section.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct TensorEntry {
    pub name_offset: U32,
    pub name_length: U16,
    pub ndim: u8,
    pub reserved0: u8,
    pub encoding: U32,
    pub reserved1: U32,
    pub params: [u8; 16],
    pub dims: [U64; 4],
    pub offset: U64,
    pub length: U64,
    pub checksum: U64,
    pub reserved2: U64,
}

/// The start of a metadata entry; key and value follow.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct MetaEntry {
    pub key_length: U16,
    pub kind: u8,
    pub reserved: u8,
    pub value_length: U32,
}

/// The start of the META section.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct MetaHeader {
    pub count: U32,
    pub reserved: U32,
}

pub(crate) const HEADER_BYTES: usize = size_of::<Header>();
pub(crate) const SECTION_ENTRY_BYTES: usize = size_of::<SectionEntry>();
pub(crate) const TENSOR_ENTRY_BYTES: usize = size_of::<TensorEntry>();

const _: () = assert!(HEADER_BYTES == 64 && SECTION_ENTRY_BYTES == 48 && TENSOR_ENTRY_BYTES == 96);
