//! Log lines on standard error: time, level, event and fields as `key=value`.

use std::fmt::{Display, Write as _};
use std::io::Write as _;

/// One line.
pub(crate) struct LogLine(String);

impl LogLine {
    /// A line about something that happened.
    pub fn info(event: &str) -> Self {
        Self::new("INFO", event)
    }

    /// A line about something that went wrong.
    pub fn error(event: &str) -> Self {
        Self::new("ERROR", event)
    }

    fn new(level: &str, event: &str) -> Self {
        let time = chrono::Utc::now().format("%Y-%m-%dT%H:%M:%S%.3fZ");
        Self(format!("{time} {level} {event}"))
    }

    /// Adds a field. Values with spaces or control characters are quoted and escaped, so that no value can forge a
    /// line.
    pub fn field(mut self, key: &str, value: impl Display) -> Self {
        let value = value.to_string();
        let plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '=' && c != '\\';
        let _ = if !value.is_empty() && value.chars().all(plain) {
            write!(self.0, " {key}={value}")
        } else {
            write!(self.0, " {key}={value:?}")
        };
        self
    }

    /// Adds a field if there is a value.
    pub fn optional(self, key: &str, value: Option<impl Display>) -> Self {
        match value {
            Some(value) => self.field(key, value),
            None => self,
        }
    }

    /// Writes the line. Errors are ignored: nobody is left to read of them.
    pub fn write(mut self) {
        self.0.push('\n');
        let _ = std::io::stderr().lock().write_all(self.0.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_cannot_forge_lines() {
        let line =
            LogLine::info("request").field("path", "/a").field("text", "x\n2026 ERROR \"a\"").0;
        assert!(line.ends_with(r#" INFO request path=/a text="x\n2026 ERROR \"a\"""#), "{line}");
    }
}
