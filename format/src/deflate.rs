//! The value of a deflated text (spec, metadata §1): the length of the text, then its DEFLATE stream.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use crate::num::len_u64;

/// The most bytes that one byte of a DEFLATE stream stands for: 258 bytes in 2 bits.
const MAX_RATIO: u64 = 1032;
/// The level of compression, of 0 to 10. More effort saves less than a hundredth.
const LEVEL: u8 = 9;

/// The value that stores `text` deflated. Equal texts give equal bytes.
pub(crate) fn deflate(text: &str) -> Vec<u8> {
    let mut value = len_u64(text.len()).to_le_bytes().to_vec();
    value.extend(miniz_oxide::deflate::compress_to_vec(text.as_bytes(), LEVEL));
    value
}

/// The stated length of the text in bytes, and the stream; `None` without the 8 bytes of a length.
pub(crate) fn split(value: &[u8]) -> Option<(u64, &[u8])> {
    let (length, stream) = value.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*length), stream))
}

/// The text of `length` bytes in `stream`. Allocates `length` bytes, and nothing if a stream of this size
/// cannot give so many. An error says what is wrong.
pub(crate) fn inflate(length: u64, stream: &[u8]) -> Result<String, &'static str> {
    let short = "is shorter than stated";
    if length > len_u64(stream.len()).saturating_mul(MAX_RATIO) {
        return Err(short);
    }
    let mut text = vec![0; usize::try_from(length).map_err(|_| "does not fit in memory")?];
    // With the whole text as its buffer, a stream cannot refer to bytes before the start.
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut state = Box::<DecompressorOxide>::default();
    match decompress(&mut state, stream, &mut text, 0, flags) {
        (TINFLStatus::Done, read, _) if read != stream.len() => Err("has bytes after its stream"),
        (TINFLStatus::Done, _, written) if written != text.len() => Err(short),
        (TINFLStatus::Done, ..) => String::from_utf8(text).map_err(|_| "is not UTF-8"),
        (TINFLStatus::HasMoreOutput, ..) => Err("is longer than stated"),
        _ => Err("is damaged"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> String {
        (0..3000).map(|i| format!("word{} ", i * i % 1013)).collect()
    }

    #[test]
    fn round_trip() {
        for text in [String::new(), "a".into(), "grüße 🦀".into(), sample(), "0".repeat(1 << 20)]
        {
            let value = deflate(&text);
            let (length, stream) = split(&value).unwrap();
            assert_eq!(length, text.len() as u64);
            assert_eq!(inflate(length, stream), Ok(text));
        }
    }

    #[test]
    fn wrong_lengths_and_bytes_after_the_stream() {
        let value = deflate(&sample());
        let (length, stream) = split(&value).unwrap();
        assert_eq!(inflate(length - 1, stream), Err("is longer than stated"));
        assert_eq!(inflate(length + 1, stream), Err("is shorter than stated"));
        assert_eq!(inflate(u64::MAX, stream), Err("is shorter than stated"));
        for n in [1, 4, 100] {
            let longer = [stream, &vec![0; n]].concat();
            assert_eq!(inflate(length, &longer), Err("has bytes after its stream"), "{n}");
        }
        assert_eq!(split(&[0; 7]), None);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let value = deflate(&sample()[..600]);
        let (length, stream) = split(&value).unwrap();
        for end in 0..stream.len() {
            assert!(inflate(length, &stream[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn references_before_the_start_are_refused() {
        // A block of fixed codes: a match of length 3 and distance 1, then the end.
        assert_eq!(inflate(3, &[0x03, 0x02, 0x00]), Err("is damaged"));
    }
}
