//! AVX2 with FMA, F16C and BMI2: two 256-bit registers hold the 16 lanes.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "intrinsics on values share one precondition, see `values!`"
)]

use std::arch::x86_64::*;

use super::bytes::{Bytes, Task};
use super::simd::Simd;
use super::x86_stream;

/// Exists only on machines with AVX2, FMA, F16C and BMI2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Avx2(());

/// Lanes 0 to 7 and 8 to 15.
type Floats8x2 = [__m256; 2];
type Ints8x2 = [__m256i; 2];

impl Avx2 {
    /// The proof that this machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2");
        all.then_some(Self(()))
    }

    /// The proof without another check, for sets that include this one.
    ///
    /// # Safety
    /// [`Avx2::detect`] must return `Some` on this machine.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Compiles `task` for AVX2: everything it calls is inlined into this function.
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn enter<T: Task>(s: Avx2, task: T) -> T::Output {
    task.run(s)
}

/// Evaluates intrinsics that take values only.
///
/// The one proof for all uses: the enclosing method has an `Avx2` as `self`, which only
/// `Avx2::detect` makes, so the instructions exist on this machine; values in, values out, no
/// memory is touched.
macro_rules! values {
    ($e:expr) => {
        // SAFETY: `self` proves that the CPU has the instructions; see the macro.
        unsafe { $e }
    };
}

/// Applies a two-operand intrinsic to both halves.
macro_rules! both {
    ($op:ident, $a:expr, $b:expr) => {
        values!([$op($a[0], $b[0]), $op($a[1], $b[1])])
    };
}

impl Simd for Avx2 {
    type F = Floats8x2;
    type I = Ints8x2;
    const GEMM_ROWS: usize = 6;
    const GEMM_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> Floats8x2 {
        values!([_mm256_set1_ps(v); 2])
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> Floats8x2 {
        let (halves, _) = v.as_chunks::<8>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[f32; 8]| {
                // SAFETY: 32 bytes are readable behind the reference; the load takes any alignment.
                unsafe { _mm256_loadu_ps(half.as_ptr()) }
            },
        )
    }

    #[inline(always)]
    fn load_bytes(self, v: &[u8; 64]) -> Floats8x2 {
        let (halves, _) = v.as_chunks::<32>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[u8; 32]| {
                // SAFETY: 32 bytes are readable behind the reference; any alignment is fine.
                unsafe { _mm256_loadu_ps(half.as_ptr().cast()) }
            },
        )
    }

    #[inline(always)]
    fn store(self, v: Floats8x2, to: &mut [f32; 16]) {
        let (halves, _) = to.as_chunks_mut::<8>();
        for (half, v) in halves.iter_mut().zip(v) {
            // SAFETY: 32 bytes are writable behind the reference; the store takes any alignment.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn add(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn max(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: Floats8x2, b: Floats8x2) -> Floats8x2 {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn select_less(self, a: Floats8x2, b: Floats8x2, x: Floats8x2, y: Floats8x2) -> Floats8x2 {
        let less = |i: usize| values!(_mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i]));
        values!([_mm256_blendv_ps(y[0], x[0], less(0)), _mm256_blendv_ps(y[1], x[1], less(1))])
    }

    #[inline(always)]
    fn mul_add(self, a: Floats8x2, b: Floats8x2, c: Floats8x2) -> Floats8x2 {
        values!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn round(self, a: Floats8x2) -> Floats8x2 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        values!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }

    #[inline(always)]
    fn cast_i(self, a: Floats8x2) -> Ints8x2 {
        values!([_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])])
    }

    #[inline(always)]
    fn cast_f(self, a: Ints8x2) -> Floats8x2 {
        values!([_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])])
    }

    #[inline(always)]
    fn to_f32(self, a: Ints8x2) -> Floats8x2 {
        values!([_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])])
    }

    #[inline(always)]
    fn to_i32(self, a: Floats8x2) -> Ints8x2 {
        values!([_mm256_cvttps_epi32(a[0]), _mm256_cvttps_epi32(a[1])])
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> Ints8x2 {
        values!([_mm256_set1_epi32(v.cast_signed()); 2])
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> Ints8x2 {
        let (halves, _) = v.as_chunks::<8>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[u8; 8]| {
                values!(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*half))))
            },
        )
    }

    #[inline(always)]
    fn widen_u16(self, v: &[u8; 32]) -> Ints8x2 {
        let (halves, _) = v.as_chunks::<16>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[u8; 16]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                let half = unsafe { _mm_loadu_si128(half.as_ptr().cast()) };
                values!(_mm256_cvtepu16_epi32(half))
            },
        )
    }

    #[inline(always)]
    fn f16_to_f32(self, v: &[u8; 32]) -> Floats8x2 {
        let (halves, _) = v.as_chunks::<16>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[u8; 16]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                let half = unsafe { _mm_loadu_si128(half.as_ptr().cast()) };
                values!(_mm256_cvtph_ps(half))
            },
        )
    }

    #[inline(always)]
    fn add_i(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_add_epi32, a, b)
    }

    #[inline(always)]
    fn and(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_and_si256, a, b)
    }

    #[inline(always)]
    fn or(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_or_si256, a, b)
    }

    #[inline(always)]
    fn xor(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_xor_si256, a, b)
    }

    #[inline(always)]
    fn shl(self, a: Ints8x2, by: u32) -> Ints8x2 {
        let by = values!(_mm_cvtsi32_si128(by.cast_signed()));
        values!([_mm256_sll_epi32(a[0], by), _mm256_sll_epi32(a[1], by)])
    }

    #[inline(always)]
    fn shr_each(self, a: Ints8x2, by: Ints8x2) -> Ints8x2 {
        values!([_mm256_srlv_epi32(a[0], by[0]), _mm256_srlv_epi32(a[1], by[1])])
    }

    #[inline(always)]
    fn shr(self, a: Ints8x2, by: u32) -> Ints8x2 {
        let by = values!(_mm_cvtsi32_si128(by.cast_signed()));
        values!([_mm256_srl_epi32(a[0], by), _mm256_srl_epi32(a[1], by)])
    }

    #[inline(always)]
    fn gt_i(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_cmpgt_epi32, a, b)
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> Ints8x2 {
        let lane_bits = values!([
            _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
            _mm256_setr_epi32(256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        ]);
        let hit = self.and(self.splat_i(u32::from(bits)), lane_bits);
        let hit = both!(_mm256_cmpeq_epi32, hit, lane_bits);
        self.and(hit, self.splat_i(v))
    }

    #[inline(always)]
    fn lookup(self, table: Floats8x2, index: Ints8x2) -> Floats8x2 {
        halves_of(
            &index,
            #[inline(always)]
            |index: &__m256i| {
                // Bit 3 of the index, moved to the sign, picks the half of the table; the permutation
                // uses the low three bits.
                let upper = values!(_mm256_castsi256_ps(_mm256_slli_epi32::<28>(*index)));
                let low = values!(_mm256_permutevar8x32_ps(table[0], *index));
                let high = values!(_mm256_permutevar8x32_ps(table[1], *index));
                values!(_mm256_blendv_ps(low, high, upper))
            },
        )
    }

    #[inline(always)]
    fn deposit(self, bits: u64, mask: u64) -> u64 {
        values!(_pdep_u64(bits, mask))
    }
}

/// See [`Bytes::transpose`].
#[inline(always)]
pub(super) fn transpose(_proof: Avx2, words: &[u64; 16]) -> [Ints8x2; 2] {
    let (pairs, _) = words.as_chunks::<2>();
    // SAFETY: the argument proves that the CPU has the instructions; 16 bytes are readable behind each
    // reference, at any alignment.
    unsafe {
        let load = |i: usize| _mm_loadu_si128(pairs[i].as_ptr().cast());
        // Interleaves the bytes of two words. The upper halves hold rows from 8 on.
        let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
        ));
        let two = |i: usize| _mm256_shuffle_epi8(_mm256_set_m128i(load(i + 4), load(i)), order);
        let (a, b, c, d) = (two(0), two(1), two(2), two(3));
        // Collects four rows of each byte, then eight.
        let (ab, cd) = (_mm256_unpacklo_epi16(a, b), _mm256_unpacklo_epi16(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi16(a, b), _mm256_unpackhi_epi16(c, d));
        // Puts the eight rows of the other half beside them.
        let join = |eights| _mm256_permute4x64_epi64::<0b11_01_10_00>(eights);
        [
            [join(_mm256_unpacklo_epi32(ab, cd)), join(_mm256_unpackhi_epi32(ab, cd))],
            [
                join(_mm256_unpacklo_epi32(ab_high, cd_high)),
                join(_mm256_unpackhi_epi32(ab_high, cd_high)),
            ],
        ]
    }
}

/// Both halves of a vector from two parts.
#[inline(always)]
fn halves_of<A, B>(parts: &[A], f: impl Fn(&A) -> B) -> [B; 2] {
    [f(&parts[0]), f(&parts[1])]
}

/// Lanes 0 and 1, lanes 2 and 3.
impl Bytes for Avx2 {
    type B = Ints8x2;
    /// 16-bit sums of rows 0 to 7 and 8 to 15, those of lane 0 and 2 in the low halves, of lane 1
    /// and 3 in the high ones.
    type Acc = Ints8x2;
    /// 16-bit sums of neighbors.
    type Small = Ints8x2;
    type H = __m256i;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        // SAFETY: `self` proves that the CPU has every feature the function is compiled for.
        unsafe { enter(self, task) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint without effect on memory; the instruction never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn load_b(self, v: &[u8; 64]) -> Ints8x2 {
        let (halves, _) = v.as_chunks::<32>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[u8; 32]| {
                // SAFETY: 32 bytes are readable behind the reference; any alignment is fine.
                unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
            },
        )
    }

    #[inline(always)]
    fn store_b(self, v: Ints8x2, to: &mut [u8; 64]) {
        let (halves, _) = to.as_chunks_mut::<32>();
        for (half, v) in halves.iter_mut().zip(v) {
            // SAFETY: 32 bytes are writable behind the reference; the store takes any alignment.
            unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), v) }
        }
    }

    #[inline(always)]
    fn splat_b(self, v: u8) -> Ints8x2 {
        values!([_mm256_set1_epi8(v.cast_signed()); 2])
    }

    #[inline(always)]
    fn splat_word(self, v: [u8; 4]) -> Ints8x2 {
        self.splat_i(u32::from_le_bytes(v))
    }

    #[inline(always)]
    fn and_b(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_and_si256, a, b)
    }

    #[inline(always)]
    fn or_b(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_or_si256, a, b)
    }

    #[inline(always)]
    fn xor_b(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_xor_si256, a, b)
    }

    #[inline(always)]
    fn add_b(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_add_epi8, a, b)
    }

    #[inline(always)]
    fn sub_b(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        both!(_mm256_sub_epi8, a, b)
    }

    #[inline(always)]
    fn shr_b<const K: u32>(self, a: Ints8x2) -> Ints8x2 {
        let count = values!(_mm_cvtsi32_si128(K.cast_signed()));
        values!([_mm256_srl_epi16(a[0], count), _mm256_srl_epi16(a[1], count)])
    }

    #[inline(always)]
    fn shl_b<const K: u32>(self, a: Ints8x2) -> Ints8x2 {
        let count = values!(_mm_cvtsi32_si128(K.cast_signed()));
        values!([_mm256_sll_epi16(a[0], count), _mm256_sll_epi16(a[1], count)])
    }

    #[inline(always)]
    fn lookup_b(self, table: Ints8x2, index: Ints8x2) -> Ints8x2 {
        both!(_mm256_shuffle_epi8, table, index)
    }

    #[inline(always)]
    fn load_stream<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> Ints8x2 {
        let [a, b, c, d] = values!(x86_stream::lanes(stream));
        values!([_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)])
    }

    #[inline(always)]
    fn high_products(self, a: Ints8x2, b: Ints8x2, factors: [Ints8x2; 2]) -> Ints8x2 {
        let (low, high) =
            (both!(_mm256_mullo_epi16, a, factors[0]), both!(_mm256_mullo_epi16, b, factors[1]));
        let first = values!([_mm256_srli_epi16::<8>(low[0]), _mm256_srli_epi16::<8>(low[1])]);
        self.or_b(first, self.and_b(high, self.splat_word([0, 255, 0, 255])))
    }

    #[inline(always)]
    fn transpose(self, words: &[u64; 16]) -> [Ints8x2; 2] {
        transpose(self, words)
    }

    #[inline(always)]
    fn zero_acc(self) -> Ints8x2 {
        values!([_mm256_setzero_si256(); 2])
    }

    #[inline(always)]
    fn dot2(self, acc: Ints8x2, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        // Interleaves a and b, multiplies by one and adds neighbors: 16-bit sums.
        let one = values!(_mm256_set1_epi8(1));
        let low = both!(_mm256_unpacklo_epi8, a, b);
        let high = both!(_mm256_unpackhi_epi8, a, b);
        let low = values!([_mm256_maddubs_epi16(one, low[0]), _mm256_maddubs_epi16(one, low[1])]);
        let high =
            values!([_mm256_maddubs_epi16(one, high[0]), _mm256_maddubs_epi16(one, high[1])]);
        // Two lanes of each half add up to ±508, so 64 steps fit 16 bits.
        values!([
            _mm256_add_epi16(acc[0], _mm256_add_epi16(low[0], low[1])),
            _mm256_add_epi16(acc[1], _mm256_add_epi16(high[0], high[1])),
        ])
    }

    #[inline(always)]
    fn finish(self, acc: Ints8x2) -> Ints8x2 {
        // Adds the lanes in the two halves of 16 bytes, for 8 rows each.
        let low = values!([
            _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[0])),
            _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[1])),
        ]);
        let high = values!([
            _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(acc[0])),
            _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(acc[1])),
        ]);
        both!(_mm256_add_epi32, low, high)
    }

    #[inline(always)]
    fn dot4(self, acc: Ints8x2, u: Ints8x2, v: Ints8x2) -> Ints8x2 {
        let pairs = both!(_mm256_maddubs_epi16, u, v);
        let one = values!([_mm256_set1_epi16(1); 2]);
        let fours = both!(_mm256_madd_epi16, pairs, one);
        both!(_mm256_add_epi32, acc, fours)
    }

    #[inline(always)]
    fn zero_small(self) -> Ints8x2 {
        values!([_mm256_setzero_si256(); 2])
    }

    #[inline(always)]
    fn dot4_small(self, acc: Ints8x2, u: Ints8x2, v: Ints8x2) -> Ints8x2 {
        let pairs = both!(_mm256_maddubs_epi16, u, v);
        both!(_mm256_add_epi16, acc, pairs)
    }

    #[inline(always)]
    fn finish_small(self, acc: Ints8x2) -> Ints8x2 {
        let one = values!([_mm256_set1_epi16(1); 2]);
        both!(_mm256_madd_epi16, acc, one)
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
    fn widen_h(self, v: __m256i) -> Ints8x2 {
        values!([
            _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)),
            _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(v)),
        ])
    }

    #[inline(always)]
    fn add_pairs(self, a: Ints8x2, b: Ints8x2) -> Ints8x2 {
        // Adds within halves of 128 bits, so the middle quarters change places.
        values!([
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(a[0], a[1])),
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(b[0], b[1])),
        ])
    }

    #[inline(always)]
    fn load_lanes(self, v: [&[u8; 16]; 4]) -> Ints8x2 {
        // SAFETY: 16 bytes are readable behind each reference; the loads take any alignment.
        let [a, b, c, d] = v.map(|v| unsafe { _mm_loadu_si128(v.as_ptr().cast()) });
        values!([_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)])
    }

    #[inline(always)]
    fn transpose_words(self, v: [Ints8x2; 4]) -> [Ints8x2; 4] {
        let [a, b, c, d] = v;
        let (ab, cd) = (both!(_mm256_unpacklo_epi32, a, b), both!(_mm256_unpacklo_epi32, c, d));
        let ab_high = both!(_mm256_unpackhi_epi32, a, b);
        let cd_high = both!(_mm256_unpackhi_epi32, c, d);
        [
            both!(_mm256_unpacklo_epi64, ab, cd),
            both!(_mm256_unpackhi_epi64, ab, cd),
            both!(_mm256_unpacklo_epi64, ab_high, cd_high),
            both!(_mm256_unpackhi_epi64, ab_high, cd_high),
        ]
    }

    #[inline(always)]
    fn store_words(self, v: Ints8x2, to: &mut [u8; 64]) {
        self.store_b(v, to);
    }

    #[inline(always)]
    fn load_i(self, v: &[i32; 16]) -> Ints8x2 {
        let (halves, _) = v.as_chunks::<8>();
        halves_of(
            halves,
            #[inline(always)]
            |half: &[i32; 8]| {
                // SAFETY: 32 bytes are readable behind the reference; any alignment is fine.
                unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
            },
        )
    }

    #[inline(always)]
    fn store_low_bytes(self, v: Ints8x2, to: &mut [i8; 16]) {
        let packed = values!({
            let words = _mm256_packs_epi32(v[0], v[1]);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_packs_epi16(low, high)
        });
        // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), packed) }
    }
}
