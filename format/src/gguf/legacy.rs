//! The types with one scale per block of 32 to 128 weights, and the dense types.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::block::{GgufBlock, bits, f16, look_up, nibble_planes, pairs};

/// One f32.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct F32([u8; 4]);

/// One binary16 number.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct F16([u8; 2]);

/// One bfloat16 number.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Bf16([u8; 2]);

/// Signs, in blocks of 128.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q1_0 {
    scale: [u8; 2],
    codes: [u8; 16],
}

/// -1, 0, 1 or 2 times the scale, in blocks of 64.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q2_0 {
    scale: [u8; 2],
    codes: [u8; 16],
}

/// 4-bit integers around 0.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q4_0 {
    scale: [u8; 2],
    codes: [u8; 16],
}

/// 4-bit integers with an offset.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q4_1 {
    scale: [u8; 2],
    min: [u8; 2],
    codes: [u8; 16],
}

/// 5-bit integers around 0.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q5_0 {
    scale: [u8; 2],
    high: [u8; 4],
    codes: [u8; 16],
}

/// 5-bit integers with an offset.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q5_1 {
    scale: [u8; 2],
    min: [u8; 2],
    high: [u8; 4],
    codes: [u8; 16],
}

/// 8-bit integers.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q8_0 {
    scale: [u8; 2],
    codes: [i8; 32],
}

/// E2M1 numbers with a power of two as scale (OCP Microscaling Formats 1.0).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Mxfp4 {
    exponent: u8,
    codes: [u8; 16],
}

/// Twice the E2M1 numbers, so that they are integers.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl GgufBlock for F32 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out.fill(f32::from_le_bytes(self.0));
    }
}

impl GgufBlock for F16 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out.fill(f16(self.0));
    }
}

impl GgufBlock for Bf16 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out.fill(half::bf16::from_le_bytes(self.0).to_f32());
    }
}

impl GgufBlock for Q1_0 {
    const WEIGHTS: usize = 128;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for (o, is_positive) in out.iter_mut().zip(bits(&self.codes)) {
            *o = if is_positive { d } else { -d };
        }
    }
}

impl GgufBlock for Q2_0 {
    const WEIGHTS: usize = 64;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for (o, code) in out.iter_mut().zip(pairs(&self.codes)) {
            *o = (f32::from(code) - 1.0) * d;
        }
    }
}

impl GgufBlock for Q4_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        nibble_planes(&self.codes, out, |code| (f32::from(code) - 8.0) * d);
    }
}

impl GgufBlock for Q4_1 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let (d, m) = (f16(self.scale), f16(self.min));
        nibble_planes(&self.codes, out, |code| f32::from(code) * d + m);
    }
}

/// Writes 5-bit codes to `out`.
fn five_bits(codes: &[u8], high: &[u8], out: &mut [f32]) {
    nibble_planes(codes, out, f32::from);
    for (o, is_high) in out.iter_mut().zip(bits(high)) {
        *o += if is_high { 16.0 } else { 0.0 };
    }
}

impl GgufBlock for Q5_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        five_bits(&self.codes, &self.high, out);
        out.iter_mut().for_each(|o| *o = (*o - 16.0) * d);
    }
}

impl GgufBlock for Q5_1 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let (d, m) = (f16(self.scale), f16(self.min));
        five_bits(&self.codes, &self.high, out);
        out.iter_mut().for_each(|o| *o = *o * d + m);
    }
}

impl GgufBlock for Q8_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for (o, code) in out.iter_mut().zip(self.codes) {
            *o = f32::from(code) * d;
        }
    }
}

impl GgufBlock for Mxfp4 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        // Half of 2^(exponent - 127), because E2M1 has doubled values; the smallest two are subnormal.
        let d = f32::from_bits(match self.exponent {
            0 => 0x0020_0000,
            1 => 0x0040_0000,
            normal => u32::from(normal.wrapping_sub(1)) << 23,
        });
        nibble_planes(&self.codes, out, |code| f32::from(look_up(&E2M1, code.into())) * d);
    }
}
