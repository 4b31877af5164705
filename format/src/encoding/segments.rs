//! Segments of payloads with zero padding between them (spec, encodings §1), and binary16 numbers in
//! place.

use crate::error::{Error, Result, Rule};
use crate::limits::TENSOR_ALIGN;
use crate::num::{align_up, first_nonzero, len_u64, slice};

/// The length of a payload with segments of these lengths; `None` on overflow.
pub(crate) fn total<const N: usize>(lengths: [u64; N]) -> Option<u64> {
    let add = |end, len| align_up(end, TENSOR_ALIGN)?.checked_add(len);
    lengths.into_iter().try_fold(0, add)
}

/// Splits a payload into segments of these lengths; `None` if the total length differs.
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

/// Joins segments with zero padding. The inverse of [`split`].
pub(crate) fn join<const N: usize>(parts: [&[u8]; N]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    for part in parts {
        out.resize(out.len().next_multiple_of(64), 0);
        out.extend_from_slice(part);
    }
    out
}

/// STB-R-041: the payload equals `packed`, its content unpacked and packed again, so that all unused
/// bits are zero.
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

/// STB-R-042: all binary16 numbers of `segment` are finite. `what` names them in the error.
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

/// A binary16 number of a segment as binary32; zero if out of bounds, which validated views never are.
#[inline]
pub(crate) fn f16_at(segment: &[[u8; 2]], index: usize) -> f32 {
    segment.get(index).map_or(0.0, |b| half::f16::from_le_bytes(*b).to_f32())
}

/// The little-endian bytes of binary16 numbers.
pub(crate) fn f16_bytes(values: &[half::f16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The binary16 numbers of a segment.
pub(crate) fn f16_vec(segment: &[[u8; 2]]) -> Vec<half::f16> {
    segment.iter().map(|b| half::f16::from_le_bytes(*b)).collect()
}

/// Negates `value` if `negative`. IEEE 754 negation keeps the sign of zero equal in all implementations.
pub(crate) fn signed(value: f32, negative: bool) -> f32 {
    if negative { -value } else { value }
}
