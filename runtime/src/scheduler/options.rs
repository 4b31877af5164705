//! Options of a scheduler.

/// Options of a [`Scheduler`](super::Scheduler).
#[derive(Clone, Copy, Debug)]
pub struct SchedulerOptions {
    /// Sequences that are computed together.
    pub slots: usize,
    /// The largest number of tokens of a sequence; `None` for the context length of the model.
    pub context: Option<usize>,
    /// Jobs that may wait for a slot.
    pub max_queue: usize,
    /// Bytes of keys and values of prompts that are kept for later prompts with the same start.
    pub prefix_cache_bytes: usize,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self { slots: 8, context: None, max_queue: 64, prefix_cache_bytes: 256 << 20 }
    }
}
