//! AVX-512 (F, BW, DQ, VL with BMI2 and F16C): one 512-bit register holds the 16 lanes.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "intrinsics on values share one precondition, see `values!`"
)]

use std::arch::x86_64::*;

use super::amx;
use super::bytes::Task;
use super::simd::Simd;

/// Exists only on machines with AVX-512 F, BW, DQ and VL, AVX2, FMA, F16C and BMI2; from `LEVEL`
/// [`VBMI`] also VBMI and VNNI; with [`AMX`] also tiles of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Avx512<const LEVEL: u8>(());

/// F, BW, DQ and VL only.
pub(crate) const BASE: u8 = 0;
/// With VBMI and VNNI.
pub(crate) const VBMI: u8 = 1;
/// With VBMI, VNNI and AMX.
pub(crate) const AMX: u8 = 2;

impl<const LEVEL: u8> Avx512<LEVEL> {
    /// The proof that this machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2");
        let more = is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vnni");
        let enough = match LEVEL {
            BASE => all,
            VBMI => all && more,
            _ => all && more && amx::detect(),
        };
        enough.then_some(Self(()))
    }
}

/// Compiles `task` for AVX-512: everything it calls is inlined into this function.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
fn enter<T: Task>(s: Avx512<BASE>, task: T) -> T::Output {
    task.run(s)
}

/// The same with VBMI and VNNI.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512vbmi,avx512vnni"
)]
fn enter_vbmi<T: Task, const LEVEL: u8>(s: Avx512<LEVEL>, task: T) -> T::Output {
    task.run(s)
}

/// Evaluates intrinsics that take values only.
///
/// The one proof for all uses: the enclosing method has an `Avx512` as `self`, which only
/// `Avx512::detect` makes, so the instructions exist on this machine; values in, values out, no
/// memory is touched.
macro_rules! values {
    ($e:expr) => {
        // SAFETY: `self` proves that the CPU has the instructions; see the macro.
        unsafe { $e }
    };
}

mod bytes;

impl<const LEVEL: u8> Simd for Avx512<LEVEL> {
    type F = __m512;
    type I = __m512i;
    const GEMM_ROWS: usize = 8;
    const GEMM_VECTORS: usize = 2;

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        values!(_mm512_set1_ps(v))
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> __m512 {
        // SAFETY: 64 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm512_loadu_ps(v.as_ptr()) }
    }

    #[inline(always)]
    fn load_bytes(self, v: &[u8; 64]) -> __m512 {
        // SAFETY: 64 bytes are readable behind the reference; the load takes any alignment.
        unsafe { _mm512_loadu_ps(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; 16]) {
        // SAFETY: 64 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        values!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        values!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        values!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        values!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn cast_i(self, a: __m512) -> __m512i {
        values!(_mm512_castps_si512(a))
    }

    #[inline(always)]
    fn cast_f(self, a: __m512i) -> __m512 {
        values!(_mm512_castsi512_ps(a))
    }

    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        values!(_mm512_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn to_i32(self, a: __m512) -> __m512i {
        values!(_mm512_cvttps_epi32(a))
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> __m512i {
        values!(_mm512_set1_epi32(v.cast_signed()))
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> __m512i {
        // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
        let bytes = unsafe { _mm_loadu_si128(v.as_ptr().cast()) };
        values!(_mm512_cvtepu8_epi32(bytes))
    }

    #[inline(always)]
    fn widen_u16(self, v: &[u8; 32]) -> __m512i {
        // SAFETY: 32 bytes are readable behind the reference; the load takes any alignment.
        let bytes = unsafe { _mm256_loadu_si256(v.as_ptr().cast()) };
        values!(_mm512_cvtepu16_epi32(bytes))
    }

    #[inline(always)]
    fn f16_to_f32(self, v: &[u8; 32]) -> __m512 {
        // SAFETY: 32 bytes are readable behind the reference; the load takes any alignment.
        let bytes = unsafe { _mm256_loadu_si256(v.as_ptr().cast()) };
        values!(_mm512_cvtph_ps(bytes))
    }

    #[inline(always)]
    fn store_low_u16(self, v: __m512i, to: &mut [u8; 32]) {
        let packed = values!(_mm512_cvtepi32_epi16(v));
        // SAFETY: 32 bytes are writable behind the reference; the store takes any alignment.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), packed) }
    }

    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_xor_si512(a, b))
    }

    #[inline(always)]
    fn shl(self, a: __m512i, by: u32) -> __m512i {
        values!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(by.cast_signed())))
    }

    #[inline(always)]
    fn shr_each(self, a: __m512i, by: __m512i) -> __m512i {
        values!(_mm512_srlv_epi32(a, by))
    }

    #[inline(always)]
    fn shr(self, a: __m512i, by: u32) -> __m512i {
        values!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(by.cast_signed())))
    }

    #[inline(always)]
    fn gt_i(self, a: __m512i, b: __m512i) -> __m512i {
        values!(_mm512_movm_epi32(_mm512_cmpgt_epi32_mask(a, b)))
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> __m512i {
        values!(_mm512_maskz_set1_epi32(bits, v.cast_signed()))
    }

    #[inline(always)]
    fn lookup(self, table: __m512, index: __m512i) -> __m512 {
        // The instruction uses the low four bits of each index.
        values!(_mm512_permutexvar_ps(index, table))
    }

    #[inline(always)]
    fn sums(self, v: [__m512; 16]) -> [f32; 16] {
        // Adds halves of several vectors at once, in the order of `sum`, and ends with sum 4l + j in lane l.
        let sums = values!({
            let mut fours = [_mm512_setzero_ps(); 4];
            for (j, four) in fours.iter_mut().enumerate() {
                let (a, b, c, d) = (v[j], v[j + 4], v[j + 8], v[j + 12]);
                let ab = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0x44>(a, b),
                    _mm512_shuffle_f32x4::<0xee>(a, b),
                );
                let cd = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0x44>(c, d),
                    _mm512_shuffle_f32x4::<0xee>(c, d),
                );
                *four = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0x88>(ab, cd),
                    _mm512_shuffle_f32x4::<0xdd>(ab, cd),
                );
            }
            let mut twos = [_mm512_setzero_pd(); 2];
            for (two, four) in twos.iter_mut().zip(fours.as_chunks::<2>().0) {
                let [a, b] = four.map(
                    #[inline(always)]
                    |four| _mm512_castps_pd(four),
                );
                *two = _mm512_castps_pd(_mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                ));
            }
            let [a, b] = twos.map(
                #[inline(always)]
                |two| _mm512_castpd_ps(two),
            );
            _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))
        });
        let mut out = [0.0; 16];
        self.store(sums, &mut out);
        out
    }

    #[inline(always)]
    fn deposit(self, bits: u64, mask: u64) -> u64 {
        values!(_pdep_u64(bits, mask))
    }
}
