//! Work that takes time: without the GIL, and so that Ctrl-C and the callbacks of the user can end it.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;

/// How often a waiting thread looks for signals.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// Runs `work` on a thread of its own. The calling thread gives its messages to `hear`, with the GIL, and looks for
/// signals. After the first exception of these it calls `stop`, waits for the end of the work, and returns the
/// exception beside the result.
pub(crate) fn run<M: Send, T: Send>(
    py: Python<'_>,
    stop: impl Fn() + Send + Sync,
    mut hear: impl FnMut(Python<'_>, M) -> PyResult<()> + Send,
    work: impl FnOnce(Sender<M>) -> T + Send,
) -> (T, PyResult<()>) {
    py.detach(|| {
        std::thread::scope(|scope| {
            let (sender, messages) = channel();
            let worker = scope.spawn(|| work(sender));
            let mut outcome = Ok(());
            loop {
                let message = match messages.recv_timeout(TICK) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
                if outcome.is_err() {
                    continue;
                }
                outcome = Python::attach(|py| {
                    message.map_or(Ok(()), |message| hear(py, message))?;
                    py.check_signals()
                });
                if outcome.is_err() {
                    stop();
                }
            }
            match worker.join() {
                Ok(result) => (result, outcome),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    })
}

/// Locks a mutex that another thread may hold for long. Signals end the wait.
pub(crate) fn lock<'m>(py: Python<'_>, mutex: &'m Mutex<()>) -> PyResult<MutexGuard<'m, ()>> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Ok(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => {
                py.detach(|| std::thread::sleep(TICK));
                py.check_signals()?;
            }
        }
    }
}

/// Locks a mutex that is held for moments. A panic of another holder leaves nothing half done.
pub(crate) fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A Rayon pool of `threads` threads.
pub(crate) fn pool(threads: usize) -> Result<rayon::ThreadPool, stb_runtime::Error> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
        stb_runtime::Error::usage(format!("cannot start {threads} threads: {e}; try fewer"))
    })
}
