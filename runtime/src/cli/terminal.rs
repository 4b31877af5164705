//! Ctrl-C, broken pipes, control characters and memory figures.

use std::io::{IsTerminal, Write};
use std::sync::LazyLock;

use stb_runtime::CancelToken;

static CANCEL: LazyLock<CancelToken> = LazyLock::new(CancelToken::default);

/// What Ctrl-C cancels.
pub(crate) fn cancel_token() -> &'static CancelToken {
    &CANCEL
}

/// Turns Ctrl-C into a cancellation. A second one before the first is noticed ends the program.
pub(crate) fn catch_interrupts() {
    let handler = || {
        if CANCEL.cancel() {
            std::process::exit(130);
        }
    };
    // Without a handler Ctrl-C simply ends the program.
    let _ = ctrlc::set_handler(handler);
}

/// Whether Ctrl-C was pressed.
pub(crate) fn interrupted() -> bool {
    CANCEL.is_canceled()
}

/// Whether the error says that nobody reads our output any more.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Writes model text to standard output at once. On a terminal, control characters other than
/// line breaks and tabs are shown as �: a model must not move the cursor or change the title.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
        out.write_all(text.chars().map(shown).collect::<String>().as_bytes())?;
    } else {
        out.write_all(text.as_bytes())?;
    }
    out.flush()
}

/// The peak memory of this process in bytes; `None` on systems other than Linux.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Writes a line to standard output.
pub(crate) fn line(text: impl std::fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")
}

/// Writes a line to standard error. If nobody can read it, nothing is lost.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
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
