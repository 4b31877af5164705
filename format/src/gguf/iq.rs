//! The IQ types: groups of 4 or 8 weights are entries of a grid, with signs apart; or each weight is one of
//! 16 values of a table.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::block::{GgufBlock, bits, f16, look_up, nibble_planes, nibbles, pairs};
use super::grid_iq1::IQ1;
use super::grid_iq2::{IQ2_S, IQ2_XS, IQ2_XXS};
use super::grid_iq3::{IQ3_S, IQ3_XXS, IQ3_XXS_LEVELS};

/// The magnitudes of the IQ2 types.
const IQ2_LEVELS: [u8; 3] = [8, 25, 43];
/// The values of IQ4_NL and IQ4_XS.
const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// The shift of the values of IQ1_S and IQ1_M.
const IQ1_DELTA: f32 = 0.125;

/// 2.0625 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq2Xxs {
    scale: [u8; 2],
    /// Per 32 weights: 4 entries of the grid, and 32 bits with 4 × 7 signs and the scale.
    groups: [[[u8; 4]; 2]; 8],
}

/// 2.3125 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq2Xs {
    scale: [u8; 2],
    /// Entry of the grid (9 bits) and signs (7 bits).
    entries: [[[u8; 2]; 4]; 8],
    scales: [u8; 8],
}

/// 2.5625 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq2S {
    scale: [u8; 2],
    entries: [[u8; 4]; 8],
    signs: [[u8; 4]; 8],
    entries_high: [u8; 8],
    scales: [u8; 8],
}

/// 3.0625 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq3Xxs {
    scale: [u8; 2],
    entries: [[[u8; 2]; 4]; 8],
    /// Per 32 weights: 4 × 7 signs and the scale.
    signs: [[u8; 4]; 8],
}

/// 3.4375 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq3S {
    scale: [u8; 2],
    entries: [[u8; 8]; 8],
    entries_high: [u8; 8],
    signs: [[u8; 4]; 8],
    scales: [u8; 4],
}

/// 1.5625 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq1S {
    scale: [u8; 2],
    entries: [[u8; 4]; 8],
    /// Per 32 weights: 4 × 3 upper bits of the entries, the scale and the sign of the shift.
    high: [[u8; 2]; 8],
}

/// 1.75 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq1M {
    entries: [[u8; 4]; 8],
    /// Per 8 weights: 3 upper bits of the entry and the sign of the shift.
    high: [[u8; 2]; 8],
    /// Four scales of 3 bits each; the upper 4 bits are a quarter of the scale of the block.
    scales: [[u8; 2]; 4],
}

/// 4.5 bits per weight, in blocks of 32.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq4Nl {
    scale: [u8; 2],
    codes: [u8; 16],
}

/// 4.25 bits per weight.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Iq4Xs {
    scale: [u8; 2],
    scales_high: [u8; 2],
    scales: [u8; 4],
    codes: [[u8; 16]; 8],
}

/// The signs of 8 weights from 7 stored ones: the number of negative weights is even.
fn eight_signs(seven: u8) -> u8 {
    if seven.count_ones().is_multiple_of(2) { seven } else { seven | 128 }
}

/// The four groups of 7 signs in the lower 28 bits.
fn four_signs(word: u32) -> [u8; 4] {
    [0, 7, 14, 21].map(|shift| {
        let [byte, ..] = word.wrapping_shr(shift).to_le_bytes();
        eight_signs(byte & 127)
    })
}

/// The scale in the upper 4 bits of a word.
fn upper_scale(word: u32) -> f32 {
    let [.., byte] = word.to_le_bytes();
    f32::from(byte >> 4)
}

/// Writes the weights of magnitude `levels` × `scale` to `out`; a set bit of `signs` is a negative weight.
fn write_signed(out: &mut [f32], scale: f32, levels: impl Iterator<Item = u8>, signs: u8) {
    for ((o, level), is_negative) in out.iter_mut().zip(levels).zip(bits(&[signs])) {
        *o = scale * f32::from(level) * if is_negative { -1.0 } else { 1.0 };
    }
}

/// The 8 magnitudes of an entry of an IQ2 grid.
fn iq2_levels(entry: u16) -> impl Iterator<Item = u8> {
    let [low, high] = entry.to_le_bytes();
    let codes = [low, low >> 2, low >> 4, low >> 6, high, high >> 2, high >> 4, high >> 6];
    codes.into_iter().map(|code| look_up(&IQ2_LEVELS, usize::from(code & 3)))
}

/// The 4 codes of an entry of an IQ3 grid.
fn iq3_codes(entry: u16) -> [u8; 4] {
    [0, 3, 6, 9].map(|shift| {
        let [byte, _] = entry.wrapping_shr(shift).to_le_bytes();
        byte & 7
    })
}

/// The index of a grid entry from its lower 8 bits and the bits above.
fn index(low: u8, high: u8) -> usize {
    usize::from(u16::from_le_bytes([low, high]))
}

impl GgufBlock for Iq2Xxs {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for ([entries, word], out) in self.groups.iter().zip(out.chunks_mut(32)) {
            let word = u32::from_le_bytes(*word);
            let scale = d * (0.5 + upper_scale(word)) * 0.25;
            for ((entry, signs), out) in entries.iter().zip(four_signs(word)).zip(out.chunks_mut(8))
            {
                let entry = look_up(&IQ2_XXS, usize::from(*entry));
                write_signed(out, scale, iq2_levels(entry), signs);
            }
        }
    }
}

impl GgufBlock for Iq2Xs {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        // A scale for 16 weights: two entries.
        let scales = nibbles(&self.scales).map(|scale| d * (0.5 + f32::from(scale)) * 0.25);
        let scales = scales.flat_map(|scale| [scale, scale]);
        let entries = self.entries.as_flattened().iter();
        for ((bytes, scale), out) in entries.zip(scales).zip(out.chunks_mut(8)) {
            let [low, high] = *bytes;
            let entry = look_up(&IQ2_XS, index(low, high & 1));
            write_signed(out, scale, iq2_levels(entry), eight_signs(high >> 1));
        }
    }
}

impl GgufBlock for Iq2S {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        let scales = nibbles(&self.scales).map(|scale| d * (0.5 + f32::from(scale)) * 0.25);
        let scales = scales.flat_map(|scale| [scale, scale]);
        let entries = self.entries.as_flattened().iter().zip(pairs(&self.entries_high));
        let signs = self.signs.as_flattened();
        for ((((low, high), signs), scale), out) in
            entries.zip(signs).zip(scales).zip(out.chunks_mut(8))
        {
            let entry = look_up(&IQ2_S, index(*low, high));
            write_signed(out, scale, iq2_levels(entry), *signs);
        }
    }
}

impl GgufBlock for Iq3Xxs {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for ((entries, word), out) in self.entries.iter().zip(&self.signs).zip(out.chunks_mut(32)) {
            let word = u32::from_le_bytes(*word);
            let scale = d * (0.5 + upper_scale(word)) * 0.5;
            for ((entries, signs), out) in
                entries.iter().zip(four_signs(word)).zip(out.chunks_mut(8))
            {
                let codes =
                    entries.iter().flat_map(|e| iq3_codes(look_up(&IQ3_XXS, usize::from(*e))));
                let levels = codes.map(|code| look_up(&IQ3_XXS_LEVELS, usize::from(code)));
                write_signed(out, scale, levels, signs);
            }
        }
    }
}

impl GgufBlock for Iq3S {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        // A scale for 32 weights: eight entries of the grid, four bytes of signs.
        let scales = nibbles(&self.scales).map(|scale| d * (1.0 + 2.0 * f32::from(scale)));
        let groups = self.entries.iter().zip(&self.entries_high).zip(&self.signs).zip(scales);
        for ((((entries, high), signs), scale), out) in groups.zip(out.chunks_mut(32)) {
            let entries = entries.iter().zip(bits(std::slice::from_ref(high)));
            let mut levels = entries.flat_map(|(low, high)| {
                iq3_codes(look_up(&IQ3_S, index(*low, high.into()))).map(|code| (code << 1) | 1)
            });
            for (signs, out) in signs.iter().zip(out.chunks_mut(8)) {
                write_signed(out, scale, levels.by_ref().take(8), *signs);
            }
        }
    }
}

/// Writes the 8 weights of entry `entry` of the IQ1 grid to `out`.
fn write_iq1(out: &mut [f32], scale: f32, entry: usize, shifts_down: bool) {
    let delta = if shifts_down { -IQ1_DELTA } else { IQ1_DELTA };
    for (o, code) in out.iter_mut().zip(pairs(&look_up(&IQ1, entry).to_le_bytes())) {
        *o = scale * ((f32::from(code) - 1.0) + delta);
    }
}

impl GgufBlock for Iq1S {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        for ((entries, high), out) in self.entries.iter().zip(&self.high).zip(out.chunks_mut(32)) {
            let [.., upper] = *high;
            let high = u16::from_le_bytes(*high);
            let scale = d * (2.0 * f32::from((upper >> 4) & 7) + 1.0);
            for ((low, shift), out) in entries.iter().zip([0, 3, 6, 9]).zip(out.chunks_mut(8)) {
                let [bits, _] = high.wrapping_shr(shift).to_le_bytes();
                write_iq1(out, scale, index(*low, bits & 7), upper & 128 != 0);
            }
        }
    }
}

impl GgufBlock for Iq1M {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let [[_, a], [_, b], [_, c], [_, e]] = self.scales;
        let d = f16([(a >> 4) | (b & 0xf0), (c >> 4) | (e & 0xf0)]);
        // A scale for 16 weights: two entries.
        let scales = self.scales.iter().flat_map(|scales| {
            let word = u16::from_le_bytes(*scales);
            [0, 3, 6, 9].map(|shift| f32::from(word.wrapping_shr(shift) & 7))
        });
        let scales = scales.map(|scale| d * (2.0 * scale + 1.0)).flat_map(|scale| [scale, scale]);
        let entries = self.entries.as_flattened().iter().zip(nibbles(self.high.as_flattened()));
        for (((low, high), scale), out) in entries.zip(scales).zip(out.chunks_mut(8)) {
            write_iq1(out, scale, index(*low, high & 7), high & 8 != 0);
        }
    }
}

impl GgufBlock for Iq4Nl {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        nibble_planes(&self.codes, out, |code| d * f32::from(look_up(&IQ4_VALUES, code.into())));
    }
}

impl GgufBlock for Iq4Xs {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = f16(self.scale);
        let scales = nibbles(&self.scales).zip(pairs(&self.scales_high));
        for ((codes, (low, high)), out) in self.codes.iter().zip(scales).zip(out.chunks_mut(32)) {
            let scale = d * (f32::from(low | (high << 4)) - 32.0);
            let value = |code: u8| scale * f32::from(look_up(&IQ4_VALUES, code.into()));
            nibble_planes(codes, out, value);
        }
    }
}
