//! Counts and sizes of a scheduler.

/// Counts since the start, and what is in use now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Sequences that can be computed together.
    pub slots: usize,
    /// Sequences that are being computed.
    pub busy: usize,
    /// Jobs that wait for a slot.
    pub queued: usize,
    /// Answers that were completed.
    pub completed: u64,
    /// Answers whose client went away.
    pub canceled: u64,
    /// Answers that failed.
    pub failed: u64,
    /// Prompt tokens computed.
    pub prefilled_tokens: u64,
    /// Prompt tokens taken from the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub decoded_tokens: u64,
    /// Passes over the weights.
    pub passes: u64,
    /// Answers whose prompt began with a prefix in the cache.
    pub prefix_hits: u64,
    /// Answers whose prompt did not.
    pub prefix_misses: u64,
    /// Bytes of keys and values of the running sequences.
    pub sequence_bytes: usize,
    /// Bytes of keys and values in the prefix cache; those that running sequences use count in both.
    pub prefix_bytes: usize,
}

impl Statistics {
    pub(super) fn new(slots: usize) -> Self {
        Self { slots, ..Self::default() }
    }
}
