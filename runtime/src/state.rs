//! One sequence of tokens: its position and its KV caches.

use stb_kernels::cuda;

use crate::block::BlockScratch;
use crate::cpu::CpuScratch;
use crate::device::DeviceCache;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kv_cache::{AttentionScratch, Heads, KvCache};
use crate::rope::RopeAngles;

/// One sequence: its position, its KV caches and reusable memory.
#[derive(Debug)]
pub struct State {
    /// Of the layers that the CPU computes.
    pub(crate) caches: Vec<KvCache>,
    /// Of the layers on a GPU, once there is a token.
    device: Option<cuda::KvCache>,
    pub(crate) tokens: usize,
    context: usize,
    pub(crate) scratch: ForwardScratch,
    /// [vocab], or [tokens, vocab].
    pub(crate) logits: Vec<f32>,
}

/// Reusable memory of a forward pass.
#[derive(Debug, Default)]
pub(crate) struct ForwardScratch {
    /// The residual stream, [tokens, hidden].
    pub hidden: Vec<f32>,
    /// The residual stream behind the last norm, [tokens, hidden].
    pub normed: Vec<f32>,
    /// [tokens, vocab].
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

    /// Tokens so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// The most tokens it may hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Forgets all but the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens <= self.tokens {
            self.caches.iter_mut().for_each(|cache| cache.truncate(tokens));
            self.tokens = tokens;
        }
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        let host: usize = self.caches.iter().map(KvCache::bytes).sum();
        host + self.device.as_ref().map_or(0, cuda::KvCache::bytes)
    }

    /// Its part on a device.
    pub(crate) fn device_cache(&mut self) -> DeviceCache<'_> {
        DeviceCache { cache: &mut self.device, tokens: self.tokens, limit: self.context }
    }

    /// Whether `count` more tokens fit.
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
