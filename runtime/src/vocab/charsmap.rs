//! SentencePiece's rules of normalization: a double-array trie of byte sequences, and the texts that
//! replace them.
//!
//! The tokenizer crate walks the trie without checking, so a map is checked here first: no text may
//! lead outside of it.

use crate::error::{Error, Result};

/// The largest trie in bytes. The one that SentencePiece uses for most models has 0.25 MB.
const MAX_TRIE_BYTES: usize = 4 << 20;

/// Checks that every walk through the map stays inside.
///
/// The layout is that of SentencePiece's `precompiled_charsmap`: the length of the trie in bytes (u32),
/// the units of the trie (u32, little endian), texts that end with a zero byte.
///
/// # Errors
/// [`Error::Invalid`] if one does not.
pub(super) fn check(map: &[u8]) -> Result<()> {
    let broken = |what: &str| Error::invalid(format!("the normalization rules are broken: {what}"));
    let (size, rest) = map.split_first_chunk::<4>().ok_or_else(|| broken("no length"))?;
    let size = u32::from_le_bytes(*size) as usize;
    let (units, texts) = rest.split_at_checked(size).ok_or_else(|| broken("a cut trie"))?;
    if size > MAX_TRIE_BYTES || !size.is_multiple_of(4) {
        return Err(broken("a trie of this size"));
    }
    let texts = std::str::from_utf8(texts).map_err(|_| broken("texts that are not UTF-8"))?;
    let (units, _) = units.as_chunks::<4>();
    let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let mut trie = Trie { units, texts, seen: Vec::new() };
    trie.seen.resize(trie.units.len(), false);
    trie.walk().ok_or_else(|| broken("a rule leads outside"))
}

/// The bytes of the longest text in a map as `tokenizer.json` holds it, in base64.
///
/// # Errors
/// [`Error::Invalid`] if it is not base64, or the errors of [`check`].
pub(crate) fn longest_replacement(base64: &str) -> Result<usize> {
    let broken = || Error::invalid("the normalization rules are broken: no base64");
    let map = base64::decode(base64).map_err(|_| broken())?;
    check(&map)?;
    let size = map.first_chunk().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    let texts = map.get(4 + size..).unwrap_or_default();
    Ok(texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0))
}

struct Trie<'m> {
    units: Vec<u32>,
    texts: &'m str,
    /// States that were visited.
    seen: Vec<bool>,
}

impl Trie<'_> {
    /// Visits every state that a text can reach; `None` if one leads outside.
    fn walk(&mut self) -> Option<()> {
        let mut waiting = vec![offset(*self.units.first()?)];
        while let Some(state) = waiting.pop() {
            // A step reads the unit at `state ^ byte`, and these are 256 neighbors.
            let (first, last) = (state & !0xFF, state | 0xFF);
            self.units.get(last)?;
            if std::mem::replace(self.seen.get_mut(state)?, true) {
                continue;
            }
            for position in first..=last {
                let unit = *self.units.get(position)?;
                let byte = position ^ state;
                if byte == 0 || label(unit) != byte {
                    continue;
                }
                let next = position ^ offset(unit);
                if has_value(unit) {
                    let start = value(*self.units.get(next)?);
                    self.texts.is_char_boundary(start).then_some(())?;
                }
                waiting.push(next);
            }
        }
        Some(())
    }
}

fn has_value(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

/// The start of a text.
fn value(unit: u32) -> usize {
    (unit & 0x7FFF_FFFF) as usize
}

/// The byte that leads to this unit; more than 255 in units that hold values.
fn label(unit: u32) -> usize {
    (unit & 0x8000_00FF) as usize
}

/// The distance to the units that follow, as an exclusive or.
fn offset(unit: u32) -> usize {
    ((unit >> 10) as usize) << ((unit & 1 << 9) >> 6)
}
