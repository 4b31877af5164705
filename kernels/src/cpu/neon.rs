//! NEON: four 128-bit registers hold the 16 lanes. Half-precision conversion, fused multiply-add
//! and look-ups in 16 and 64 bytes belong to the base of the architecture; the products of bytes
//! (`dotprod`) do not.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "intrinsics on values share one precondition, see `values!`"
)]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::Simd;
use super::bytes::Bytes;
use crate::isa::Task;

/// Exists only on machines with NEON; with `DOT`, also with its dot products of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Neon<const DOT: bool>(());

/// Lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15.
type F = [float32x4_t; 4];
type I = [uint32x4_t; 4];

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

/// Bytes as words.
#[inline(always)]
fn words(v: [uint8x16_t; 4]) -> I {
    each!(vreinterpretq_u32_u8, v)
}

/// Four registers from the four parts of some memory.
#[inline(always)]
fn parts<A, B>(parts: &[A], f: impl Fn(&A) -> B) -> [B; 4] {
    [f(&parts[0]), f(&parts[1]), f(&parts[2]), f(&parts[3])]
}

impl<const DOT: bool> Simd for Neon<DOT> {
    type F = F;
    type I = I;
    const GEMM_ROWS: usize = 4;
    const GEMM_VECTORS: usize = 1;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        if DOT {
            // SAFETY: a value with `DOT` proves that the CPU has every feature of the function.
            unsafe { enter_dot(Neon(()), task) }
        } else {
            // SAFETY: `self` proves that the CPU has every feature the function is compiled for.
            unsafe { enter(Neon(()), task) }
        }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> F {
        values!([vdupq_n_f32(v); 4])
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> F {
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
    fn load_bytes(self, v: &[u8; 64]) -> F {
        each!(vreinterpretq_f32_u8, self.load_b(v))
    }

    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; 16]) {
        for (part, v) in to.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
            unsafe { vst1q_f32(part.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(vaddq_f32, a, b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(vsubq_f32, a, b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(vmulq_f32, a, b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(vdivq_f32, a, b)
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // Not the instruction for the maximum: it gives NaN for NaN and 0 for −0.
        let greater = each!(vcgtq_f32, a, b);
        each!(vbslq_f32, greater, a, b)
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        let less = each!(vcltq_f32, a, b);
        each!(vbslq_f32, less, a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        each!(vfmaq_f32, c, a, b)
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        each!(vrndnq_f32, a)
    }

    #[inline(always)]
    fn cast_i(self, a: F) -> I {
        each!(vreinterpretq_u32_f32, a)
    }

    #[inline(always)]
    fn cast_f(self, a: I) -> F {
        each!(vreinterpretq_f32_u32, a)
    }

    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        let signed = each!(vreinterpretq_s32_u32, a);
        each!(vcvtq_f32_s32, signed)
    }

    #[inline(always)]
    fn to_i32(self, a: F) -> I {
        let signed = each!(vcvtq_s32_f32, a);
        each!(vreinterpretq_u32_s32, signed)
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> I {
        values!([vdupq_n_u32(v); 4])
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> I {
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
    fn widen_u16(self, v: &[u8; 32]) -> I {
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
    fn f16_to_f32(self, v: &[u8; 32]) -> F {
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
    fn add_i(self, a: I, b: I) -> I {
        each!(vaddq_u32, a, b)
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        each!(vandq_u32, a, b)
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        each!(vorrq_u32, a, b)
    }

    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        each!(veorq_u32, a, b)
    }

    #[inline(always)]
    fn shl(self, a: I, by: u32) -> I {
        let by = values!([vdupq_n_s32(by.cast_signed()); 4]);
        each!(vshlq_u32, a, by)
    }

    #[inline(always)]
    fn shr(self, a: I, by: u32) -> I {
        // A negative count shifts to the right.
        let by = values!([vdupq_n_s32(-by.cast_signed()); 4]);
        each!(vshlq_u32, a, by)
    }

    #[inline(always)]
    fn gt_i(self, a: I, b: I) -> I {
        let (a, b) = (each!(vreinterpretq_s32_u32, a), each!(vreinterpretq_s32_u32, b));
        each!(vcgtq_s32, a, b)
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> I {
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
    fn lookup(self, table: F, index: I) -> F {
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
        // There is no such instruction: four positions at a time from a table.
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

/// A register for each lane of 16 bytes.
impl<const DOT: bool> Bytes for Neon<DOT> {
    type B = [uint8x16_t; 4];
    /// 16-bit sums of lanes 0 and 1, rows 0 to 7 and 8 to 15; then of lanes 2 and 3.
    type Acc = [int16x8_t; 4];
    type Small = I;
    type H = [int16x8_t; 2];

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint without effect on memory or registers; the instruction never faults.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    fn load_b(self, v: &[u8; 64]) -> Self::B {
        parts(
            v.as_chunks::<16>().0,
            #[inline(always)]
            |part: &[u8; 16]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_u8(part.as_ptr()) }
            },
        )
    }

    #[inline(always)]
    fn store_b(self, v: Self::B, to: &mut [u8; 64]) {
        for (part, v) in to.as_chunks_mut::<16>().0.iter_mut().zip(v) {
            // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
            unsafe { vst1q_u8(part.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn splat_b(self, v: u8) -> Self::B {
        values!([vdupq_n_u8(v); 4])
    }

    #[inline(always)]
    fn splat_word(self, v: [u8; 4]) -> Self::B {
        values!([vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(v))); 4])
    }

    #[inline(always)]
    fn and_b(self, a: Self::B, b: Self::B) -> Self::B {
        each!(vandq_u8, a, b)
    }

    #[inline(always)]
    fn or_b(self, a: Self::B, b: Self::B) -> Self::B {
        each!(vorrq_u8, a, b)
    }

    #[inline(always)]
    fn xor_b(self, a: Self::B, b: Self::B) -> Self::B {
        each!(veorq_u8, a, b)
    }

    #[inline(always)]
    fn add_b(self, a: Self::B, b: Self::B) -> Self::B {
        each!(vaddq_u8, a, b)
    }

    #[inline(always)]
    fn sub_b(self, a: Self::B, b: Self::B) -> Self::B {
        each!(vsubq_u8, a, b)
    }

    #[inline(always)]
    fn shr_b<const K: u32>(self, a: Self::B) -> Self::B {
        // A negative count shifts to the right.
        let by = values!([vdupq_n_s8(-(K as i8)); 4]);
        each!(vshlq_u8, a, by)
    }

    #[inline(always)]
    fn shl_b<const K: u32>(self, a: Self::B) -> Self::B {
        let by = values!([vdupq_n_s8(K as i8); 4]);
        each!(vshlq_u8, a, by)
    }

    #[inline(always)]
    fn lookup_b(self, table: Self::B, index: Self::B) -> Self::B {
        // Zero for every index above 15, as those with the top bit set are.
        each!(vqtbl1q_u8, table, index)
    }

    #[inline(always)]
    fn transpose(self, words: &[u64; 16]) -> [Self::B; 2] {
        let (rows, _) = words.as_chunks::<8>();
        // Bytes k and k + 4 of each of eight words, alternately.
        // SAFETY: 64 bytes are readable behind the reference; the load takes any alignment, and words
        // are little-endian (the module is for such systems only).
        let uint8x16x4_t(a, b, c, d) = unsafe { vld4q_u8(rows[0].as_ptr().cast()) };
        // SAFETY: as above.
        let uint8x16x4_t(e, f, g, h) = unsafe { vld4q_u8(rows[1].as_ptr().cast()) };
        values!([
            [vuzp1q_u8(a, e), vuzp1q_u8(b, f), vuzp1q_u8(c, g), vuzp1q_u8(d, h)],
            [vuzp2q_u8(a, e), vuzp2q_u8(b, f), vuzp2q_u8(c, g), vuzp2q_u8(d, h)],
        ])
    }

    #[inline(always)]
    fn zero_acc(self) -> Self::Acc {
        values!([vdupq_n_s16(0); 4])
    }

    #[inline(always)]
    fn dot2(self, acc: Self::Acc, a: Self::B, b: Self::B) -> Self::Acc {
        let (a, b) = (each!(vreinterpretq_s8_u8, a), each!(vreinterpretq_s8_u8, b));
        // a + b of each lane in 16 bits, rows 0 to 7 and 8 to 15.
        let (a_low, b_low) = (each!(vget_low_s8, a), each!(vget_low_s8, b));
        let low = each!(vaddl_s8, a_low, b_low);
        let high = each!(vaddl_high_s8, a, b);
        // Two lanes add up to ±508, so 64 steps fit 16 bits.
        values!([
            vaddq_s16(acc[0], vaddq_s16(low[0], low[1])),
            vaddq_s16(acc[1], vaddq_s16(high[0], high[1])),
            vaddq_s16(acc[2], vaddq_s16(low[2], low[3])),
            vaddq_s16(acc[3], vaddq_s16(high[2], high[3])),
        ])
    }

    #[inline(always)]
    fn finish(self, acc: Self::Acc) -> I {
        let sums = values!([
            vaddl_s16(vget_low_s16(acc[0]), vget_low_s16(acc[2])),
            vaddl_high_s16(acc[0], acc[2]),
            vaddl_s16(vget_low_s16(acc[1]), vget_low_s16(acc[3])),
            vaddl_high_s16(acc[1], acc[3]),
        ]);
        each!(vreinterpretq_u32_s32, sums)
    }

    #[inline(always)]
    fn dot4(self, acc: I, u: Self::B, v: Self::B) -> I {
        // u is below 128, so it is the same as a signed number.
        let (u, v) = (each!(vreinterpretq_s8_u8, u), each!(vreinterpretq_s8_u8, v));
        let mut acc = each!(vreinterpretq_s32_u32, acc);
        for k in 0..4 {
            acc[k] = if DOT {
                // SAFETY: a value with `DOT` proves that the CPU has the instruction, and the method
                // is inlined into a function compiled for it; registers in, a register out.
                unsafe { sdot(acc[k], u[k], v[k]) }
            } else {
                values!({
                    let low = vmull_s8(vget_low_s8(u[k]), vget_low_s8(v[k]));
                    let high = vmull_high_s8(u[k], v[k]);
                    // Two products add up to ±2 · 127 · 128 = ±32512, which fits 16 bits.
                    vpadalq_s16(acc[k], vpaddq_s16(low, high))
                })
            };
        }
        each!(vreinterpretq_u32_s32, acc)
    }

    #[inline(always)]
    fn zero_small(self) -> I {
        self.splat_i(0)
    }

    /// Widening is part of the addition here.
    #[inline(always)]
    fn dot4_small(self, acc: I, u: Self::B, v: Self::B) -> I {
        self.dot4(acc, u, v)
    }

    #[inline(always)]
    fn finish_small(self, acc: I) -> I {
        acc
    }

    #[inline(always)]
    fn load_h(self, v: &[i16; 16]) -> Self::H {
        let (low, high) = v.split_at(8);
        // SAFETY: 16 bytes are readable behind each half; the load takes any alignment.
        unsafe { [vld1q_s16(low.as_ptr()), vld1q_s16(high.as_ptr())] }
    }

    #[inline(always)]
    fn store_h(self, v: Self::H, to: &mut [i16; 16]) {
        let (low, high) = to.split_at_mut(8);
        // SAFETY: 16 bytes are writable behind each half; the store takes any alignment.
        unsafe {
            vst1q_s16(low.as_mut_ptr(), v[0]);
            vst1q_s16(high.as_mut_ptr(), v[1]);
        }
    }

    #[inline(always)]
    fn add_h(self, a: Self::H, b: Self::H) -> Self::H {
        values!([vaddq_s16(a[0], b[0]), vaddq_s16(a[1], b[1])])
    }

    #[inline(always)]
    fn sub_h(self, a: Self::H, b: Self::H) -> Self::H {
        values!([vsubq_s16(a[0], b[0]), vsubq_s16(a[1], b[1])])
    }

    #[inline(always)]
    fn widen_h(self, v: Self::H) -> I {
        let wide = values!([
            vmovl_s16(vget_low_s16(v[0])),
            vmovl_high_s16(v[0]),
            vmovl_s16(vget_low_s16(v[1])),
            vmovl_high_s16(v[1]),
        ]);
        each!(vreinterpretq_u32_s32, wide)
    }

    #[inline(always)]
    fn transpose_words(self, v: [Self::B; 4]) -> [Self::B; 4] {
        let [a, b, c, d] = [words(v[0]), words(v[1]), words(v[2]), words(v[3])];
        // Words 0 and 2, 1 and 3 of two vectors, then of all four.
        let (ab, ab_odd) = (each!(vtrn1q_u32, a, b), each!(vtrn2q_u32, a, b));
        let (cd, cd_odd) = (each!(vtrn1q_u32, c, d), each!(vtrn2q_u32, c, d));
        let [ab, ab_odd] = [each!(vreinterpretq_u64_u32, ab), each!(vreinterpretq_u64_u32, ab_odd)];
        let [cd, cd_odd] = [each!(vreinterpretq_u64_u32, cd), each!(vreinterpretq_u64_u32, cd_odd)];
        [
            each!(vreinterpretq_u8_u64, each!(vtrn1q_u64, ab, cd)),
            each!(vreinterpretq_u8_u64, each!(vtrn1q_u64, ab_odd, cd_odd)),
            each!(vreinterpretq_u8_u64, each!(vtrn2q_u64, ab, cd)),
            each!(vreinterpretq_u8_u64, each!(vtrn2q_u64, ab_odd, cd_odd)),
        ]
    }

    #[inline(always)]
    fn store_words(self, v: I, to: &mut [u8; 64]) {
        for (part, v) in to.as_chunks_mut::<16>().0.iter_mut().zip(v) {
            // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment, and
            // words are little-endian as on disk (the module is for such systems only).
            unsafe { vst1q_u32(part.as_mut_ptr().cast(), v) }
        }
    }

    #[inline(always)]
    fn load_i(self, v: &[i32; 16]) -> I {
        parts(
            v.as_chunks::<4>().0,
            #[inline(always)]
            |part: &[i32; 4]| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_u32(part.as_ptr().cast()) }
            },
        )
    }

    #[inline(always)]
    fn store_low_bytes(self, v: I, to: &mut [i8; 16]) {
        let packed = values!({
            let low = vcombine_u16(vmovn_u32(v[0]), vmovn_u32(v[1]));
            let high = vcombine_u16(vmovn_u32(v[2]), vmovn_u32(v[3]));
            vcombine_u8(vmovn_u16(low), vmovn_u16(high))
        });
        // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment.
        unsafe { vst1q_u8(to.as_mut_ptr().cast(), packed) }
    }
}

/// `acc[i] += Σ_k u[4i + k] · v[4i + k]`. As assembly: the intrinsic is not in stable Rust.
///
/// # Safety
/// The CPU must have `dotprod`, and the caller must be compiled for it.
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, u: int8x16_t, v: int8x16_t) -> int32x4_t {
    // SAFETY: the caller vouches for the instruction; it touches no memory and no flags.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {u:v}.16b, {v:v}.16b",
            acc = inout(vreg) acc, u = in(vreg) u, v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
