//! SentencePiece models, a message of Protocol Buffers.

use super::{TokenKind, Vocabulary, VocabularyKind};
use crate::error::{Error, Result};

/// The first byte of a model: field 1, a message.
pub(super) const FIRST_BYTE: u8 = 0x0A;

/// Reads the content of a `tokenizer.model`. Fields are those of `sentencepiece_model.proto`.
///
/// # Errors
/// [`Error::Invalid`] for bytes that are not such a model, [`Error::Unsupported`] for models of words
/// and characters and for options that `tokenizer.json` cannot express.
pub(super) fn parse(bytes: &[u8]) -> Result<Vocabulary> {
    let mut vocabulary = Vocabulary::default();
    let mut trainer = Trainer::default();
    let mut normalizer = Normalizer::default();
    let mut message = WireMessage(bytes);
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(piece)) => push_piece(&mut vocabulary, piece)?,
            (2, Field::Bytes(spec)) => trainer = Trainer::parse(spec)?,
            (3, Field::Bytes(spec)) => normalizer = Normalizer::parse(spec)?,
            _ => {}
        }
    }
    let refuse = |what: &str| {
        Err(Error::unsupported(format!(
            "tokenizer.model {what}, which is not supported; put the model's tokenizer.json beside it"
        )))
    };
    vocabulary.kind = match trainer.model {
        1 => VocabularyKind::Unigram,
        2 => VocabularyKind::SentencePieceBpe,
        _ => return refuse("splits text into words or characters"),
    };
    if trainer.space_after {
        return refuse("puts spaces after words");
    }
    if !normalizer.escape_spaces {
        return refuse("does not write spaces as ▁");
    }
    vocabulary.add_space_prefix = normalizer.add_prefix;
    vocabulary.remove_extra_whitespaces = normalizer.remove_extra;
    vocabulary.charsmap = normalizer.charsmap.to_vec();
    vocabulary.bos = u32::try_from(trainer.bos).ok();
    if vocabulary.bos.is_none() {
        vocabulary.add_bos = Some(false);
    }
    Ok(vocabulary)
}

/// Adds a `SentencePiece`.
fn push_piece(vocabulary: &mut Vocabulary, bytes: &[u8]) -> Result<()> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, TokenKind::Normal);
    let mut message = WireMessage(bytes);
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(piece)) => {
                text = std::str::from_utf8(piece)
                    .map_err(|_| broken("a piece is not UTF-8"))?
                    .to_owned();
            }
            (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Field::Number(number)) => kind = TokenKind::from_number(number),
            _ => {}
        }
    }
    if kind == TokenKind::UserDefined {
        // These are searched for in the text before its spaces are replaced.
        text = text.replace('▁', " ");
    }
    vocabulary.tokens.push(text);
    vocabulary.scores.push(score);
    vocabulary.token_kinds.push(kind);
    Ok(())
}

/// What matters of a `TrainerSpec`.
struct Trainer {
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    model: i64,
    bos: i64,
    space_after: bool,
}

impl Default for Trainer {
    fn default() -> Self {
        Self { model: 1, bos: 1, space_after: false }
    }
}

impl Trainer {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut spec = Self::default();
        let mut message = WireMessage(bytes);
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (3, Field::Number(model)) => spec.model = model,
                (24, Field::Number(suffix)) => spec.space_after = suffix != 0,
                (41, Field::Number(id)) => spec.bos = id,
                _ => {}
            }
        }
        Ok(spec)
    }
}

/// What matters of a `NormalizerSpec`.
struct Normalizer<'m> {
    charsmap: &'m [u8],
    add_prefix: bool,
    remove_extra: bool,
    escape_spaces: bool,
}

impl Default for Normalizer<'_> {
    fn default() -> Self {
        Self { charsmap: &[], add_prefix: true, remove_extra: true, escape_spaces: true }
    }
}

impl<'m> Normalizer<'m> {
    fn parse(bytes: &'m [u8]) -> Result<Self> {
        let mut spec = Self::default();
        let mut message = WireMessage(bytes);
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (2, Field::Bytes(map)) => spec.charsmap = map,
                (3, Field::Number(on)) => spec.add_prefix = on != 0,
                (4, Field::Number(on)) => spec.remove_extra = on != 0,
                (5, Field::Number(on)) => spec.escape_spaces = on != 0,
                _ => {}
            }
        }
        Ok(spec)
    }
}

fn broken(what: &str) -> Error {
    Error::invalid(format!("tokenizer.model is not a SentencePiece model: {what}"))
}

/// The rest of a message.
struct WireMessage<'m>(&'m [u8]);

/// A value on the wire.
enum Field<'m> {
    Number(i64),
    Bytes(&'m [u8]),
    Fixed32(u32),
    Fixed64,
}

impl<'m> WireMessage<'m> {
    /// The next field with its number; `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'m>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()?.cast_signed()),
            1 => self.array::<8>().map(|_| Field::Fixed64)?,
            2 => {
                let length = self.varint()?;
                let length =
                    usize::try_from(length).map_err(|_| broken("a length is too large"))?;
                let (bytes, rest) =
                    self.0.split_at_checked(length).ok_or_else(|| broken("it is cut off"))?;
                self.0 = rest;
                Field::Bytes(bytes)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.array()?)),
            _ => return Err(broken("a field has an unknown type")),
        };
        Ok(Some((key >> 3, value)))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().ok_or_else(|| broken("it is cut off"))?;
        self.0 = rest;
        Ok(*array)
    }

    /// Seven bits per byte, the lowest first.
    fn varint(&mut self) -> Result<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(broken("a number is too long"))
    }
}
