//! The META section: typed key-value pairs in ascending key order (spec, metadata §1).

use std::borrow::Cow;
use std::collections::BTreeMap;

use zerocopy::{FromBytes, IntoBytes};

use crate::deflate::{deflate, inflate, split};
use crate::error::{Error, Result, Rule};
use crate::limits::{
    DEFLATED_TEXT_VERSION, MAX_INFLATED_BYTES, MAX_META_ENTRIES, MAX_META_VALUE_BYTES,
    MAX_NAME_BYTES,
};
use crate::num::len_u64;
use crate::raw::{MetaEntry, MetaHeader};

/// A metadata value, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Type 1: UTF-8 text. Files such as `tokenizer.json` are stored verbatim. Type 6 is the same text, stored
    /// as a DEFLATE stream.
    Text(String),
    /// Type 2: an unsigned integer.
    U64(u64),
    /// Type 3: a finite binary64 number.
    F64(f64),
    /// Type 4: a boolean.
    Bool(bool),
    /// Type 5: a list of unsigned integers.
    U64List(Vec<u64>),
}

/// A metadata value in place in the file, or in the [`MetaView`] if it is stored deflated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValueRef<'a> {
    /// See [`Value::Text`].
    Text(&'a str),
    /// See [`Value::U64`].
    U64(u64),
    /// See [`Value::F64`].
    F64(f64),
    /// See [`Value::Bool`].
    Bool(bool),
    /// See [`Value::U64List`]: little-endian elements of 8 bytes.
    U64List(&'a [[u8; 8]]),
}

impl ValueRef<'_> {
    /// An owned copy.
    #[must_use]
    pub fn to_value(self) -> Value {
        match self {
            ValueRef::Text(v) => Value::Text(v.to_owned()),
            ValueRef::U64(v) => Value::U64(v),
            ValueRef::F64(v) => Value::F64(v),
            ValueRef::Bool(v) => Value::Bool(v),
            ValueRef::U64List(v) => {
                Value::U64List(v.iter().map(|b| u64::from_le_bytes(*b)).collect())
            }
        }
    }
}

/// The validated metadata of a file: in place, apart from deflated texts, which are inflated when the file is
/// opened and kept.
#[derive(Clone, Debug, Default)]
pub struct MetaView<'a> {
    entries: Vec<(&'a str, Stored<'a>)>,
}

/// How a value is kept.
#[derive(Clone, Debug)]
enum Stored<'a> {
    InPlace(ValueRef<'a>),
    Inflated(String),
}

impl<'a> Stored<'a> {
    fn get(&self) -> ValueRef<'_> {
        match self {
            Self::InPlace(value) => *value,
            Self::Inflated(text) => ValueRef::Text(text),
        }
    }
}

impl<'a> MetaView<'a> {
    /// Parses a META section at file offset `base` of a file for readers from version `min_reader`.
    pub(crate) fn parse(section: &'a [u8], base: u64, min_reader: u16) -> Result<Self> {
        let total = len_u64(section.len());
        let fail = |rule, detail: String, rest: &[u8]| {
            Error::new(rule, detail)
                .at(base.saturating_add(total.saturating_sub(len_u64(rest.len()))))
        };
        let Ok((header, mut rest)) = MetaHeader::ref_from_prefix(section) else {
            return Err(fail(Rule::MetaStructure, "META is shorter than 8 bytes".into(), section));
        };
        if header.reserved.get() != 0 {
            return Err(fail(
                Rule::MetaStructure,
                "reserved field of META is not zero".into(),
                section,
            ));
        }
        let count = header.count.get();
        if count > MAX_META_ENTRIES {
            let detail =
                format!("{count} metadata entries, at most {MAX_META_ENTRIES} are allowed");
            return Err(fail(Rule::MetaLimits, detail, section));
        }
        let mut entries: Vec<(&str, Stored)> = Vec::new();
        let mut parser = Parser { min_reader, inflated: 0 };
        for index in 0..count {
            let last = entries.last().map(|(key, _)| *key);
            let entry = parser.entry(rest, u64::from(index), last);
            let (key, value, after) = entry.map_err(|(rule, detail)| fail(rule, detail, rest))?;
            entries.push((key, value));
            rest = after;
        }
        if !rest.is_empty() {
            let detail = format!("{} bytes follow the last metadata entry", rest.len());
            return Err(fail(Rule::MetaStructure, detail, rest));
        }
        Ok(Self { entries })
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<ValueRef<'_>> {
        let index = self.entries.binary_search_by(|(k, _)| (*k).cmp(key)).ok()?;
        self.entries.get(index).map(|(_, v)| v.get())
    }

    /// The text value of `key`, if it is present and text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            ValueRef::Text(v) => Some(v),
            _ => None,
        }
    }

    /// The list value of `key`, if it is present and a list of integers.
    #[must_use]
    pub fn u64_list(&self, key: &str) -> Option<Vec<u64>> {
        match self.get(key)?.to_value() {
            Value::U64List(v) => Some(v),
            _ => None,
        }
    }

    /// All pairs in ascending key order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a str, ValueRef<'_>)> + '_ {
        self.entries.iter().map(|(key, value)| (*key, value.get()))
    }
}

/// The fewest bytes that a deflated text saves; for less, a text stays readable in the file.
const MIN_SAVING: usize = 256;

/// Metadata for a [`Writer`](crate::Writer).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    entries: BTreeMap<String, Value>,
    /// The stored form of those texts that are written deflated.
    deflated: BTreeMap<String, Vec<u8>>,
}

impl Meta {
    /// No entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`, replacing an earlier value.
    ///
    /// # Errors
    /// The rule that the key or the value would break.
    pub fn set(&mut self, key: &str, value: Value) -> Result<()> {
        if key.is_empty() || key.len() > MAX_NAME_BYTES {
            return Err(Error::new(Rule::MetaLimits, format!("key of {} bytes", key.len())));
        }
        if parse_key(key.as_bytes()).is_none() {
            return Err(Error::new(Rule::MetaKey, format!("key {key:?}")));
        }
        let bytes = value_bytes(&value);
        if len_u64(bytes.len()) > u64::from(MAX_META_VALUE_BYTES) {
            let detail = format!("the value of {key} has {} bytes", bytes.len());
            return Err(Error::new(Rule::MetaLimits, detail));
        }
        if parse_value(kind_of(&value), &bytes).is_none() {
            return Err(Error::new(Rule::MetaValue, format!("the value of {key}")));
        }
        self.entries.insert(key.to_owned(), value);
        self.deflated.remove(key);
        Ok(())
    }

    /// Removes all keys that begin with `prefix`.
    pub(crate) fn remove_prefix(&mut self, prefix: &str) {
        self.entries.retain(|key, _| !key.starts_with(prefix));
        self.deflated.retain(|key, _| !key.starts_with(prefix));
    }

    /// Writes the texts that are set now deflated, where that saves at least 256 bytes. The file then needs
    /// readers of version 2. A text that is set later, also one of these keys, is written as it is.
    pub fn deflate_texts(&mut self) {
        let mut total: u64 = 0;
        for (key, value) in &self.entries {
            let Value::Text(text) = value else { continue };
            let sum = total.saturating_add(len_u64(text.len()));
            if text.len() <= MIN_SAVING || sum > MAX_INFLATED_BYTES {
                continue;
            }
            let stored = deflate(text);
            if stored.len().saturating_add(MIN_SAVING) <= text.len() {
                self.deflated.insert(key.clone(), stored);
                total = sum;
            }
        }
    }

    /// The oldest format version whose readers know all types of these values.
    pub(crate) fn min_reader(&self) -> u16 {
        if self.deflated.is_empty() { 1 } else { DEFLATED_TEXT_VERSION }
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The type of a value and the bytes that store it.
    fn stored(&self, key: &str, value: &Value) -> (u8, Cow<'_, [u8]>) {
        match self.deflated.get(key) {
            Some(bytes) => (DEFLATED_TEXT, Cow::Borrowed(bytes)),
            None => (kind_of(value), Cow::Owned(value_bytes(value))),
        }
    }

    /// The length of the META section in bytes.
    pub(crate) fn len(&self) -> u64 {
        let entry = |(key, value): (&String, &Value)| {
            let (_, bytes) = self.stored(key, value);
            len_u64(key.len()).saturating_add(len_u64(bytes.len())).saturating_add(8)
        };
        self.entries.iter().map(entry).sum::<u64>().saturating_add(8)
    }

    /// The bytes of the META section.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let count = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        if count > MAX_META_ENTRIES {
            return Err(Error::new(Rule::MetaLimits, format!("{count} metadata entries")));
        }
        let mut out = Vec::new();
        out.extend(MetaHeader { count: count.into(), reserved: 0.into() }.as_bytes());
        for (key, value) in &self.entries {
            let (kind, bytes) = self.stored(key, value);
            let lengths = (u16::try_from(key.len()), u32::try_from(bytes.len()));
            let (Ok(key_length), Ok(value_length)) = lengths else {
                return Err(Error::new(Rule::MetaLimits, format!("entry {key} is too long")));
            };
            let entry = MetaEntry {
                key_length: key_length.into(),
                kind,
                reserved: 0,
                value_length: value_length.into(),
            };
            out.extend(entry.as_bytes());
            out.extend(key.as_bytes());
            out.extend_from_slice(&bytes);
        }
        Ok(out)
    }
}

/// Value type of a deflated text.
const DEFLATED_TEXT: u8 = 6;

/// An entry: key, value and the bytes after it.
type Entry<'a> = (&'a str, Stored<'a>, &'a [u8]);

/// A broken rule with a detail.
type Broken = (Rule, String);

/// Reads entries one after another.
struct Parser {
    min_reader: u16,
    /// Bytes of the deflated texts so far, inflated.
    inflated: u64,
}

impl Parser {
    /// Entry `index`, at the start of `bytes`, after one whose key is `last`.
    fn entry<'a>(
        &mut self,
        bytes: &'a [u8],
        index: u64,
        last: Option<&str>,
    ) -> std::result::Result<Entry<'a>, Broken> {
        let (entry, key, value, after) = split_entry(bytes, index)?;
        let Some(key) = parse_key(key) else {
            let detail = format!("the key of entry {index} has a character outside a-z 0-9 . _ -");
            return Err((Rule::MetaKey, detail));
        };
        if let Some(last) = last
            && last >= key
        {
            let detail = format!("key {key} comes after {last}");
            return Err((Rule::MetaOrder, detail));
        }
        let newest = if self.min_reader < DEFLATED_TEXT_VERSION { 5 } else { DEFLATED_TEXT };
        if !(1..=newest).contains(&entry.kind) {
            let detail = format!(
                "key {key} has value type {}, in a file for readers from version {}",
                entry.kind, self.min_reader
            );
            return Err((Rule::MetaType, detail));
        }
        let invalid = || {
            let detail = format!("the value of key {key} is not valid for type {}", entry.kind);
            (Rule::MetaValue, detail)
        };
        if entry.reserved != 0 {
            return Err(invalid());
        }
        let stored = if entry.kind == DEFLATED_TEXT {
            let (length, stream) = split(value).ok_or_else(invalid)?;
            Stored::Inflated(self.inflate(key, length, stream)?)
        } else {
            Stored::InPlace(parse_value(entry.kind, value).ok_or_else(invalid)?)
        };
        Ok((key, stored, after))
    }

    /// The deflated text of `length` bytes in `stream`, under `key`.
    fn inflate(
        &mut self,
        key: &str,
        length: u64,
        stream: &[u8],
    ) -> std::result::Result<String, Broken> {
        self.inflated = self.inflated.saturating_add(length);
        if self.inflated > MAX_INFLATED_BYTES {
            let detail = format!(
                "with the value of key {key}, deflated texts have {} bytes; at most {MAX_INFLATED_BYTES} are \
                 allowed",
                self.inflated
            );
            return Err((Rule::MetaLimits, detail));
        }
        inflate(length, stream)
            .map_err(|what| (Rule::MetaDeflate, format!("the deflated text of key {key} {what}")))
    }
}

/// The header of an entry, its key, its value, and the bytes after it.
type Parts<'a> = (&'a MetaEntry, &'a [u8], &'a [u8], &'a [u8]);

/// Cuts entry `index` off `bytes`.
fn split_entry(bytes: &[u8], index: u64) -> std::result::Result<Parts<'_>, Broken> {
    let Ok((entry, after)) = MetaEntry::ref_from_prefix(bytes) else {
        return Err((Rule::MetaStructure, format!("entry {index} is cut off")));
    };
    let key_length = usize::from(entry.key_length.get());
    if key_length == 0 || key_length > MAX_NAME_BYTES {
        let detail = format!("entry {index} has a key of {key_length} bytes");
        return Err((Rule::MetaLimits, detail));
    }
    if entry.value_length.get() > MAX_META_VALUE_BYTES {
        let detail = format!("entry {index} has a value of {} bytes", entry.value_length.get());
        return Err((Rule::MetaLimits, detail));
    }
    let value_length = usize::try_from(entry.value_length.get()).unwrap_or(usize::MAX);
    let split = after
        .split_at_checked(key_length)
        .and_then(|(key, after)| Some((key, after.split_at_checked(value_length)?)));
    let Some((key, (value, after))) = split else {
        return Err((Rule::MetaStructure, format!("entry {index} is cut off")));
    };
    Ok((entry, key, value, after))
}

fn parse_key(bytes: &[u8]) -> Option<&str> {
    let allowed = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    if bytes.iter().all(allowed) { std::str::from_utf8(bytes).ok() } else { None }
}

fn kind_of(value: &Value) -> u8 {
    match value {
        Value::Text(_) => 1,
        Value::U64(_) => 2,
        Value::F64(_) => 3,
        Value::Bool(_) => 4,
        Value::U64List(_) => 5,
    }
}

fn value_bytes(value: &Value) -> Vec<u8> {
    match value {
        Value::Text(v) => v.as_bytes().to_vec(),
        Value::U64(v) => v.to_le_bytes().to_vec(),
        Value::F64(v) => v.to_le_bytes().to_vec(),
        Value::Bool(v) => vec![u8::from(*v)],
        Value::U64List(v) => v.iter().flat_map(|n| n.to_le_bytes()).collect(),
    }
}

fn parse_value(kind: u8, bytes: &[u8]) -> Option<ValueRef<'_>> {
    match kind {
        1 => std::str::from_utf8(bytes).ok().map(ValueRef::Text),
        2 => bytes.try_into().ok().map(|b| ValueRef::U64(u64::from_le_bytes(b))),
        3 => {
            let value = f64::from_le_bytes(bytes.try_into().ok()?);
            value.is_finite().then_some(ValueRef::F64(value))
        }
        4 => match bytes {
            [0] => Some(ValueRef::Bool(false)),
            [1] => Some(ValueRef::Bool(true)),
            _ => None,
        },
        5 => {
            let (elements, tail) = bytes.as_chunks::<8>();
            tail.is_empty().then_some(ValueRef::U64List(elements))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Meta {
        let mut meta = Meta::new();
        meta.set("b.text", Value::Text("grüße".into())).unwrap();
        meta.set("a.u64", Value::U64(7)).unwrap();
        meta.set("c.f64", Value::F64(-0.5)).unwrap();
        meta.set("d.bool", Value::Bool(true)).unwrap();
        meta.set("e.list", Value::U64List(vec![1, 2, u64::MAX])).unwrap();
        meta
    }

    #[test]
    fn round_trip_is_sorted_and_typed() {
        let meta = sample();
        let bytes = meta.to_bytes().unwrap();
        let view = MetaView::parse(&bytes, 0, 1).unwrap();
        let keys: Vec<_> = view.iter().map(|(k, _)| k).collect();
        assert_eq!(keys, ["a.u64", "b.text", "c.f64", "d.bool", "e.list"]);
        for (key, value) in view.iter() {
            assert_eq!(Some(&value.to_value()), meta.get(key));
        }
        assert_eq!(view.text("b.text"), Some("grüße"));
        assert_eq!(view.text("a.u64"), None);
        assert_eq!(view.u64_list("e.list"), Some(vec![1, 2, u64::MAX]));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample().to_bytes().unwrap();
        for len in 0..bytes.len() {
            let error = MetaView::parse(&bytes[..len], 0, 1).unwrap_err();
            assert_eq!(error.rule(), Rule::MetaStructure, "{len}");
        }
    }

    #[test]
    fn writer_refuses_what_readers_refuse() {
        let mut meta = Meta::new();
        let rule = |r: Result<()>| r.unwrap_err().rule();
        assert_eq!(rule(meta.set("", Value::U64(0))), Rule::MetaLimits);
        assert_eq!(rule(meta.set(&"k".repeat(256), Value::U64(0))), Rule::MetaLimits);
        assert_eq!(rule(meta.set("Upper", Value::U64(0))), Rule::MetaKey);
        assert_eq!(rule(meta.set("nan", Value::F64(f64::NAN))), Rule::MetaValue);
        assert!(meta.set(&"k".repeat(255), Value::U64(0)).is_ok());
    }

    #[test]
    fn long_texts_are_deflated_on_request_and_read_as_texts() {
        let mut meta = sample();
        meta.set("long", Value::Text("words and words ".repeat(100))).unwrap();
        let plain = meta.len();
        assert_eq!(meta.min_reader(), 1);
        meta.deflate_texts();
        assert_eq!(meta.min_reader(), 2);
        assert!(meta.len() + 1400 < plain, "{} of {plain} bytes", meta.len());
        let bytes = meta.to_bytes().unwrap();
        assert_eq!(bytes.len() as u64, meta.len());
        let view = MetaView::parse(&bytes, 0, 2).unwrap();
        for (key, value) in view.iter() {
            assert_eq!(Some(&value.to_value()), meta.get(key));
        }
        // A file that says that readers of version 1 understand it has no such value.
        assert_eq!(MetaView::parse(&bytes, 0, 1).unwrap_err().rule(), Rule::MetaType);
        for len in 0..bytes.len() {
            assert!(MetaView::parse(&bytes[..len], 0, 2).is_err(), "{len}");
        }
        meta.set("long", Value::Text("short".into())).unwrap();
        assert_eq!(meta.min_reader(), 1);
    }

    #[test]
    fn short_and_incompressible_texts_stay_as_they_are() {
        let mut meta = sample();
        let mut state = 1u32;
        let mut letter = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(33 + (state >> 25) as u8 % 90)
        };
        let noise: String = (0..600).map(|_| letter()).collect();
        meta.set("noise", Value::Text(noise)).unwrap();
        meta.set("short", Value::Text("a".repeat(256))).unwrap();
        let before = meta.to_bytes().unwrap();
        meta.deflate_texts();
        assert_eq!(meta.to_bytes().unwrap(), before);
    }

    #[test]
    fn deflated_texts_have_a_limit_together() {
        let stream = &[0x03, 0x00];
        let mut parser = Parser { min_reader: 2, inflated: MAX_INFLATED_BYTES - 1 };
        assert_eq!(parser.inflate("k", 0, stream), Ok(String::new()));
        assert_eq!(parser.inflate("k", 1, stream).unwrap_err().0, Rule::MetaDeflate);
        assert_eq!(parser.inflate("k", 1, stream).unwrap_err().0, Rule::MetaLimits);
        assert_eq!(parser.inflate("k", u64::MAX, stream).unwrap_err().0, Rule::MetaLimits);
    }
}
