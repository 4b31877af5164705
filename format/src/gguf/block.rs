//! [`GgufBlock`]: a block of quantized weights as it lies in a GGUF file, and what the decoders share.
//!
//! The decoders round as llama.cpp's `dequantize_row_*` do: the same operations on f32 in the same order, without
//! fused multiply-add. Codes are small integers, which f32 holds exactly, so sums of codes are computed in f32.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// A block of weights that share a scale.
pub(super) trait GgufBlock: FromBytes + Immutable + KnownLayout + Unaligned {
    /// Weights per block.
    const WEIGHTS: usize;

    /// Writes the weights to `out`, which has `WEIGHTS` elements.
    fn decode(&self, out: &mut [f32]);
}

/// Decodes whole blocks; stops at the end of the shorter of `bytes` and `out`.
pub(super) fn decode_blocks<B: GgufBlock>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.chunks_exact(size_of::<B>());
    for (bytes, out) in blocks.zip(out.chunks_exact_mut(B::WEIGHTS)) {
        if let Ok(block) = B::ref_from_bytes(bytes) {
            block.decode(out);
        }
    }
}

/// The masks of the bits of a byte, from the lowest.
pub(super) const BITS: [u8; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// A scale in binary16.
pub(super) fn f16(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

/// The bits of all bytes, from the lowest of the first byte.
pub(super) fn bits(bytes: &[u8]) -> impl Iterator<Item = bool> {
    bytes.iter().flat_map(|byte| BITS.map(|mask| byte & mask != 0))
}

/// The first bit of all bytes, then the second bit of all bytes, and so on: 0 or 1.
pub(super) fn bit_planes(bytes: &[u8]) -> impl Iterator<Item = f32> {
    BITS.into_iter().flat_map(move |mask| {
        bytes.iter().map(move |byte| if byte & mask != 0 { 1.0 } else { 0.0 })
    })
}

/// The 2-bit codes of all bytes, from the lowest of the first byte.
pub(super) fn pairs(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().flat_map(|byte| [byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6])
}

/// The lowest 2-bit code of all bytes, then the second one of all bytes, and so on.
pub(super) fn pair_planes(bytes: &[u8]) -> impl Iterator<Item = f32> {
    [0, 2, 4, 6].into_iter().flat_map(move |shift| {
        bytes.iter().map(move |byte| f32::from(byte.wrapping_shr(shift) & 3))
    })
}

/// The 4-bit codes of all bytes, from the lower one of the first byte.
pub(super) fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().flat_map(|byte| [byte & 15, byte >> 4])
}

/// Writes `f` of the lower 4-bit code of all bytes to `out`, then that of the upper codes.
pub(super) fn nibble_planes(bytes: &[u8], out: &mut [f32], f: impl Fn(u8) -> f32) {
    let codes = bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4));
    for (o, code) in out.iter_mut().zip(codes) {
        *o = f(code);
    }
}

/// The value of a code; codes are smaller than the tables.
pub(super) fn look_up<T: Copy + Default>(table: &[T], code: usize) -> T {
    table.get(code).copied().unwrap_or_default()
}
