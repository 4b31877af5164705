//! Portable implementation of the vector operations: arrays of 16 lanes.

use stb_format::half::f16;

use super::bytes::{Bytes, Task};
use super::simd::Simd;
use super::windows::Windows;

/// Runs everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// Applies `f` to each lane. A loop, because array adaptors are not inlined into the entry function of other
/// sets.
#[inline(always)]
fn map<A: Copy, B: Copy + Default>(a: [A; 16], f: impl Fn(A) -> B) -> [B; 16] {
    let mut out = [B::default(); 16];
    for i in 0..16 {
        out[i] = f(a[i]);
    }
    out
}

#[inline(always)]
fn zip<A: Copy, B: Copy, C: Copy + Default>(
    a: [A; 16],
    b: [B; 16],
    f: impl Fn(A, B) -> C,
) -> [C; 16] {
    let mut out = [C::default(); 16];
    for i in 0..16 {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Simd for Scalar {
    type F = [f32; 16];
    type I = [u32; 16];
    const GEMM_ROWS: usize = 4;
    const GEMM_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; 16]
    }

    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> Self::F {
        *v
    }

    #[inline(always)]
    fn load_bytes(self, v: &[u8; 64]) -> Self::F {
        let mut out = [0.0; 16];
        for (out, b) in out.iter_mut().zip(v.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*b);
        }
        out
    }

    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn select_less(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        map(a, f32::round_ties_even)
    }

    #[inline(always)]
    fn cast_i(self, a: Self::F) -> Self::I {
        map(a, f32::to_bits)
    }

    #[inline(always)]
    fn cast_f(self, a: Self::I) -> Self::F {
        map(a, f32::from_bits)
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        map(a, |v| v.cast_signed() as f32)
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        map(a, |v| (v as i32).cast_unsigned())
    }

    #[inline(always)]
    fn splat_i(self, v: u32) -> Self::I {
        [v; 16]
    }

    #[inline(always)]
    fn widen_u8(self, v: &[u8; 16]) -> Self::I {
        map(*v, u32::from)
    }

    #[inline(always)]
    fn widen_u16(self, v: &[u8; 32]) -> Self::I {
        let (pairs, _) = v.as_chunks::<2>();
        std::array::from_fn(|i| u32::from(u16::from_le_bytes(pairs[i])))
    }

    #[inline(always)]
    fn f16_to_f32(self, v: &[u8; 32]) -> Self::F {
        let (pairs, _) = v.as_chunks::<2>();
        std::array::from_fn(|i| f16::from_le_bytes(pairs[i]).to_f32())
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, u32::wrapping_add)
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }

    #[inline(always)]
    fn xor(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a ^ b)
    }

    #[inline(always)]
    fn shl(self, a: Self::I, by: u32) -> Self::I {
        map(a, |v| v << by)
    }

    #[inline(always)]
    fn shr_each(self, a: Self::I, by: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] >> by[i])
    }

    #[inline(always)]
    fn shr(self, a: Self::I, by: u32) -> Self::I {
        map(a, |v| v >> by)
    }

    #[inline(always)]
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| if a.cast_signed() > b.cast_signed() { u32::MAX } else { 0 })
    }

    #[inline(always)]
    fn select_bits(self, bits: u16, v: u32) -> Self::I {
        std::array::from_fn(|i| if bits >> i & 1 != 0 { v } else { 0 })
    }

    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F {
        map(index, |i| table[(i & 15) as usize])
    }

    #[inline(always)]
    fn deposit(self, bits: u64, mut mask: u64) -> u64 {
        let (mut out, mut from) = (0, 0);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if bits >> from & 1 != 0 {
                out |= lowest;
            }
            from += 1;
            mask ^= lowest;
        }
        out
    }
}

#[inline(always)]
fn zip_b(a: [u8; 64], b: [u8; 64], f: impl Fn(u8, u8) -> u8) -> [u8; 64] {
    let mut out = [0; 64];
    for i in 0..64 {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Bytes for Scalar {
    type B = [u8; 64];
    type Acc = [u32; 16];
    type Small = [u32; 16];
    type H = [i16; 16];

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        task.run(self)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn load_b(self, v: &[u8; 64]) -> Self::B {
        *v
    }

    #[inline(always)]
    fn store_b(self, v: Self::B, to: &mut [u8; 64]) {
        *to = v;
    }

    #[inline(always)]
    fn splat_b(self, v: u8) -> Self::B {
        [v; 64]
    }

    #[inline(always)]
    fn splat_word(self, v: [u8; 4]) -> Self::B {
        std::array::from_fn(|i| v[i % 4])
    }

    #[inline(always)]
    fn and_b(self, a: Self::B, b: Self::B) -> Self::B {
        zip_b(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn or_b(self, a: Self::B, b: Self::B) -> Self::B {
        zip_b(a, b, |a, b| a | b)
    }

    #[inline(always)]
    fn xor_b(self, a: Self::B, b: Self::B) -> Self::B {
        zip_b(a, b, |a, b| a ^ b)
    }

    #[inline(always)]
    fn add_b(self, a: Self::B, b: Self::B) -> Self::B {
        zip_b(a, b, u8::wrapping_add)
    }

    #[inline(always)]
    fn sub_b(self, a: Self::B, b: Self::B) -> Self::B {
        zip_b(a, b, u8::wrapping_sub)
    }

    #[inline(always)]
    fn shr_b<const K: u32>(self, a: Self::B) -> Self::B {
        zip_b(a, a, |a, _| a >> K)
    }

    #[inline(always)]
    fn shl_b<const K: u32>(self, a: Self::B) -> Self::B {
        zip_b(a, a, |a, _| a << K)
    }

    #[inline(always)]
    fn lookup_b(self, table: Self::B, index: Self::B) -> Self::B {
        let mut out = [0; 64];
        for i in 0..64 {
            if index[i] < 128 {
                out[i] = table[i / 16 * 16 + usize::from(index[i] & 15)];
            }
        }
        out
    }

    #[inline(always)]
    fn load_stream<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> Self::B {
        let bytes = stream.as_flattened();
        std::array::from_fn(|i| {
            let skipped = usize::from(i / 16 == 3 && bytes.len() > 16);
            bytes[(Windows::<BITS>::STARTS[i / 16] + skipped + i % 16) % bytes.len()]
        })
    }

    #[inline(always)]
    fn high_products(self, first: Self::B, second: Self::B, factors: [Self::B; 2]) -> Self::B {
        let word = |v: &Self::B, i: usize| u16::from_le_bytes([v[i / 2 * 2], v[i / 2 * 2 + 1]]);
        std::array::from_fn(|i| {
            let (v, factors) =
                if i % 2 == 0 { (&first, &factors[0]) } else { (&second, &factors[1]) };
            word(v, i).wrapping_mul(word(factors, i)).to_le_bytes()[1]
        })
    }

    #[inline(always)]
    fn transpose(self, words: &[u64; 16]) -> [Self::B; 2] {
        [0, 1].map(|q| std::array::from_fn(|i| words[i % 16].to_le_bytes()[4 * q + i / 16]))
    }

    #[inline(always)]
    fn zero_acc(self) -> Self::Acc {
        [0; 16]
    }

    #[inline(always)]
    fn dot2(self, mut acc: Self::Acc, a: Self::B, b: Self::B) -> Self::Acc {
        for i in 0..64 {
            let sum = i32::from(a[i].cast_signed()) + i32::from(b[i].cast_signed());
            acc[i % 16] = acc[i % 16].wrapping_add_signed(sum);
        }
        acc
    }

    #[inline(always)]
    fn finish(self, acc: Self::Acc) -> Self::I {
        acc
    }

    #[inline(always)]
    fn dot4(self, mut acc: Self::I, u: Self::B, v: Self::B) -> Self::I {
        for i in 0..64 {
            let product = i32::from(u[i]) * i32::from(v[i].cast_signed());
            acc[i / 4] = acc[i / 4].wrapping_add_signed(product);
        }
        acc
    }

    #[inline(always)]
    fn zero_small(self) -> Self::Small {
        [0; 16]
    }

    #[inline(always)]
    fn dot4_small(self, acc: Self::Small, u: Self::B, v: Self::B) -> Self::Small {
        self.dot4(acc, u, v)
    }

    #[inline(always)]
    fn finish_small(self, acc: Self::Small) -> Self::I {
        acc
    }

    #[inline(always)]
    fn load_h(self, v: &[i16; 16]) -> Self::H {
        *v
    }

    #[inline(always)]
    fn store_h(self, v: Self::H, to: &mut [i16; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn add_h(self, mut a: Self::H, b: Self::H) -> Self::H {
        for i in 0..16 {
            a[i] = a[i].wrapping_add(b[i]);
        }
        a
    }

    #[inline(always)]
    fn sub_h(self, mut a: Self::H, b: Self::H) -> Self::H {
        for i in 0..16 {
            a[i] = a[i].wrapping_sub(b[i]);
        }
        a
    }

    #[inline(always)]
    fn widen_h(self, v: Self::H) -> Self::I {
        let mut wide = [0; 16];
        for i in 0..16 {
            wide[i] = i32::from(v[i]).cast_unsigned();
        }
        wide
    }

    #[inline(always)]
    fn add_pairs(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| {
            let from = if i < 8 { &a } else { &b };
            from[i % 8 * 2].wrapping_add(from[i % 8 * 2 + 1])
        })
    }

    #[inline(always)]
    fn load_lanes(self, v: [&[u8; 16]; 4]) -> Self::B {
        std::array::from_fn(|i| v[i / 16][i % 16])
    }

    #[inline(always)]
    fn transpose_words(self, v: [Self::B; 4]) -> [Self::B; 4] {
        std::array::from_fn(|w| {
            std::array::from_fn(|i| {
                let (lane, from, byte) = (i / 16, i / 4 % 4, i % 4);
                v[from][16 * lane + 4 * w + byte]
            })
        })
    }

    #[inline(always)]
    fn store_words(self, v: Self::I, to: &mut [u8; 64]) {
        for (to, v) in to.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            *to = v.to_le_bytes();
        }
    }

    #[inline(always)]
    fn load_i(self, v: &[i32; 16]) -> Self::I {
        let mut out = [0; 16];
        for i in 0..16 {
            out[i] = v[i].cast_unsigned();
        }
        out
    }

    #[inline(always)]
    fn store_low_bytes(self, v: Self::I, to: &mut [i8; 16]) {
        for i in 0..16 {
            to[i] = v[i] as i8;
        }
    }
}
