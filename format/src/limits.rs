//! The limits of spec §3.6. A reader refuses what exceeds them before it allocates.

/// The first eight bytes of every file (STB-R-002): a byte no text file starts with, the letters,
/// then CR LF, ^Z and LF, so that line-ending translation and text tools damage it visibly.
pub const MAGIC: [u8; 8] = *b"\x8fSTB\r\n\x1a\n";
/// The version of the format that this crate writes and the newest it reads.
pub const VERSION: u16 = 1;
/// Bytes of the head: header, section directory, zero padding and checksum.
pub const HEAD_BYTES: usize = 4096;
/// Sections start at multiples of this many bytes, so that each can be mapped on its own.
pub const SECTION_ALIGN: u64 = 4096;
/// Tensors and the segments inside them start at multiples of this: a cache line and an AVX-512
/// register.
pub const TENSOR_ALIGN: u64 = 64;
/// The most sections a file may hold.
pub const MAX_SECTIONS: u32 = 64;
/// The most tensors a file may hold.
pub const MAX_TENSORS: u32 = 1 << 20;
/// The most bytes in a tensor's name or a metadata key.
pub const MAX_NAME_BYTES: usize = 255;
/// The most dimensions of a tensor.
pub const MAX_DIMS: usize = 4;
/// The largest single dimension.
pub const MAX_DIM: u64 = 0xFFFF_FFFF;
/// The most elements of a tensor.
pub const MAX_ELEMENTS: u64 = 1 << 48;
/// The most metadata entries.
pub const MAX_META_ENTRIES: u32 = 4096;
/// The most bytes in one metadata value.
pub const MAX_META_VALUE_BYTES: u32 = 1 << 28;
