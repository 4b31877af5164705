//! [`State`]: the position and the KV caches of one sequence.

use stb_kernels::cuda;

use crate::block::BlockScratch;
use crate::cpu::CpuScratch;
use crate::device::DeviceCache;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kv_cache::{AttentionScratch, Heads, KvCache};
use crate::rope::RopeAngles;

/// One sequence of tokens: its position, its KV caches and scratch.
#[derive(Debug)]
pub struct State {
    /// KV caches of the layers that the CPU computes.
    pub(crate) caches: Vec<KvCache>,
    /// KV cache of the layers on a GPU; allocated with the first token.
    device: Option<cuda::KvCache>,
    pub(crate) tokens: usize,
    context: usize,
    pub(crate) scratch: ForwardScratch,
    /// Logits of the last call, [vocab], or [sequences, vocab] in a batch.
    pub(crate) logits: Vec<f32>,
}

/// Reusable buffers of a forward pass.
#[derive(Debug, Default)]
pub(crate) struct ForwardScratch {
    /// The residual stream, [tokens, hidden].
    pub hidden: Vec<f32>,
    /// The residual stream after the last norm, [tokens, hidden].
    pub normed: Vec<f32>,
    /// The input of the lm_head if it is narrower than the residual stream, [tokens, embedding].
    pub projected: Vec<f32>,
    /// Logits of a batch, [tokens, vocab].
    pub logits: Vec<f32>,
    pub angles: RopeAngles,
    pub attention: AttentionScratch,
    pub block: BlockScratch<Vec<f32>>,
    pub cpu: CpuScratch,
}

impl State {
    /// An empty sequence of at most `context` tokens.
    #[must_use]
    pub fn new(engine: &Engine, context: usize) -> Self {
        let cache = KvCache::new(engine.kv, Heads::of(&engine.model.spec));
        Self {
            caches: vec![cache; engine.host_layers()],
            device: None,
            tokens: 0,
            context,
            scratch: ForwardScratch { cpu: CpuScratch::new(!engine.exact), ..Default::default() },
            logits: Vec::new(),
        }
    }

    /// The number of tokens in the KV cache.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether the sequence has no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// The largest number of tokens that the sequence may hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Drops all but the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens <= self.tokens {
            self.caches.iter_mut().for_each(|cache| cache.truncate(tokens));
            self.tokens = tokens;
        }
    }

    /// Bytes of the KV caches in use.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        let host: usize = self.caches.iter().map(KvCache::bytes).sum();
        host + self.device.as_ref().map_or(0, cuda::KvCache::bytes)
    }

    /// The part of the sequence on a device.
    pub(crate) fn device_cache(&mut self) -> DeviceCache<'_> {
        DeviceCache { cache: &mut self.device, tokens: self.tokens, limit: self.context }
    }

    /// Checks that `count` more tokens fit into the context.
    pub(crate) fn check_room(&self, count: usize) -> Result<()> {
        if self.tokens + count > self.context {
            return Err(Error::usage(format!(
                "{} tokens do not fit into a context of {}; shorten the prompt or raise -c",
                self.tokens + count,
                self.context
            )));
        }
        Ok(())
    }
}
