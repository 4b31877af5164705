//! Scales of rows and of blocks of columns, as N:M codes and trellis codes store them.

use rayon::prelude::*;
use stb_format::half::f16;

/// Columns per block scale in the candidates of a budget.
pub(super) const CANDIDATE_BLOCK: u16 = 128;
/// Bits of these scales.
pub(super) const CANDIDATE_BITS: u8 = 4;

/// Rounds `scales`, [rows, blocks], to values that the file can store. Returns the row scales, and the block scale codes
/// of `bits` bits, which are empty for 0 bits.
pub(crate) fn round_rows(scales: &mut [f32], blocks: usize, bits: u8) -> (Vec<f16>, Vec<u8>) {
    let mut codes = vec![0; scales.len()];
    let rows = scales
        .par_chunks_exact_mut(blocks)
        .zip(codes.par_chunks_exact_mut(blocks))
        .map(|(scales, codes)| round_scales(scales, codes, bits))
        .collect();
    (rows, if bits == 0 { Vec::new() } else { codes })
}

/// Rounds the block scales of a row to values that the file can store, and writes their codes to `codes`. Returns the
/// row's scale.
fn round_scales(scales: &mut [f32], codes: &mut [u8], bits: u8) -> f16 {
    let largest = scales.iter().copied().fold(0.0, f32::max);
    let row_scale = f16::from_f32(largest);
    let row = row_scale.to_f32();
    if bits == 0 || row == 0.0 {
        scales.fill(row);
        codes.fill(0);
        return row_scale;
    }
    let steps = f32::from(1u16 << bits);
    for (scale, code) in scales.iter_mut().zip(codes) {
        let level = (*scale / row * steps).round_ties_even().clamp(1.0, steps);
        *code = (level - 1.0) as u8;
        *scale = row * (level / steps);
    }
    row_scale
}
