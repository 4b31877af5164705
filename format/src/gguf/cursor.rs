//! [`Cursor`]: reads the records of a GGUF file one after another.

use super::error::{GgufError, GgufProblem};
use crate::num::len_u64;

/// The longest key or tensor name in bytes.
const MAX_NAME: u64 = 65_535;

/// A position in the bytes of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    offset: u64,
}

impl<'a> Cursor<'a> {
    /// The start of `bytes`, which begin at `offset` of the file.
    pub(super) fn new(bytes: &'a [u8], offset: u64) -> Self {
        Self { rest: bytes, offset }
    }

    /// The offset in the file in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes from here to the end of the file.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], GgufError> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let Some((taken, rest)) = split else {
            let detail = format!(
                "the file ends inside {what}: {len} bytes are announced, {} are left",
                self.rest.len()
            );
            return Err(GgufError::new(GgufProblem::Truncated, detail).at(self.offset));
        };
        self.rest = rest;
        self.offset = self.offset.saturating_add(len);
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let bytes = self.take(len_u64(N), what)?;
        Ok(bytes.try_into().unwrap_or([0; N]))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of items of at least `least` bytes each, of which the rest of the file must have room.
    pub(super) fn count(&mut self, least: u64, what: &str) -> Result<u64, GgufError> {
        let at = self.offset;
        let count = self.u64(what)?;
        self.check_count(count, least, what).map_err(|e| e.at(at))?;
        Ok(count)
    }

    /// Checks that the rest of the file has room for `count` items of at least `least` bytes.
    pub(super) fn check_count(&self, count: u64, least: u64, what: &str) -> Result<(), GgufError> {
        let left = self.rest.len();
        if count.checked_mul(least).is_some_and(|bytes| bytes <= len_u64(left)) {
            return Ok(());
        }
        let detail = format!("{what} is {count}, which the remaining {left} bytes cannot hold");
        Err(GgufError::new(GgufProblem::Count, detail).at(self.offset))
    }

    /// A text: its length in 8 bytes, then UTF-8.
    pub(super) fn text(&mut self, what: &str) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let at = self.offset;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|_| {
            GgufError::new(GgufProblem::Text, format!("{what} is not UTF-8 text")).at(at)
        })
    }

    /// A text of 1 to 65535 bytes.
    pub(super) fn name(&mut self, what: &str) -> Result<&'a str, GgufError> {
        let at = self.offset;
        let name = self.text(what)?;
        if name.is_empty() || len_u64(name.len()) > MAX_NAME {
            let detail = format!("{what} has {} bytes, 1 to {MAX_NAME} are allowed", name.len());
            return Err(GgufError::new(GgufProblem::Name, detail).at(at));
        }
        Ok(name)
    }
}
