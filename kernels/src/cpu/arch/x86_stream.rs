//! Loads of circular bit streams for AVX2 and AVX-512 without VBMI.

use std::arch::x86_64::*;

use super::windows::Windows;

/// The four lanes of [`Bytes::load_stream`](super::bytes::Bytes::load_stream).
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn lanes<const BITS: usize>(stream: &[[u8; 8]; BITS]) -> [__m128i; 4] {
    let bytes = stream.as_flattened();
    if BITS == 1 {
        return [_mm_set1_epi64x(i64::from_le_bytes(stream[0])); 4];
    }
    let lane = |lane: usize| {
        let at = Windows::<BITS>::STARTS[lane];
        let part: &[u8; 16] = bytes[at..].first_chunk().expect("16 bytes of the stream");
        // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm_loadu_si128(part.as_ptr().cast()) }
    };
    let [a, b, c, d] = [lane(0), lane(1), lane(2), lane(3)];
    if BITS == 2 {
        // The stream is one lane.
        return [a; 4];
    }
    [a, b, c, _mm_alignr_epi8::<1>(a, d)]
}
