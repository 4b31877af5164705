//! Access to the fields of a `config.json`.

/// The fields of a `config.json`. The crate that parses JSON implements this.
pub trait ConfigFields {
    /// Whether the field is there; null counts.
    fn has(&self, name: &str) -> bool;
    /// An integer.
    fn u64(&self, name: &str) -> Option<u64>;
    /// A number.
    fn f64(&self, name: &str) -> Option<f64>;
    /// A boolean.
    fn bool(&self, name: &str) -> Option<bool>;
    /// A string.
    fn text(&self, name: &str) -> Option<String>;
    /// A list of integers.
    fn u64s(&self, name: &str) -> Option<Vec<u64>>;
    /// A list of numbers.
    fn f64s(&self, name: &str) -> Option<Vec<f64>>;
    /// A list of strings.
    fn texts(&self, name: &str) -> Option<Vec<String>>;
    /// An object; `None` if it is missing or null.
    fn object(&self, name: &str) -> Option<Box<dyn ConfigFields + '_>>;
    /// The first entry of `architectures`.
    fn class(&self) -> Option<String>;
}

/// Why a `config.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// A family or an option that this version lacks.
    Unsupported(String),
    /// A field is missing or has an impossible value.
    Invalid(String),
}
