//! [`Slot`]: a sequence that a scheduler computes.

use super::job::EmbeddingSink;
use super::prefix::{NO_PAGE, PageId, PrefixCache};
use super::reply::Reply;
use crate::engine::Engine;
use crate::kv_cache::{KvCache, PAGE_TOKENS};
use crate::linear::RowKind;
use crate::pass::{OutputKind, Segment};

/// What a sequence is computed for.
pub(super) enum Purpose<'t> {
    Answer(Box<Reply<'t>>),
    /// The mean of hidden states.
    Embedding {
        /// Their sum so far, [hidden].
        sum: Vec<f64>,
        sink: EmbeddingSink,
    },
}

/// A sequence in progress.
pub(super) struct Slot<'t> {
    /// The number of the job.
    pub id: u64,
    pub purpose: Purpose<'t>,
    prompt: Vec<u32>,
    /// The role of the prompt's rows.
    kind: RowKind,
    cache: KvCache,
    /// The token that comes next, once the prompt is computed.
    next: Option<[u32; 1]>,
    /// The tokens of the sequence that the next pass computes.
    planned: usize,
    /// The last page in the prefix cache, and the number of pages up to it.
    prefix: (PageId, usize),
    /// Prompt tokens that came from the prefix cache.
    pub cached: usize,
}

impl<'t> Slot<'t> {
    pub(super) fn new(
        id: u64,
        engine: &Engine,
        context: usize,
        prompt: Vec<u32>,
        purpose: Purpose<'t>,
    ) -> Self {
        Self {
            id,
            purpose,
            kind: RowKind::of_prompt(prompt.len()),
            prompt,
            cache: KvCache::new(engine.kv_shape(), context),
            next: None,
            planned: 0,
            prefix: (NO_PAGE, 0),
            cached: 0,
        }
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.next.is_some()
    }

    /// Whether the next token fits into the context.
    pub(super) fn has_room(&self) -> bool {
        self.cache.len() < self.cache.limit()
    }

    pub(super) fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// The tokens that the planned pass computes.
    pub(super) fn planned(&self) -> usize {
        self.planned
    }

    /// Whether the prompt has been computed.
    pub(super) fn is_prefilled(&self) -> bool {
        self.cache.len() >= self.prompt.len()
    }

    /// Continues the sequence with `token`.
    pub(super) fn continue_with(&mut self, token: u32) {
        self.next = Some([token]);
    }

    /// Plans the next pass: one token, or up to `budget` tokens of the prompt, which `prefix` may shorten.
    pub(super) fn plan(&mut self, budget: usize, prefix: &mut PrefixCache) {
        self.planned = 1;
        if self.next.is_none() {
            self.reuse(prefix);
            self.planned = budget.min(self.prompt.len() - self.cache.len());
        }
    }

    /// Takes the next pages of the prompt from the prefix cache. The last token is always computed, because its
    /// logits are needed, and an embedding needs all tokens.
    fn reuse(&mut self, prefix: &mut PrefixCache) {
        if self.kind != RowKind::Prefill || matches!(self.purpose, Purpose::Embedding { .. }) {
            return;
        }
        while self.cache.len() == self.prefix.1 * PAGE_TOKENS
            && let Some(tokens) = self.prompt.get(self.cache.len()..self.cache.len() + PAGE_TOKENS)
            && self.cache.len() + PAGE_TOKENS < self.prompt.len()
            && let Some((id, page)) = prefix.find(self.prefix.0, tokens)
        {
            self.cache.push_page(page);
            self.prefix = (id, self.prefix.1 + 1);
            self.cached += PAGE_TOKENS;
        }
    }

    /// Gives the pages of the prompt that are full to the prefix cache.
    pub(super) fn share(&mut self, prefix: &mut PrefixCache) {
        if self.kind != RowKind::Prefill {
            return;
        }
        while let (id, count) = self.prefix
            && let Some(tokens) = self.prompt.get(count * PAGE_TOKENS..(count + 1) * PAGE_TOKENS)
            && let Some(page) = self.cache.full_page(count)
        {
            self.prefix = (prefix.insert(id, tokens, &page), count + 1);
        }
    }

    /// The planned tokens as a part of a pass. `index` is the index of the slot.
    pub(super) fn segment(&mut self, index: usize) -> Segment<'_> {
        let Self { purpose, prompt, kind, cache, next, planned, .. } = self;
        if let Some(token) = next {
            return Segment::new(index, cache, token, RowKind::Decode, OutputKind::LastLogits);
        }
        let tokens = &prompt[cache.len()..cache.len() + *planned];
        let is_last = cache.len() + *planned == prompt.len();
        let output = match purpose {
            Purpose::Embedding { .. } => OutputKind::Hidden,
            Purpose::Answer(_) if is_last => OutputKind::LastLogits,
            Purpose::Answer(_) => OutputKind::CacheOnly,
        };
        Segment::new(index, cache, tokens, *kind, output)
    }
}
