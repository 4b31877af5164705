//! Metadata values of GGUF files, in place.

use super::cursor::Cursor;
use super::error::{GgufError, GgufProblem};

/// The deepest nesting of arrays.
const MAX_DEPTH: u32 = 4;

/// A metadata value in place. Integers of all widths are widened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GgufValue<'a> {
    /// Types 0, 2, 4 and 10: an unsigned integer of 8, 16, 32 or 64 bits.
    Unsigned(u64),
    /// Types 1, 3, 5 and 11: a signed integer.
    Signed(i64),
    /// Type 6: a binary32 number.
    F32(f32),
    /// Type 12: a binary64 number.
    F64(f64),
    /// Type 7: a boolean.
    Bool(bool),
    /// Type 8: a text.
    Text(&'a str),
    /// Type 9: an array.
    Array(GgufArray<'a>),
}

impl<'a> GgufValue<'a> {
    /// Parses a value of type `kind`.
    pub(super) fn parse(cursor: &mut Cursor<'a>, kind: u32, depth: u32) -> Result<Self, GgufError> {
        let at = cursor.offset();
        if kind == 8 {
            return cursor.text("the value").map(Self::Text);
        }
        if kind == 9 {
            return GgufArray::parse(cursor, depth).map(Self::Array);
        }
        let Some(width) = width(kind) else {
            let detail = format!("value type {kind} does not exist");
            return Err(GgufError::new(GgufProblem::ValueType, detail).at(at));
        };
        let bytes = cursor.take(width, "the value")?;
        Self::number(kind, bytes).ok_or_else(|| {
            let detail = "a boolean is neither 0 nor 1";
            GgufError::new(GgufProblem::Value, detail).at(at)
        })
    }

    /// The number or boolean of type `kind` in `bytes`.
    fn number(kind: u32, bytes: &[u8]) -> Option<Self> {
        let mut wide = [0; 8];
        wide.iter_mut().zip(bytes).for_each(|(wide, byte)| *wide = *byte);
        let [a, b, c, d, ..] = wide;
        Some(match kind {
            0 | 2 | 4 | 10 => Self::Unsigned(u64::from_le_bytes(wide)),
            1 => Self::Signed(i8::from_le_bytes([a]).into()),
            3 => Self::Signed(i16::from_le_bytes([a, b]).into()),
            5 => Self::Signed(i32::from_le_bytes([a, b, c, d]).into()),
            11 => Self::Signed(i64::from_le_bytes(wide)),
            6 => Self::F32(f32::from_le_bytes([a, b, c, d])),
            12 => Self::F64(f64::from_le_bytes(wide)),
            7 => match a {
                0 => Self::Bool(false),
                1 => Self::Bool(true),
                _ => return None,
            },
            _ => return None,
        })
    }

    /// The value as an unsigned integer.
    #[must_use]
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// The value as a signed integer.
    #[must_use]
    pub fn as_i64(self) -> Option<i64> {
        match self {
            Self::Unsigned(value) => i64::try_from(value).ok(),
            Self::Signed(value) => Some(value),
            _ => None,
        }
    }

    /// The text.
    #[must_use]
    pub fn as_text(self) -> Option<&'a str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The boolean.
    #[must_use]
    pub fn as_bool(self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// The array.
    #[must_use]
    pub fn as_array(self) -> Option<GgufArray<'a>> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }
}

/// Bytes of a number or boolean of type `kind`.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A validated array in place. Elements are parsed when they are asked for.
#[derive(Clone, Copy, Debug)]
pub struct GgufArray<'a> {
    kind: u32,
    len: u64,
    elements: Cursor<'a>,
    bytes: &'a [u8],
}

impl<'a> GgufArray<'a> {
    fn parse(cursor: &mut Cursor<'a>, depth: u32) -> Result<Self, GgufError> {
        let at = cursor.offset();
        if depth >= MAX_DEPTH {
            let detail = format!("arrays are nested more than {MAX_DEPTH} times");
            return Err(GgufError::new(GgufProblem::Value, detail).at(at));
        }
        let kind = cursor.u32("the type of an array")?;
        // A text has its length, an array its type and its length.
        let least = match kind {
            8 => 8,
            9 => 12,
            _ => width(kind).ok_or_else(|| {
                let detail = format!("value type {kind} does not exist");
                GgufError::new(GgufProblem::ValueType, detail).at(at)
            })?,
        };
        let len = cursor.count(least, "the length of an array")?;
        let elements = *cursor;
        match width(kind) {
            Some(width) if kind != 7 => {
                cursor.take(len.saturating_mul(width), "an array")?;
            }
            _ => {
                for _ in 0..len {
                    GgufValue::parse(cursor, kind, depth.saturating_add(1))?;
                }
            }
        }
        let used = elements.rest().len().saturating_sub(cursor.rest().len());
        let bytes = elements.rest().get(..used).unwrap_or_default();
        Ok(Self { kind, len, elements, bytes })
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = GgufValue<'a>> + use<'a> {
        let (kind, mut cursor) = (self.kind, self.elements);
        // All elements were parsed once, so none is an error. The depth was checked, too.
        (0..self.len).map_while(move |_| GgufValue::parse(&mut cursor, kind, 0).ok())
    }
}

impl PartialEq for GgufArray<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.len == other.len && self.bytes == other.bytes
    }
}
