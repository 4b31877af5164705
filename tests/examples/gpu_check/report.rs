//! The printed and written results.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

/// The number of wrong results of one kernel that are printed. The JSON has all of them.
const PRINTED: usize = 3;

/// Figures by name, kept in a file.
pub(crate) struct Report {
    pub json: Map<String, Value>,
    /// Failures of this process.
    pub failures: usize,
    file: PathBuf,
    wrong: HashMap<String, usize>,
}

impl Report {
    /// An empty report.
    pub(crate) fn new(file: &Path) -> Self {
        let (json, wrong) = (Map::new(), HashMap::new());
        Self { json, failures: 0, file: file.to_owned(), wrong }
    }

    /// The report in a file, if it exists; failures are those of the process that wrote it.
    pub(crate) fn open(file: &Path) -> anyhow::Result<Self> {
        let name = || file.display().to_string();
        let mut report = Self::new(file);
        let text = match std::fs::read_to_string(file) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(report),
            text => text.with_context(name)?,
        };
        report.json = serde_json::from_str(&text).with_context(name)?;
        report.failures = match report.json.remove("failures of the last part") {
            Some(count) => count.as_u64().unwrap_or(0) as usize,
            None => 0,
        };
        Ok(report)
    }

    pub(crate) fn line(&self, text: &str) {
        // The run continues if the pipe is closed, because the file is still written.
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// Reports a result that is not within its tolerance.
    pub(crate) fn wrong(&mut self, kernel: &str, text: &str) {
        self.failures += 1;
        let count = self.wrong.entry(kernel.to_owned()).or_default();
        *count += 1;
        match *count {
            0..=PRINTED => self.line(&format!("  WRONG: {kernel}, {text}")),
            n if n == PRINTED + 1 => self.line(&format!("  WRONG: {kernel}, more (in the JSON)")),
            _ => {}
        }
    }

    /// Adds a figure and writes the file.
    pub(crate) fn put(&mut self, key: &str, value: Value) -> anyhow::Result<()> {
        self.json.insert(key.to_owned(), value);
        self.save()
    }

    /// Writes the file anew.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        let mut json = self.json.clone();
        if self.failures > 0 {
            json.insert("failures of the last part".into(), self.failures.into());
        }
        let text = serde_json::to_string_pretty(&Value::Object(json))?;
        // The rename is atomic, because this process may be killed.
        let mut new = self.file.clone().into_os_string();
        new.push(".new");
        std::fs::write(&new, text + "\n")
            .and_then(|()| std::fs::rename(&new, &self.file))
            .with_context(|| self.file.display().to_string())
    }
}
