//! Column factors of the N:M and the trellis encoding.

use stb_format::half::f16;

use crate::cpu::arch::simd::Simd;

/// Multiplies activations, padded with zeros to whole vectors, by `col_factors`, binary16; an encoding without factors has
/// an empty slice.
#[inline(always)]
pub(super) fn multiply_factors<S: Simd>(s: S, col_factors: &[[u8; 2]], x: &mut [f32]) {
    let (factors, tail) = col_factors.as_chunks::<16>();
    let (vectors, _) = x.as_chunks_mut::<16>();
    for (x, factors) in vectors.iter_mut().zip(factors) {
        let factors = factors.as_flattened().first_chunk().expect("16 factors");
        s.store(s.mul(s.load(x), s.f16_to_f32(factors)), x);
    }
    for (x, factor) in x[col_factors.len() - tail.len()..].iter_mut().zip(tail) {
        *x *= f16::from_le_bytes(*factor).to_f32();
    }
}
