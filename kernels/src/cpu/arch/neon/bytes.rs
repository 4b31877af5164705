//! The operations on bytes.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::bytes::{Bytes, Task};
use super::super::simd::Simd;
use super::super::windows::Windows;
use super::{Ints4x4, Neon, enter, enter_dot, parts};

/// Bytes as words.
#[inline(always)]
fn words(v: [uint8x16_t; 4]) -> Ints4x4 {
    each!(vreinterpretq_u32_u8, v)
}

/// A register for each lane of 16 bytes.
impl<const DOT: bool> Bytes for Neon<DOT> {
    type B = [uint8x16_t; 4];
    /// 16-bit sums of lanes 0 and 1, rows 0 to 7 and 8 to 15; then of lanes 2 and 3.
    type Acc = [int16x8_t; 4];
    type Small = Ints4x4;
    type H = [int16x8_t; 2];

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
    fn finish(self, acc: Self::Acc) -> Ints4x4 {
        let sums = values!([
            vaddl_s16(vget_low_s16(acc[0]), vget_low_s16(acc[2])),
            vaddl_high_s16(acc[0], acc[2]),
            vaddl_s16(vget_low_s16(acc[1]), vget_low_s16(acc[3])),
            vaddl_high_s16(acc[1], acc[3]),
        ]);
        each!(vreinterpretq_u32_s32, sums)
    }

    #[inline(always)]
    fn dot4(self, acc: Ints4x4, u: Self::B, v: Self::B) -> Ints4x4 {
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
    fn zero_small(self) -> Ints4x4 {
        self.splat_i(0)
    }

    /// Widening is part of the addition here.
    #[inline(always)]
    fn dot4_small(self, acc: Ints4x4, u: Self::B, v: Self::B) -> Ints4x4 {
        self.dot4(acc, u, v)
    }

    #[inline(always)]
    fn finish_small(self, acc: Ints4x4) -> Ints4x4 {
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
    fn widen_h(self, v: Self::H) -> Ints4x4 {
        let wide = values!([
            vmovl_s16(vget_low_s16(v[0])),
            vmovl_high_s16(v[0]),
            vmovl_s16(vget_low_s16(v[1])),
            vmovl_high_s16(v[1]),
        ]);
        each!(vreinterpretq_u32_s32, wide)
    }

    #[inline(always)]
    fn add_pairs(self, a: Ints4x4, b: Ints4x4) -> Ints4x4 {
        values!([
            vpaddq_u32(a[0], a[1]),
            vpaddq_u32(a[2], a[3]),
            vpaddq_u32(b[0], b[1]),
            vpaddq_u32(b[2], b[3]),
        ])
    }

    #[inline(always)]
    fn load_stream<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> Self::B {
        if BITS == 1 {
            return values!([vreinterpretq_u8_u64(vdupq_n_u64(u64::from_le_bytes(stream[0]))); 4]);
        }
        let bytes = stream.as_flattened();
        let [a, b, c, d] = Windows::<BITS>::STARTS.map(
            #[inline(always)]
            |at| {
                let part: &[u8; 16] = bytes[at..].first_chunk().expect("16 bytes of the stream");
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_u8(part.as_ptr()) }
            },
        );
        // A stream of 16 bytes is one lane.
        if BITS == 2 { [a, a, a, a] } else { [a, b, c, values!(vextq_u8::<1>(d, a))] }
    }

    #[inline(always)]
    fn high_products(self, a: Self::B, b: Self::B, factors: [Self::B; 2]) -> Self::B {
        let high = |v: uint8x16_t, factors: uint8x16_t| {
            values!(vreinterpretq_u8_u16(vmulq_u16(
                vreinterpretq_u16_u8(v),
                vreinterpretq_u16_u8(factors)
            )))
        };
        std::array::from_fn(
            #[inline(always)]
            // The second bytes of each pair.
            |i| values!(vtrn2q_u8(high(a[i], factors[0][i]), high(b[i], factors[1][i]))),
        )
    }

    #[inline(always)]
    fn load_lanes(self, v: [&[u8; 16]; 4]) -> Self::B {
        v.map(
            #[inline(always)]
            |v| {
                // SAFETY: 16 bytes are readable behind the reference; the load takes any alignment.
                unsafe { vld1q_u8(v.as_ptr()) }
            },
        )
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
    fn store_words(self, v: Ints4x4, to: &mut [u8; 64]) {
        for (part, v) in to.as_chunks_mut::<16>().0.iter_mut().zip(v) {
            // SAFETY: 16 bytes are writable behind the reference; the store takes any alignment, and
            // words are little-endian as on disk (the module is for such systems only).
            unsafe { vst1q_u32(part.as_mut_ptr().cast(), v) }
        }
    }

    #[inline(always)]
    fn load_i(self, v: &[i32; 16]) -> Ints4x4 {
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
    fn store_low_bytes(self, v: Ints4x4, to: &mut [i8; 16]) {
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
