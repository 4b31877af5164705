//! The bounded queue of a scheduler.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

use super::job::{EmbeddingSink, EventSink, Job, SubmitError, Ticket};

/// What a client asks for.
pub(super) enum Work {
    Answer(Box<Job>, EventSink),
    Embedding(Vec<u32>, EmbeddingSink),
}

/// How a scheduler ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Closing {
    /// Running answers are completed.
    AfterRunning,
    /// Running answers are canceled.
    AtOnce,
}

/// Jobs that wait for a slot, first in first out.
pub(super) struct Queue {
    limit: usize,
    state: Mutex<QueueState>,
    changed: Condvar,
}

struct QueueState {
    work: VecDeque<(u64, Work)>,
    /// Jobs whose clients have gone and that may be running.
    canceled: Vec<u64>,
    submitted: u64,
    closing: Option<Closing>,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Self {
        let state =
            QueueState { work: VecDeque::new(), canceled: Vec::new(), submitted: 0, closing: None };
        Self { limit, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn len(&self) -> usize {
        self.lock().work.len()
    }

    pub(super) fn push(&self, work: Work) -> Result<Ticket, SubmitError> {
        let mut state = self.lock();
        if state.closing.is_some() {
            return Err(SubmitError::Closed);
        }
        if state.work.len() >= self.limit.max(1) {
            return Err(SubmitError::Busy);
        }
        state.submitted += 1;
        let id = state.submitted;
        state.work.push_back((id, work));
        self.changed.notify_one();
        Ok(Ticket { id })
    }

    /// Removes a waiting job, or notes that a running one is canceled.
    pub(super) fn cancel(&self, ticket: Ticket) {
        let mut state = self.lock();
        let waiting = state.work.len();
        // Sinks are dropped without the lock.
        let removed = state.work.iter().position(|(id, _)| *id == ticket.id);
        let removed = removed.and_then(|index| state.work.remove(index));
        if state.work.len() == waiting {
            state.canceled.push(ticket.id);
        }
        drop((state, removed));
    }

    /// The jobs that were canceled since the last call. Some may have ended.
    pub(super) fn take_canceled(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().canceled)
    }

    /// The next job with its number, if there is one.
    pub(super) fn take(&self) -> Option<(u64, Work)> {
        self.lock().work.pop_front()
    }

    /// Waits until there is a job or the queue is closed.
    pub(super) fn wait(&self) {
        let mut state = self.lock();
        while state.work.is_empty() && state.closing.is_none() {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Accepts no more jobs.
    pub(super) fn close(&self, how: Closing) {
        let mut state = self.lock();
        state.closing = state.closing.max(Some(how));
        self.changed.notify_one();
    }

    pub(super) fn closing(&self) -> Option<Closing> {
        self.lock().closing
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("limit", &self.limit).finish_non_exhaustive()
    }
}
