//! AVX2 with FMA, F16C and BMI2: two 256-bit registers hold the 16 lanes.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "intrinsics on values share one precondition, see `values!`"
)]

use std::arch::x86_64::*;

use super::Simd;
use crate::isa::Task;

/// Exists only on machines with AVX2, FMA, F16C and BMI2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Avx2(());

/// Lanes 0 to 7 and 8 to 15.
type F = [__m256; 2];
type I = [__m256i; 2];

impl Avx2 {
    /// The proof that this machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2");
        all.then_some(Self(()))
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
    type F = F;
    type I = I;
    const GEMM_ROWS: usize = 4;
    const GEMM_VECTORS: usize = 1;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        // SAFETY: `self` proves that the CPU has every feature the function is compiled for.
        unsafe { enter(self, task) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> F {
        values!([_mm256_set1_ps(v); 2])
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> F {
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
    fn load_bytes(self, v: &[u8; 64]) -> F {
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
    fn store(self, v: F, to: &mut [f32; 16]) {
        let (halves, _) = to.as_chunks_mut::<8>();
        for (half, v) in halves.iter_mut().zip(v) {
            // SAFETY: 32 bytes are writable behind the reference; the store takes any alignment.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        values!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        values!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }

    #[inline(always)]
    fn cast_i(self, a: F) -> I {
        values!([_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])])
    }

    #[inline(always)]
    fn cast_f(self, a: I) -> F {
        values!([_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])])
    }

    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        values!([_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])])
    }

    #[inline(always)]
    fn to_i32(self, a: F) -> I {
        values!([_mm256_cvttps_epi32(a[0]), _mm256_cvttps_epi32(a[1])])
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> I {
        values!([_mm256_set1_epi32(v.cast_signed()); 2])
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> I {
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
    fn widen_u16(self, v: &[u8; 32]) -> I {
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
    fn f16_to_f32(self, v: &[u8; 32]) -> F {
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
    fn add_i(self, a: I, b: I) -> I {
        both!(_mm256_add_epi32, a, b)
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both!(_mm256_and_si256, a, b)
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        both!(_mm256_or_si256, a, b)
    }

    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        both!(_mm256_xor_si256, a, b)
    }

    #[inline(always)]
    fn shl(self, a: I, by: u32) -> I {
        let by = values!(_mm_cvtsi32_si128(by.cast_signed()));
        values!([_mm256_sll_epi32(a[0], by), _mm256_sll_epi32(a[1], by)])
    }

    #[inline(always)]
    fn shr(self, a: I, by: u32) -> I {
        let by = values!(_mm_cvtsi32_si128(by.cast_signed()));
        values!([_mm256_srl_epi32(a[0], by), _mm256_srl_epi32(a[1], by)])
    }

    #[inline(always)]
    fn gt_i(self, a: I, b: I) -> I {
        both!(_mm256_cmpgt_epi32, a, b)
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> I {
        let lane_bits = values!([
            _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
            _mm256_setr_epi32(256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        ]);
        let hit = self.and(self.splat_i(u32::from(bits)), lane_bits);
        let hit = both!(_mm256_cmpeq_epi32, hit, lane_bits);
        self.and(hit, self.splat_i(v))
    }

    #[inline(always)]
    fn lookup(self, table: F, index: I) -> F {
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

/// Both halves of a vector from two parts.
#[inline(always)]
fn halves_of<A, B>(parts: &[A], f: impl Fn(&A) -> B) -> [B; 2] {
    [f(&parts[0]), f(&parts[1])]
}
