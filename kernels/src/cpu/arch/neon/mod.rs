//! NEON: four 128-bit registers hold the 16 lanes. Half-precision conversion, fused multiply-add
//! and look-ups in 16 and 64 bytes belong to the base of the architecture; the products of bytes
//! (`dotprod`) do not.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "intrinsics on values share one precondition, see `values!`"
)]

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use super::bytes::{Bytes, Task};
use super::simd::Simd;

/// Exists only on machines with NEON; with `DOT`, also with its dot products of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Neon<const DOT: bool>(());

/// Lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15.
type Floats4x4 = [float32x4_t; 4];
type Ints4x4 = [uint32x4_t; 4];

impl<const DOT: bool> Neon<DOT> {
    /// The proof that this machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_aarch64_feature_detected!("neon");
        let dot = is_aarch64_feature_detected!("dotprod");
        (all && (dot || !DOT)).then_some(Self(()))
    }
}

/// Compiles `task` for NEON: everything it calls is inlined into this function.
#[target_feature(enable = "neon")]
fn enter<T: Task>(s: Neon<false>, task: T) -> T::Output {
    task.run(s)
}

/// The same with dot products of bytes.
#[target_feature(enable = "neon,dotprod")]
fn enter_dot<T: Task>(s: Neon<true>, task: T) -> T::Output {
    task.run(s)
}

/// Evaluates intrinsics that take values only.
///
/// The one proof for all uses: the enclosing method has a `Neon` as `self`, which only
/// `Neon::detect` makes, so the instructions exist on this machine; values in, values out, no
/// memory is touched.
macro_rules! values {
    ($e:expr) => {
        // SAFETY: `self` proves that the CPU has the instructions; see the macro.
        unsafe { $e }
    };
}

/// Applies an intrinsic to the four registers of each operand.
macro_rules! each {
    ($op:ident, $($v:expr),+) => {
        values!([$op($($v[0]),+), $op($($v[1]),+), $op($($v[2]),+), $op($($v[3]),+)])
    };
}

/// Four registers from the four parts of some memory.
#[inline(always)]
fn parts<A, B>(parts: &[A], f: impl Fn(&A) -> B) -> [B; 4] {
    [f(&parts[0]), f(&parts[1]), f(&parts[2]), f(&parts[3])]
}

mod bytes;

impl<const DOT: bool> Simd for Neon<DOT> {
    type F = Floats4x4;
    type I = Ints4x4;
    const GEMM_ROWS: usize = 4;
    const GEMM_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> Floats4x4 {
        values!([vdupq_n_f32(v); 4])
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> Floats4x4 {
        parts(
            v.as_chunks::<4>().0,
            #[inline(always)]
            |part: &[f32; 4]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_f32(part.as_ptr()) }
            },
        )
    }

    #[inline(always)]
    fn load_bytes(self, v: &[u8; 64]) -> Floats4x4 {
        each!(vreinterpretq_f32_u8, self.load_b(v))
    }

    #[inline(always)]
    fn store(self, v: Floats4x4, to: &mut [f32; 16]) {
        for (part, v) in to.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
            unsafe { vst1q_f32(part.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn add(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        each!(vaddq_f32, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        each!(vsubq_f32, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        each!(vmulq_f32, a, b)
    }

    #[inline(always)]
    fn div(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        each!(vdivq_f32, a, b)
    }

    #[inline(always)]
    fn max(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        // The maximum instruction would give NaN for NaN and 0 for −0.
        let greater = each!(vcgtq_f32, a, b);
        each!(vbslq_f32, greater, a, b)
    }

    #[inline(always)]
    fn min(self, a: Floats4x4, b: Floats4x4) -> Floats4x4 {
        let less = each!(vcltq_f32, a, b);
        each!(vbslq_f32, less, a, b)
    }

    #[inline(always)]
    fn select_less(self, a: Floats4x4, b: Floats4x4, x: Floats4x4, y: Floats4x4) -> Floats4x4 {
        let less = each!(vcltq_f32, a, b);
        each!(vbslq_f32, less, x, y)
    }

    #[inline(always)]
    fn mul_add(self, a: Floats4x4, b: Floats4x4, c: Floats4x4) -> Floats4x4 {
        each!(vfmaq_f32, c, a, b)
    }

    #[inline(always)]
    fn round(self, a: Floats4x4) -> Floats4x4 {
        each!(vrndnq_f32, a)
    }

    #[inline(always)]
    fn cast_i(self, a: Floats4x4) -> Ints4x4 {
        each!(vreinterpretq_u32_f32, a)
    }

    #[inline(always)]
    fn cast_f(self, a: Ints4x4) -> Floats4x4 {
        each!(vreinterpretq_f32_u32, a)
    }

    #[inline(always)]
    fn to_f32(self, a: Ints4x4) -> Floats4x4 {
        let signed = each!(vreinterpretq_s32_u32, a);
        each!(vcvtq_f32_s32, signed)
    }

    #[inline(always)]
    fn to_i32(self, a: Floats4x4) -> Ints4x4 {
        let signed = each!(vcvtq_s32_f32, a);
        each!(vreinterpretq_u32_s32, signed)
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> Ints4x4 {
        values!([vdupq_n_u32(v); 4])
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> Ints4x4 {
        // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
        let bytes = unsafe { vld1q_u8(v.as_ptr()) };
        values!({
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ]
        })
    }

    #[inline(always)]
    fn widen_u16(self, v: &[u8; 32]) -> Ints4x4 {
        parts(
            v.as_chunks::<8>().0,
            #[inline(always)]
            |part: &[u8; 8]| {
                // SAFETY: 8 bytes are readable behind the reference; the load takes any alignment.
                let bytes = unsafe { vld1_u8(part.as_ptr()) };
                values!(vmovl_u16(vreinterpret_u16_u8(bytes)))
            },
        )
    }

    #[inline(always)]
    fn f16_to_f32(self, v: &[u8; 32]) -> Floats4x4 {
        parts(
            v.as_chunks::<8>().0,
            #[inline(always)]
            |part: &[u8; 8]| {
                // SAFETY: 8 bytes are readable behind the reference; the load takes any alignment.
                let bytes = unsafe { vld1_u8(part.as_ptr()) };
                values!(vcvt_f32_f16(vreinterpret_f16_u8(bytes)))
            },
        )
    }

    #[inline(always)]
    fn add_i(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        each!(vaddq_u32, a, b)
    }

    #[inline(always)]
    fn and(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        each!(vandq_u32, a, b)
    }

    #[inline(always)]
    fn or(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        each!(vorrq_u32, a, b)
    }

    #[inline(always)]
    fn xor(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        each!(veorq_u32, a, b)
    }

    #[inline(always)]
    fn shl(self, a: Ints4x4, by: u32) -> Ints4x4 {
        let by = values!([vdupq_n_s32(by.cast_signed()); 4]);
        each!(vshlq_u32, a, by)
    }

    #[inline(always)]
    fn shr_each(self, a: Ints4x4, by: Ints4x4) -> Ints4x4 {
        // A negative number of bits shifts to the right.
        let mut shifted = a;
        for i in 0..4 {
            shifted[i] = values!(vshlq_u32(a[i], vnegq_s32(vreinterpretq_s32_u32(by[i]))));
        }
        shifted
    }

    #[inline(always)]
    fn shr(self, a: Ints4x4, by: u32) -> Ints4x4 {
        // A negative count shifts to the right.
        let by = values!([vdupq_n_s32(-by.cast_signed()); 4]);
        each!(vshlq_u32, a, by)
    }

    #[inline(always)]
    fn gt_i(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        let (a, b) = (each!(vreinterpretq_s32_u32, a), each!(vreinterpretq_s32_u32, b));
        each!(vcgtq_s32, a, b)
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> Ints4x4 {
        const LANE_BITS: [[u32; 4]; 4] =
            [[1, 2, 4, 8], [16, 32, 64, 128], [256, 512, 1024, 2048], [4096, 8192, 16384, 32768]];
        let lane_bits = parts(
            &LANE_BITS,
            #[inline(always)]
            |part: &[u32; 4]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_u32(part.as_ptr()) }
            },
        );
        let hit = each!(vtstq_u32, self.splat_i(u32::from(bits)), lane_bits);
        self.and(hit, self.splat_i(v))
    }

    #[inline(always)]
    fn lookup(self, table: Floats4x4, index: Ints4x4) -> Floats4x4 {
        let [a, b, c, d] = each!(vreinterpretq_u8_f32, table);
        let table = uint8x16x4_t(a, b, c, d);
        parts(
            &self.and(index, self.splat_i(15)),
            #[inline(always)]
            |entry: &uint32x4_t| {
                values!({
                    // The four bytes of entry i are 4i to 4i + 3.
                    let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), *entry, 0x0404_0404);
                    vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
                })
            },
        )
    }

    #[inline(always)]
    fn deposit(self, bits: u64, mask: u64) -> u64 {
        // NEON has no such instruction: a table gives four positions at a time.
        let (mut out, mut bits) = (0, bits);
        for at in (0..64).step_by(4) {
            let mask = (mask >> at & 15) as usize;
            out |= u64::from(DEPOSITED[mask][(bits & 15) as usize]) << at;
            bits >>= mask.count_ones();
        }
        out
    }
}

/// `deposit` for four bits: by mask, then by bits.
const DEPOSITED: [[u8; 16]; 16] = {
    let mut table = [[0; 16]; 16];
    let mut i = 0;
    while i < 256 {
        let (mask, bits) = (i / 16, i % 16);
        let (mut from, mut at) = (0, 0);
        while at < 4 {
            if mask >> at & 1 != 0 {
                table[mask][bits] |= ((bits >> from & 1) << at) as u8;
                from += 1;
            }
            at += 1;
        }
        i += 1;
    }
    table
};
