//! The K-quants: blocks of 256 weights in groups of 16 or 32, whose scales are integers of 4 to 8 bits.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::block::{GgufBlock, bit_planes, f16, nibble_planes, pair_planes};

/// 2-bit integers; scale and offset of 4 bits per 16 weights.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q2K {
    groups: [u8; 16],
    codes: [[u8; 32]; 2],
    scale: [u8; 2],
    min: [u8; 2],
}

/// 3-bit integers around 0; scale of 6 bits per 16 weights.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q3K {
    high: [u8; 32],
    codes: [[u8; 32]; 2],
    /// The lower 4 bits of the scales.
    groups: [u8; 8],
    /// The upper 2 bits of the scales.
    groups_high: [u8; 4],
    scale: [u8; 2],
}

/// Scale and offset of 6 bits for each of 8 groups.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SixBits {
    /// The scales of groups 0 to 3; the upper 2 bits belong to the scales of groups 4 to 7.
    scales: [u8; 4],
    /// The offsets of groups 0 to 3; the upper 2 bits belong to the offsets of groups 4 to 7.
    mins: [u8; 4],
    /// The lower 4 bits of scales and offsets of groups 4 to 7.
    rest: [u8; 4],
}

/// 4-bit integers; scale and offset of 6 bits per 32 weights.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q4K {
    scale: [u8; 2],
    min: [u8; 2],
    groups: SixBits,
    codes: [[u8; 32]; 4],
}

/// 5-bit integers; scale and offset of 6 bits per 32 weights.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q5K {
    scale: [u8; 2],
    min: [u8; 2],
    groups: SixBits,
    high: [u8; 32],
    codes: [[u8; 32]; 4],
}

/// 6-bit integers around 0; scale of 8 bits per 16 weights.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Q6K {
    codes: [[u8; 64]; 2],
    high: [[u8; 32]; 2],
    groups: [i8; 16],
    scale: [u8; 2],
}

impl GgufBlock for Q2K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let (d, min) = (f16(self.scale), f16(self.min));
        let mut codes = self.codes.iter().flat_map(|codes| pair_planes(codes));
        for (group, out) in self.groups.iter().zip(out.chunks_mut(16)) {
            let (dl, ml) = (d * f32::from(group & 15), min * f32::from(group >> 4));
            for (o, code) in out.iter_mut().zip(&mut codes) {
                *o = dl * code - ml;
            }
        }
    }
}

impl GgufBlock for Q3K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        let low = self.codes.iter().flat_map(|codes| pair_planes(codes));
        let mut codes = low.zip(bit_planes(&self.high)).map(|(low, high)| low + 4.0 * high - 4.0);
        let mut groups = [0.0; 16];
        nibble_planes(&self.groups, &mut groups, f32::from);
        let groups = groups.into_iter().zip(pair_planes(&self.groups_high));
        for ((low, high), out) in groups.zip(out.chunks_mut(16)) {
            let dl = d * (low + 16.0 * high - 32.0);
            for (o, code) in out.iter_mut().zip(&mut codes) {
                *o = dl * code;
            }
        }
    }
}

impl SixBits {
    /// Scale and offset of each group.
    fn groups(&self) -> impl Iterator<Item = (f32, f32)> {
        let pairs = || self.scales.iter().zip(&self.mins);
        let first = pairs().map(|(scale, min)| (scale & 63, min & 63));
        let second = pairs().zip(&self.rest).map(|((scale, min), rest)| {
            ((rest & 15) | ((scale >> 6) << 4), (rest >> 4) | ((min >> 6) << 4))
        });
        first.chain(second).map(|(scale, min)| (f32::from(scale), f32::from(min)))
    }

    /// Turns the codes in `out` into weights.
    fn apply(&self, scale: [u8; 2], min: [u8; 2], out: &mut [f32]) {
        let (d, min) = (f16(scale), f16(min));
        for ((scale, offset), out) in self.groups().zip(out.chunks_mut(32)) {
            let (dl, ml) = (d * scale, min * offset);
            out.iter_mut().for_each(|o| *o = dl * *o - ml);
        }
    }
}

/// Writes the 4-bit codes of Q4_K and Q5_K to `out`.
fn four_bits(codes: &[[u8; 32]; 4], out: &mut [f32]) {
    for (codes, out) in codes.iter().zip(out.chunks_mut(64)) {
        nibble_planes(codes, out, f32::from);
    }
}

impl GgufBlock for Q4K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        four_bits(&self.codes, out);
        self.groups.apply(self.scale, self.min, out);
    }
}

impl GgufBlock for Q5K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        four_bits(&self.codes, out);
        for (o, high) in out.iter_mut().zip(bit_planes(&self.high)) {
            *o += 16.0 * high;
        }
        self.groups.apply(self.scale, self.min, out);
    }
}

impl GgufBlock for Q6K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for ((codes, high), out) in self.codes.iter().zip(&self.high).zip(out.chunks_mut(128)) {
            nibble_planes(codes, out, f32::from);
            for (o, high) in out.iter_mut().zip(pair_planes(high)) {
                *o += 16.0 * high - 32.0;
            }
        }
        for (group, out) in self.groups.into_iter().zip(out.chunks_mut(16)) {
            let dl = d * f32::from(group);
            out.iter_mut().for_each(|o| *o *= dl);
        }
    }
}
