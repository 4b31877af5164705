//! The limits of spec, container §3.6. A reader rejects files that exceed them before it allocates memory.

/// The first eight bytes of every file (STB-R-002): a byte that no text file starts with, `STB`,
/// CR LF, ^Z and LF. Tools that convert line endings damage it visibly.
pub const MAGIC: [u8; 8] = *b"\x8fSTB\r\n\x1a\n";
/// The newest version of the format that this crate reads, and the version of its writer.
pub const VERSION: u16 = 2;
/// The oldest version whose readers know deflated texts (STB-R-024).
pub(crate) const DEFLATED_TEXT_VERSION: u16 = 2;
/// Bytes of the head: header, section directory, zero padding and checksum.
pub const HEAD_BYTES: usize = 4096;
/// Alignment of sections in bytes: one page, so that each section can be mapped separately.
pub const SECTION_ALIGN: u64 = 4096;
/// Alignment of tensors and their segments in bytes: a cache line or an AVX-512 register.
pub const TENSOR_ALIGN: u64 = 64;
/// The largest number of sections of a file.
pub const MAX_SECTIONS: u32 = 64;
/// The largest number of tensors of a file.
pub const MAX_TENSORS: u32 = 1 << 20;
/// The largest length of a tensor name or a metadata key in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// The largest number of dimensions of a tensor.
pub const MAX_DIMS: usize = 4;
/// The largest single dimension.
pub const MAX_DIM: u64 = 0xFFFF_FFFF;
/// The largest number of elements of a tensor.
pub const MAX_ELEMENTS: u64 = 1 << 48;
/// The largest number of metadata entries.
pub const MAX_META_ENTRIES: u32 = 4096;
/// The largest length of a metadata value in bytes.
pub const MAX_META_VALUE_BYTES: u32 = 1 << 28;
/// The largest sum of the lengths of all deflated texts of a file, inflated, in bytes.
pub const MAX_INFLATED_BYTES: u64 = 1 << 28;
