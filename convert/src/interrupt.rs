//! Stopping a conversion on request: the flag that Ctrl-C sets, and the error that ends the work.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the user wants to stop. Long computations look at it now and then.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Asks the work to stop. Returns whether that had been asked for before.
pub fn interrupt() -> bool {
    INTERRUPTED.swap(true, Ordering::SeqCst)
}

/// Whether the user wants to stop.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// The user has asked to stop.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    /// Before anything was worth keeping.
    #[error("interrupted; nothing was written")]
    AtOnce,
    /// With this many decoder layers finished.
    #[error(
        "interrupted; {0} finished decoder layers are kept: the same command goes on from there"
    )]
    Later(usize),
}

/// Ends the work if the user has asked to stop.
///
/// # Errors
/// [`Interrupted::AtOnce`].
pub(crate) fn check_interrupt() -> anyhow::Result<()> {
    if interrupted() { Err(Interrupted::AtOnce.into()) } else { Ok(()) }
}
