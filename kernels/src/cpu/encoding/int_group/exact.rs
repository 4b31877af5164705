//! Exact weights of integer groups, in vectors.

use std::ops::Range;

use stb_format::encoding::IntGroupView;
use stb_format::encoding::int_group::UNIT;
use stb_format::half::f16;

use super::super::row_major::{RowMajor, STEP, bytes};
use crate::cpu::arch::simd::Simd;

impl RowMajor for IntGroupView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let (planes, scales) = (self.row_planes(row), self.row_scales(row));
        let group = self.spec.group();
        // Odd codes (1 to 3 bits) are twice the stored number plus the lowest code.
        let step = s.splat(if self.spec.is_odd() { 2.0 } else { 1.0 });
        let lowest = s.splat(f32::from(self.spec.limits().0));
        for col in cols.step_by(STEP) {
            let mut w = [s.splat(0.0); 4];
            for half in 0..2 {
                let at = col + UNIT * half;
                let scale = scales.get(at / group).map_or(0.0, |b| f16::from_le_bytes(*b).to_f32());
                let scale = s.splat(scale);
                let numbers = numbers(s, self.spec.bits(), planes, at);
                for (k, number) in numbers.into_iter().enumerate() {
                    let code = s.mul_add(s.to_f32(number), step, lowest);
                    w[2 * half + k] = s.mul(code, scale);
                }
            }
            sink(col, w);
        }
    }
}

/// The stored numbers of the unit of 32 columns from `at`: codes minus the lowest code; half of that for odd
/// codes.
#[inline(always)]
fn numbers<S: Simd>(s: S, bits: u8, planes: [&[u8]; 2], at: usize) -> [S::I; 2] {
    let unit = at / UNIT;
    let line = match bits {
        1 => single_bits(planes[0], unit),
        2 => pairs_of_bits(planes[0], unit),
        3 => {
            let mut line = pairs_of_bits(planes[0], unit);
            let upper = single_bits(planes[1], unit);
            for k in 0..UNIT {
                line[k] |= upper[k] << 2;
            }
            line
        }
        4 => {
            let packed = s.widen_u8(bytes(planes[0], unit * 16, &mut [0; 16]));
            return [s.and(packed, s.splat_i(15)), s.shr(packed, 4)];
        }
        _ => {
            // A signed byte plus 128 is the unsigned byte with the top bit flipped.
            let flip = s.splat_i(128);
            return [0, 16].map(
                #[inline(always)]
                |k| s.xor(s.widen_u8(bytes(planes[0], at + k, &mut [0; 16])), flip),
            );
        }
    };
    let (halves, _) = line.as_chunks::<16>();
    [s.widen_u8(&halves[0]), s.widen_u8(&halves[1])]
}

/// The numbers of a unit in a plane of 1 bit, in the order of columns.
#[inline(always)]
fn single_bits(plane: &[u8], unit: usize) -> [u8; UNIT] {
    let word = u32::from_le_bytes(*bytes(plane, unit * 4, &mut [0; 4]));
    let mut line = [0; UNIT];
    for (field, to) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *to = (word >> field & 0x0101_0101).to_le_bytes();
    }
    line
}

/// The numbers of a unit in a plane of 2 bits, in the order of columns.
#[inline(always)]
fn pairs_of_bits(plane: &[u8], unit: usize) -> [u8; UNIT] {
    let word = u64::from_le_bytes(*bytes(plane, unit * 8, &mut [0; 8]));
    let mut line = [0; UNIT];
    for (field, to) in line.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *to = (word >> (2 * field) & 0x0303_0303_0303_0303).to_le_bytes();
    }
    line
}
