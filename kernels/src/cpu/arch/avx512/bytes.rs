//! The operations on bytes.

use std::arch::x86_64::*;

use super::super::amx::{self, AmxTiles};
use super::super::avx2::{self, Avx2};
use super::super::bytes::{Bytes, Task, TileTask, windows_of_lanes};
use super::super::simd::Simd;
use super::super::vbmi;
use super::super::windows::Windows;
use super::super::x86_stream;
use super::{AMX, Avx512, VBMI, enter, enter_vbmi};

impl<const LEVEL: u8> Bytes for Avx512<LEVEL> {
    type B = __m512i;
    /// From level `VBMI` on: 16 sums, and an unused register. Below: 16-bit sums of rows 0 to 7 and 8 to 15, by
    /// lane.
    type Acc = [__m512i; 2];
    /// Sums of four products; below `VBMI`, 16-bit sums of two neighbors.
    type Small = __m512i;
    type H = __m256i;
    const WIDE: bool = LEVEL >= VBMI;
    const TILES: bool = LEVEL >= AMX;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        if LEVEL >= VBMI {
            // SAFETY: a value of that level proves that the CPU has every feature of the function.
            unsafe { enter_vbmi(self, task) }
        } else {
            // SAFETY: `self` proves that the CPU has every feature the function is compiled for.
            unsafe { enter(Avx512(()), task) }
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint without effect on memory; the instruction never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn load_b(self, v: &[u8; 64]) -> __m512i {
        // SAFETY: 64 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_b(self, v: __m512i, to: &mut [u8; 64]) {
        // SAFETY: 64 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn splat_b(self, v: u8) -> __m512i {
        values!(_mm512_set1_epi8(v.cast_signed()))
    }

    #[inline(always)]
    fn splat_word(self, v: [u8; 4]) -> __m512i {
        self.splat_i(u32::from_le_bytes(v))
    }

    #[inline(always)]
    fn and_b(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or_b(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn xor_b(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_xor_si512(a, b))
    }

    #[inline(always)]
    fn add_b(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_add_epi8(a, b))
    }

    #[inline(always)]
    fn sub_b(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_sub_epi8(a, b))
    }

    #[inline(always)]
    fn shr_b<const K: u32>(self, a: __m512i) -> __m512i {
        values!(_mm512_srli_epi16::<K>(a))
    }

    #[inline(always)]
    fn shl_b<const K: u32>(self, a: __m512i) -> __m512i {
        values!(_mm512_slli_epi16::<K>(a))
    }

    #[inline(always)]
    fn lookup_b(self, table: __m512i, index: __m512i) -> __m512i {
        values!(_mm512_shuffle_epi8(table, index))
    }

    #[inline(always)]
    fn load_stream<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> __m512i {
        // SAFETY: `self` exists only where all features of the older set have been detected as well.
        let [a, b, c, d] = unsafe { x86_stream::lanes(stream) };
        values!({
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, c), d)
        })
    }

    #[inline(always)]
    fn high_products(self, a: __m512i, b: __m512i, factors: [__m512i; 2]) -> __m512i {
        values!({
            let first = _mm512_srli_epi16::<8>(_mm512_mullo_epi16(a, factors[0]));
            let second = _mm512_mullo_epi16(b, factors[1]);
            _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, first, second)
        })
    }

    #[inline(always)]
    fn windows<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> __m512i {
        if LEVEL < VBMI {
            return windows_of_lanes(self, stream);
        }
        let bits = self.load_b(&Windows::<BITS>::WORD_BITS);
        if BITS == 1 {
            // The stream is one word, in which the instruction shifts around.
            let word = values!(_mm512_set1_epi64(i64::from_le_bytes(stream[0])));
            return values!(_mm512_multishift_epi64_epi8(bits, word));
        }
        let mask = u64::MAX >> (64 - Windows::<BITS>::BYTES);
        // SAFETY: reads the bytes of the mask only, which are the stream; the load takes any alignment.
        let all = unsafe { _mm512_maskz_loadu_epi8(mask, stream.as_ptr().cast()) };
        let order = self.load_b(&Windows::<BITS>::WORD_BYTES);
        values!(_mm512_multishift_epi64_epi8(bits, _mm512_permutexvar_epi8(order, all)))
    }

    #[inline(always)]
    fn transpose(self, words: &[u64; 16]) -> [__m512i; 2] {
        let (halves, _) = words.as_chunks::<8>();
        if LEVEL >= VBMI {
            // SAFETY: 64 bytes are readable behind the reference, at any alignment.
            let first = unsafe { _mm512_loadu_si512(halves[0].as_ptr().cast()) };
            // SAFETY: as above.
            let second = unsafe { _mm512_loadu_si512(halves[1].as_ptr().cast()) };
            let orders = [self.load_b(&BYTES_OF_ROWS[0]), self.load_b(&BYTES_OF_ROWS[1])];
            return values!([
                _mm512_permutex2var_epi8(first, orders[0], second),
                _mm512_permutex2var_epi8(first, orders[1], second),
            ]);
        }
        // SAFETY: `self` exists only where all features of the older set have been detected as well.
        let older = unsafe { Avx2::assume() };
        let [[a, b], [c, d]] = avx2::transpose(older, words);
        values!([
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b),
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(c), d),
        ])
    }

    #[inline(always)]
    fn arrange(self, v: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            return values!(_mm512_permutexvar_epi8(self.load_b(&ROWS_FIRST), v));
        }
        v
    }

    #[inline(always)]
    fn lookup_arranged(self, table: __m512i, index: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            let index = self.or_b(index, self.load_b(&LANES_OF_ROWS));
            return values!(_mm512_permutexvar_epi8(index, table));
        }
        self.lookup_b(table, index)
    }

    #[inline(always)]
    fn lookup_arranged_or_zero(self, table: __m512i, index: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            // A bit above the six of an index into the table chooses zeros.
            let index = self.or_b(index, self.load_b(&LANES_OF_ROWS));
            return values!(_mm512_permutex2var_epi8(table, index, _mm512_setzero_si512()));
        }
        self.lookup_b(table, index)
    }

    #[inline(always)]
    fn add_lookups<const OR_ZERO: bool>(
        self,
        acc: [Self::Acc; 8],
        tables: &[[u8; 64]; 8],
        index: __m512i,
    ) -> [Self::Acc; 8] {
        assert!(LEVEL >= VBMI, "a set with look-ups of 64 bytes");
        let lanes = self.load_b(&LANES_OF_ROWS);
        let sums = acc.map(
            #[inline(always)]
            |acc| acc[0],
        );
        let sums = if OR_ZERO {
            // Bit 6 chooses the table, or zeros.
            let index = self.xor_b(index, self.or_b(lanes, self.splat_b(0x40)));
            // SAFETY: a value of that level proves that the CPU has every feature of the function.
            unsafe { vbmi::add_lookups_or_zero(sums, tables, index) }
        } else {
            // SAFETY: as above.
            unsafe { vbmi::add_lookups(sums, tables, self.or_b(index, lanes)) }
        };
        sums.map(
            #[inline(always)]
            |sum| [sum, acc[0][1]],
        )
    }

    #[inline(always)]
    fn zero_acc(self) -> Self::Acc {
        values!([_mm512_setzero_si512(); 2])
    }

    #[inline(always)]
    fn dot2(self, acc: Self::Acc, a: __m512i, b: __m512i) -> Self::Acc {
        let one = self.splat_b(1);
        if LEVEL >= VBMI {
            // The four lanes of a row are neighbors: multiplies them by one and adds.
            let sums = values!(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[0], one, a), one, b));
            return [sums, acc[1]];
        }
        // Interleaves a and b, multiplies by one and adds neighbors.
        values!([
            _mm512_add_epi16(acc[0], _mm512_maddubs_epi16(one, _mm512_unpacklo_epi8(a, b))),
            _mm512_add_epi16(acc[1], _mm512_maddubs_epi16(one, _mm512_unpackhi_epi8(a, b))),
        ])
    }

    #[inline(always)]
    fn finish(self, acc: Self::Acc) -> __m512i {
        if LEVEL >= VBMI {
            return acc[0];
        }
        // Adds lanes 0 and 2, 1 and 3: their 16-bit sums are within ±508 · 64. Then adds both, in 32 bits.
        values!({
            let rows_low = _mm256_add_epi16(
                _mm512_castsi512_si256(acc[0]),
                _mm512_extracti64x4_epi64::<1>(acc[0]),
            );
            let rows_high = _mm256_add_epi16(
                _mm512_castsi512_si256(acc[1]),
                _mm512_extracti64x4_epi64::<1>(acc[1]),
            );
            let even = _mm256_permute2x128_si256::<0x20>(rows_low, rows_high);
            let odd = _mm256_permute2x128_si256::<0x31>(rows_low, rows_high);
            _mm512_add_epi32(_mm512_cvtepi16_epi32(even), _mm512_cvtepi16_epi32(odd))
        })
    }

    #[inline(always)]
    fn dot4(self, acc: __m512i, u: __m512i, v: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            return values!(_mm512_dpbusd_epi32(acc, u, v));
        }
        values!({
            let pairs = _mm512_maddubs_epi16(u, v);
            _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn zero_small(self) -> __m512i {
        values!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot4_small(self, acc: __m512i, u: __m512i, v: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            return self.dot4(acc, u, v);
        }
        values!(_mm512_add_epi16(acc, _mm512_maddubs_epi16(u, v)))
    }

    #[inline(always)]
    fn finish_small(self, acc: __m512i) -> __m512i {
        if LEVEL >= VBMI {
            return acc;
        }
        values!(_mm512_madd_epi16(acc, _mm512_set1_epi16(1)))
    }

    #[inline(always)]
    fn load_h(self, v: &[i16; 16]) -> __m256i {
        // SAFETY: 32 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_h(self, v: __m256i, to: &mut [i16; 16]) {
        // SAFETY: 32 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn add_h(self, a: __m256i, b: __m256i) -> __m256i {
        values!(_mm256_add_epi16(a, b))
    }

    #[inline(always)]
    fn sub_h(self, a: __m256i, b: __m256i) -> __m256i {
        values!(_mm256_sub_epi16(a, b))
    }

    #[inline(always)]
    fn widen_h(self, v: __m256i) -> __m512i {
        values!(_mm512_cvtepi16_epi32(v))
    }

    #[inline(always)]
    fn add_pairs(self, a: __m512i, b: __m512i) -> __m512i {
        let (even, odd) = (self.load_i(&PAIRS[0]), self.load_i(&PAIRS[1]));
        values!(_mm512_add_epi32(
            _mm512_permutex2var_epi32(a, even, b),
            _mm512_permutex2var_epi32(a, odd, b),
        ))
    }

    #[inline(always)]
    fn load_lanes(self, v: [&[u8; 16]; 4]) -> __m512i {
        // SAFETY: 16 bytes are readable behind each reference; the loads take any alignment.
        let [a, b, c, d] = v.map(|v| unsafe { _mm_loadu_si128(v.as_ptr().cast()) });
        values!({
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, c), d)
        })
    }

    #[inline(always)]
    fn transpose_words(self, v: [__m512i; 4]) -> [__m512i; 4] {
        let [a, b, c, d] = v;
        values!({
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        })
    }

    #[inline(always)]
    fn store_words(self, v: __m512i, to: &mut [u8; 64]) {
        self.store_b(v, to);
    }

    #[inline(always)]
    fn with_tiles<T: TileTask>(self, task: T) -> Option<T::Output> {
        if LEVEL < AMX {
            return None;
        }
        // SAFETY: a value of this level exists only where `amx::detect` has returned true.
        let output = unsafe {
            amx::with_tiles(
                #[inline(always)]
                |unit: &AmxTiles| task.run(self, unit),
            )
        };
        Some(output)
    }

    #[inline(always)]
    fn load_i(self, v: &[i32; 16]) -> __m512i {
        // SAFETY: 64 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_low_bytes(self, v: __m512i, to: &mut [i8; 16]) {
        let packed = values!(_mm512_cvtepi32_epi8(v));
        // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), packed) }
    }
}

/// The first and the second of each two neighbors.
const PAIRS: [[i32; 16]; 2] = {
    let mut pairs = [[0; 16]; 2];
    let mut i = 0;
    while i < 32 {
        pairs[i % 2][i / 2] = i as i32;
        i += 1;
    }
    pairs
};

/// Byte 16·lane + row of vector q comes from byte 8·row + 4q + lane.
const BYTES_OF_ROWS: [[u8; 64]; 2] = {
    let mut order = [[0; 64]; 2];
    let mut i = 0;
    while i < 128 {
        let (q, lane, row) = (i / 64, i / 16 % 4, i % 16);
        order[q][i % 64] = (8 * row + 4 * q + lane) as u8;
        i += 1;
    }
    order
};

/// Byte 4·row + lane comes from byte 16·lane + row.
const ROWS_FIRST: [u8; 64] = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 64 {
        order[i] = (i % 4 * 16 + i / 4) as u8;
        i += 1;
    }
    order
};

/// Where the table of each arranged byte begins: its lane.
const LANES_OF_ROWS: [u8; 64] = {
    let mut lanes = [0; 64];
    let mut i = 0;
    while i < 64 {
        lanes[i] = (i % 4 * 16) as u8;
        i += 1;
    }
    lanes
};
