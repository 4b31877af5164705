//! The ternary types: blocks of 256 weights, each -1, 0 or 1 times the scale.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::block::{GgufBlock, f16, pair_planes};

/// Five weights per byte, as digits of base 3.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Tq1_0 {
    /// Weights 0 to 159.
    first: [u8; 32],
    /// Weights 160 to 239.
    second: [u8; 16],
    /// The last 16 weights, four per byte.
    last: [u8; 4],
    scale: [u8; 2],
}

/// Four weights per byte.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Tq2_0 {
    codes: [[u8; 32]; 2],
    scale: [u8; 2],
}

/// The first digit of all bytes, then the second digit of all bytes, up to `digits` of at most 5.
fn digit_planes(bytes: &[u8], digits: usize) -> impl Iterator<Item = f32> {
    // A byte is a fraction of 256. Multiplied by a power of 3 it loses the digits before; three times the
    // rest has the next digit above the point.
    [1, 3, 9, 27, 81].into_iter().take(digits).flat_map(move |power| {
        bytes.iter().map(move |byte| {
            let rest = u16::from(byte.wrapping_mul(power));
            f32::from(rest.wrapping_mul(3) >> 8)
        })
    })
}

impl GgufBlock for Tq1_0 {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        let codes = digit_planes(&self.first, 5)
            .chain(digit_planes(&self.second, 5))
            .chain(digit_planes(&self.last, 4));
        for (o, code) in out.iter_mut().zip(codes) {
            *o = (code - 1.0) * d;
        }
    }
}

impl GgufBlock for Tq2_0 {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        let codes = self.codes.iter().flat_map(|codes| pair_planes(codes));
        for (o, code) in out.iter_mut().zip(codes) {
            *o = (code - 1.0) * d;
        }
    }
}
