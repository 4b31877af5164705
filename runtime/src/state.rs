//! [`State`]: one sequence of tokens.

use crate::engine::Engine;
use crate::kv_cache::{Heads, KvCache, KvShape};

/// One sequence of tokens: the keys and values of its tokens.
#[derive(Debug)]
pub struct State {
    pub(crate) cache: KvCache,
    /// Logits of the last call, [vocab], or [sequences, vocab] in a batch.
    pub(crate) logits: Vec<f32>,
}

impl Engine {
    /// What a KV cache stores for the layers that the CPU computes.
    pub(crate) fn kv_shape(&self) -> KvShape {
        KvShape { kind: self.kv, heads: Heads::of(&self.model.spec), layers: self.host_layers() }
    }
}

impl State {
    /// An empty sequence of at most `context` tokens.
    #[must_use]
    pub fn new(engine: &Engine, context: usize) -> Self {
        Self { cache: KvCache::new(engine.kv_shape(), context), logits: Vec::new() }
    }

    /// The number of tokens in the KV cache.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether the sequence has no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cache.len() == 0
    }

    /// The largest number of tokens that the sequence may hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.cache.limit()
    }

    /// Drops all but the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.cache.truncate(tokens);
    }

    /// Bytes of the KV caches in use.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }
}
