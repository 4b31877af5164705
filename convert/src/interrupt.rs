//! Stops a conversion on request: the flag that Ctrl-C sets, and the error that ends the conversion.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set on request to stop. Long computations check it regularly.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Requests a stop. Returns whether one had been requested before.
pub fn interrupt() -> bool {
    INTERRUPTED.swap(true, Ordering::SeqCst)
}

/// Forgets a request to stop, before the next conversion of a program that goes on after one.
pub fn reset() {
    INTERRUPTED.store(false, Ordering::SeqCst);
}

/// Whether a stop has been requested.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// The conversion was stopped on request.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    /// Nothing was kept.
    #[error("interrupted; nothing was written")]
    AtOnce,
    /// Finished decoder layers are kept.
    #[error(
        "interrupted; {layers} finished decoder layers are kept: run the same command again to resume, or remove \
         the folder {} to discard them",
        folder.display()
    )]
    Later {
        /// How many.
        layers: usize,
        /// Where.
        folder: PathBuf,
    },
    /// Finished conversions of a search for a size are kept.
    #[error(
        "interrupted; {conversions} finished conversions of the search are kept: run the same command again to \
         resume, or remove the folder {} to discard them",
        folder.display()
    )]
    Searching {
        /// How many.
        conversions: usize,
        /// Where.
        folder: PathBuf,
    },
}

/// Fails if a stop has been requested.
///
/// # Errors
/// [`Interrupted::AtOnce`].
pub(crate) fn check_interrupt() -> anyhow::Result<()> {
    if interrupted() { Err(Interrupted::AtOnce.into()) } else { Ok(()) }
}
