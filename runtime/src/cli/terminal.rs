//! Output to the terminal, Ctrl-C, and memory figures.

use std::io::{IsTerminal, Write};
use std::sync::LazyLock;

use stb_runtime::CancelToken;

static CANCEL: LazyLock<CancelToken> = LazyLock::new(CancelToken::default);

/// The token that Ctrl-C cancels.
pub(crate) fn cancel_token() -> &'static CancelToken {
    &CANCEL
}

/// Makes Ctrl-C cancel [`cancel_token`]. A second Ctrl-C before the token is reset ends the program.
pub(crate) fn catch_interrupts() {
    let handler = || {
        if CANCEL.cancel() {
            std::process::exit(130);
        }
    };
    // If no handler can be set, Ctrl-C ends the program.
    let _ = ctrlc::set_handler(handler);
}

/// Whether Ctrl-C was pressed.
pub(crate) fn interrupted() -> bool {
    CANCEL.is_canceled()
}

/// Whether the error is a closed output pipe.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Writes model text to standard output and flushes it. On a terminal, control characters other than
/// line breaks and tabs are shown as �, so that a model cannot move the cursor or change the title.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        out.write_all(harmless(text).as_bytes())?;
    } else {
        out.write_all(text.as_bytes())?;
    }
    out.flush()
}

/// The text with � for control characters.
fn harmless(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

/// The peak memory of this process in bytes; `None` on systems other than Linux.
pub(crate) fn peak_memory() -> Option<u64> {
    status("VmHWM:")
}

/// The memory of this process in bytes; `None` on systems other than Linux.
pub(crate) fn memory() -> Option<u64> {
    status("VmRSS:")
}

fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(name))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Writes a line to standard output.
pub(crate) fn line(text: impl std::fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")
}

/// Writes a line to standard error, ignoring errors. Like [`print()`], it shows no control characters on a terminal:
/// names in files may have them.
pub(crate) fn note(text: impl std::fmt::Display) {
    let mut err = std::io::stderr().lock();
    let text = text.to_string();
    let text = if err.is_terminal() { harmless(&text) } else { text };
    let _ = writeln!(err, "{text}");
}

/// A number of bytes with a unit.
pub(crate) fn bytes(n: u64) -> String {
    let (value, unit) = match n {
        0..10_000 => return format!("{n} B"),
        10_000..10_000_000 => (n as f64 / 1e3, "kB"),
        10_000_000..10_000_000_000 => (n as f64 / 1e6, "MB"),
        _ => (n as f64 / 1e9, "GB"),
    };
    format!("{value:.1} {unit}")
}
