//! A file of the collection.

use stb_format::Rule;

/// One file of the collection.
#[derive(Clone, Debug)]
pub struct Vector {
    /// The file name; for invalid files it begins with the rule.
    pub name: String,
    /// A description of what it tests.
    pub about: &'static str,
    /// The content.
    pub bytes: Vec<u8>,
    /// The rule it breaks; `None` for valid files.
    pub rule: Option<Rule>,
}

/// Invalid files in the order of the rules.
pub(super) struct VectorList(pub Vec<Vector>);

impl VectorList {
    pub fn add(&mut self, rule: Rule, name: &str, about: &'static str, bytes: Vec<u8>) {
        let name = format!("{}-{name}.stb", rule.id().trim_start_matches("STB-"));
        self.0.push(Vector { name, about, bytes, rule: Some(rule) });
    }
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
