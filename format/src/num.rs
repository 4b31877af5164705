//! Arithmetic and slicing that cannot panic, for values from a file.

/// `len` bytes of `bytes` from `offset`; `None` if the range is out of bounds.
pub(crate) fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let end = usize::try_from(offset.checked_add(len)?).ok()?;
    bytes.get(usize::try_from(offset).ok()?..end)
}

/// Rounds `n` up to a multiple of `align`, a power of two; `None` on overflow.
pub(crate) fn align_up(n: u64, align: u64) -> Option<u64> {
    let mask = align.checked_sub(1)?;
    Some(n.checked_add(mask)? & !mask)
}

/// The offset of the first nonzero byte.
pub(crate) fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&b| b != 0)
}

/// A length as `u64`.
pub(crate) fn len_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// A size as `f64`; sizes of models are below 2^53.
#[allow(clippy::as_conversions)]
pub(crate) fn f64_of(n: u64) -> f64 {
    n as f64
}

/// The integer part of `x`; 0 for negative numbers and NaN.
#[allow(clippy::as_conversions)]
pub(crate) fn truncated(x: f64) -> u64 {
    x as u64
}

/// A width of at most 65536 as `f32`, exactly.
#[allow(clippy::as_conversions)]
pub(crate) fn f32_of(n: u64) -> f32 {
    n as f32
}
