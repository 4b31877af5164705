//! Typed access to metadata keys.

use crate::error::{Error, Result, Rule};
use crate::meta::{MetaView, Value, ValueRef};

/// STB-R-061.
pub(super) fn unknown(key: &str, value: &str) -> Error {
    Error::new(
        Rule::ModelArchitecture,
        format!("{key} is {value:?}, which this reader does not support"),
    )
}

/// Typed access to required keys (STB-R-060).
pub(super) struct Keys<'m, 'a>(pub &'m MetaView<'a>);

impl<'m> Keys<'m, '_> {
    fn required(&self, key: &str, kind: &str) -> Result<ValueRef<'m>> {
        self.0.get(key).ok_or_else(|| {
            Error::new(Rule::ModelKey, format!("key {key} is missing, {kind} expected"))
        })
    }

    fn wrong<T>(key: &str, kind: &str) -> Result<T> {
        Err(Error::new(Rule::ModelKey, format!("key {key} does not hold {kind}")))
    }

    pub fn text(&self, key: &str) -> Result<&'m str> {
        match self.required(key, "text")? {
            ValueRef::Text(v) => Ok(v),
            _ => Self::wrong(key, "text"),
        }
    }

    pub fn u64(&self, key: &str) -> Result<u64> {
        match self.required(key, "an integer")? {
            ValueRef::U64(v) => Ok(v),
            _ => Self::wrong(key, "an integer"),
        }
    }

    pub fn f64(&self, key: &str) -> Result<f64> {
        match self.required(key, "a number")? {
            ValueRef::F64(v) => Ok(v),
            _ => Self::wrong(key, "a number"),
        }
    }

    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.required(key, "a truth value")? {
            ValueRef::Bool(v) => Ok(v),
            _ => Self::wrong(key, "a truth value"),
        }
    }

    pub fn list(&self, key: &str) -> Result<Vec<u64>> {
        match self.required(key, "a list of integers")?.to_value() {
            Value::U64List(v) => Ok(v),
            _ => Self::wrong(key, "a list of integers"),
        }
    }

    /// Whether `key` is present.
    pub fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    /// The value that `read` finds under `key`; `None` without the key.
    pub fn optional<T>(&self, key: &str, read: fn(&Self, &str) -> Result<T>) -> Result<Option<T>> {
        if self.has(key) { read(self, key).map(Some) } else { Ok(None) }
    }
}
