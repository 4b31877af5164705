//! What the layouts of all encodings are made of: segments with zero padding between them (spec §6.1),
//! and binary16 numbers in place.

use crate::error::{Error, Result, Rule};
use crate::limits::TENSOR_ALIGN;
use crate::num::{align_up, first_nonzero, len_u64, slice};

/// The length of a payload whose segments have these lengths (spec §6.1).
pub(crate) fn total<const N: usize>(lengths: [u64; N]) -> Option<u64> {
    let add = |end, len| align_up(end, TENSOR_ALIGN)?.checked_add(len);
    lengths.into_iter().try_fold(0, add)
}

/// Splits a payload into its segments; `None` if it does not have exactly their total length.
pub(crate) fn split<const N: usize>(payload: &[u8], lengths: [u64; N]) -> Option<[&[u8]; N]> {
    if total(lengths)? != len_u64(payload.len()) {
        return None;
    }
    let mut parts = [payload; N];
    let mut end = 0u64;
    for (part, len) in parts.iter_mut().zip(lengths) {
        let start = align_up(end, TENSOR_ALIGN)?;
        *part = slice(payload, start, len)?;
        end = start.checked_add(len)?;
    }
    Some(parts)
}

/// Joins segments with zero padding: the inverse of [`split`].
pub(crate) fn join<const N: usize>(parts: [&[u8]; N]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    for part in parts {
        out.resize(out.len().next_multiple_of(64), 0);
        out.extend_from_slice(part);
    }
    out
}

/// STB-R-041: a payload equals what its own content packs to, so every unused bit is zero.
pub(crate) fn check_canonical(payload: &[u8], packed: &[u8]) -> Result<()> {
    let differs = payload.iter().zip(packed).map(|(a, b)| a ^ b).collect::<Vec<u8>>();
    match first_nonzero(&differs) {
        None if payload.len() == packed.len() => Ok(()),
        at => {
            let detail = "an unused bit is not zero";
            Err(Error::new(Rule::PayloadPadding, detail).at(len_u64(at.unwrap_or(0))))
        }
    }
}

/// STB-R-042: every binary16 number of a segment is finite.
pub(crate) fn check_finite_f16(payload: &[u8], segment: &[[u8; 2]], what: &str) -> Result<()> {
    match segment.iter().position(|b| !half::f16::from_le_bytes(*b).is_finite()) {
        None => Ok(()),
        Some(index) => {
            let start = segment.as_ptr().addr().saturating_sub(payload.as_ptr().addr());
            let at = start.saturating_add(index.saturating_mul(2));
            let detail = format!("{what} {index} is not finite");
            Err(Error::new(Rule::PayloadFinite, detail).at(len_u64(at)))
        }
    }
}

/// A segment as little-endian binary16 numbers, in place.
#[inline]
pub(crate) fn as_f16(bytes: &[u8]) -> &[[u8; 2]] {
    bytemuck::cast_slice(bytes.as_chunks::<2>().0)
}

/// A binary16 number of a segment as binary32; zero outside, which validated views never reach.
#[inline]
pub(crate) fn f16_at(segment: &[[u8; 2]], index: usize) -> f32 {
    segment.get(index).map_or(0.0, |b| half::f16::from_le_bytes(*b).to_f32())
}

/// The bytes of binary16 numbers.
pub(crate) fn f16_bytes(values: &[half::f16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Binary16 numbers of a segment.
pub(crate) fn f16_vec(segment: &[[u8; 2]]) -> Vec<half::f16> {
    segment.iter().map(|b| half::f16::from_le_bytes(*b)).collect()
}

/// IEEE 754 negation if `negative`: keeps the sign of zero exact across implementations.
pub(crate) fn signed(value: f32, negative: bool) -> f32 {
    if negative { -value } else { value }
}
