//! The keys and values of a sequence, in pages.
//!
//! A page has the keys and values of [`PAGE_TOKENS`] tokens of all layers. Sequences that begin alike share pages; a
//! sequence that appends to a shared page gets its own copy first. A page that no sequence and no prefix cache uses
//! is freed.

use std::sync::Arc;

use stb_format::ModelSpec;
use stb_kernels::kv::{KvKind, KvRows};
use stb_kernels::{Isa, Pool, cuda};

use crate::error::{Error, Result};

/// Tokens per page.
pub(crate) const PAGE_TOKENS: usize = 64;
/// Keys or values of fewer elements are appended by one thread.
const SERIAL_APPEND: usize = 1 << 15;

/// Widths of queries, keys and heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Query heads · head width.
    pub q_width: usize,
    /// KV heads · head width.
    pub kv_width: usize,
    /// Head width.
    pub width: usize,
}

impl Heads {
    /// The widths of a model with this `spec`.
    pub(crate) fn of(spec: &ModelSpec) -> Self {
        let attention = spec.block(0).attention;
        let width = attention.head_dim as usize;
        Self {
            q_width: attention.heads as usize * width,
            kv_width: attention.kv_heads as usize * width,
            width,
        }
    }

    /// Query heads that share a KV head.
    pub(crate) fn group(self) -> usize {
        self.q_width / self.kv_width
    }

    /// KV heads.
    pub(crate) fn kv_heads(self) -> usize {
        self.kv_width / self.width
    }
}

/// What a cache stores for a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShape {
    pub kind: KvKind,
    pub heads: Heads,
    pub layers: usize,
}

impl KvShape {
    /// Bytes of the keys and values of a token.
    pub(crate) fn token_bytes(self) -> usize {
        2 * self.layers * self.heads.kv_heads() * self.kind.row_bytes(self.heads.width)
    }
}

/// Keys (after RoPE) and values of one KV head.
#[derive(Clone, Debug)]
pub(crate) struct KvHead {
    pub keys: KvRows,
    pub values: KvRows,
}

/// The keys and values of some consecutive tokens, at most [`PAGE_TOKENS`].
#[derive(Debug)]
pub(crate) struct KvPage {
    /// [layer][KV head].
    heads: Vec<KvHead>,
}

impl KvPage {
    pub(crate) fn new(shape: KvShape) -> Self {
        let rows = || KvRows::with_capacity(shape.kind, shape.heads.width, PAGE_TOKENS);
        let head = |_| KvHead { keys: rows(), values: rows() };
        Self { heads: (0..shape.layers * shape.heads.kv_heads()).map(head).collect() }
    }

    /// Keeps the first `tokens` tokens.
    fn truncate(&mut self, tokens: usize) {
        for head in &mut self.heads {
            head.keys.truncate(tokens);
            head.values.truncate(tokens);
        }
    }

    /// A copy of the first `tokens` tokens.
    fn first(&self, tokens: usize) -> Self {
        let mut copy = Self { heads: self.heads.clone() };
        copy.truncate(tokens);
        copy
    }
}

/// The keys and values of one sequence.
#[derive(Debug)]
pub(crate) struct KvCache {
    shape: KvShape,
    /// Pages of the layers that the CPU computes. Tokens from `len` on, if there are any, mean nothing.
    pages: Vec<Arc<KvPage>>,
    /// The keys and values of the layers on a GPU; allocated with the first token.
    pub device: Option<cuda::KvCache>,
    len: usize,
    /// The largest number of tokens.
    limit: usize,
}

impl KvCache {
    /// An empty cache for at most `limit` tokens.
    pub(crate) fn new(shape: KvShape, limit: usize) -> Self {
        Self { shape, pages: Vec::new(), device: None, len: 0, limit }
    }

    /// The number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The largest number of tokens.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn heads(&self) -> Heads {
        self.shape.heads
    }

    /// Keeps the first `tokens` tokens. Memory is kept for the next ones.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }

    /// Bytes of the keys and values of the tokens.
    pub(crate) fn bytes(&self) -> usize {
        let device = self.device.as_ref().map_or(0, cuda::KvCache::bytes);
        self.len * self.shape.token_bytes() + device
    }

    /// Appends a full page of another sequence with the same tokens so far.
    ///
    /// # Panics
    /// If the last page of this cache is not full.
    pub(crate) fn push_page(&mut self, page: Arc<KvPage>) {
        assert!(self.len.is_multiple_of(PAGE_TOKENS), "whole pages");
        self.pages.truncate(self.len / PAGE_TOKENS);
        self.pages.push(page);
        self.len += PAGE_TOKENS;
    }

    /// Page `index`, if it is full.
    pub(crate) fn full_page(&self, index: usize) -> Option<Arc<KvPage>> {
        let is_full = (index + 1) * PAGE_TOKENS <= self.len;
        self.pages.get(index).filter(|_| is_full).map(Arc::clone)
    }

    /// Checks that `count` more tokens fit.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not.
    pub(crate) fn check_room(&self, count: usize) -> Result<()> {
        let total = self.len.saturating_add(count);
        if total > self.limit {
            return Err(Error::usage(format!(
                "{total} tokens do not fit into a context of {}; shorten the prompt or raise -c",
                self.limit
            )));
        }
        Ok(())
    }

    /// Makes the pages of the next `count` tokens ready for [`KvCache::append`]: they exist and no other sequence
    /// uses them.
    pub(crate) fn reserve(&mut self, count: usize) {
        for index in self.len / PAGE_TOKENS..(self.len + count).div_ceil(PAGE_TOKENS) {
            let used = self.len.saturating_sub(index * PAGE_TOKENS);
            let Some(page) = self.pages.get_mut(index) else {
                self.pages.push(Arc::new(KvPage::new(self.shape)));
                continue;
            };
            match Arc::get_mut(page) {
                Some(page) => page.truncate(used),
                None if used == 0 => *page = Arc::new(KvPage::new(self.shape)),
                None => *page = Arc::new(page.first(used)),
            }
        }
    }

    /// Appends the keys and values of tokens, [tokens, kv_width], in one layer.
    ///
    /// # Panics
    /// If [`KvCache::reserve`] was not called for them.
    pub(crate) fn append(&mut self, isa: Isa, pool: &Pool, layer: usize, k: &[f32], v: &[f32]) {
        let Heads { kv_width, width, .. } = self.shape.heads;
        let (mut k, mut v, mut position) = (k, v, self.len);
        while !k.is_empty() {
            let count = (PAGE_TOKENS - position % PAGE_TOKENS).min(k.len() / kv_width);
            let (these_k, these_v);
            (these_k, k) = k.split_at(count * kv_width);
            (these_v, v) = v.split_at(count * kv_width);
            let page = Arc::get_mut(&mut self.pages[position / PAGE_TOKENS]);
            let page = page.expect("a page that no other sequence uses");
            let heads = self.shape.heads.kv_heads();
            let heads = &mut page.heads[layer * heads..][..heads];
            let pool = pool.or_serial(these_k.len() >= SERIAL_APPEND);
            pool.run_chunks(heads, 1, |index, heads| {
                let rows = these_k.chunks_exact(kv_width).zip(these_v.chunks_exact(kv_width));
                for head in heads {
                    for (k, v) in rows.clone() {
                        head.keys.push(isa, &k[index * width..][..width]);
                        head.values.push(isa, &v[index * width..][..width]);
                    }
                }
            });
            position += count;
        }
    }

    /// The parts of tokens `first..end` of a KV head in a layer by page: the index of the part's first token, the
    /// keys and values of its page, and the row of the token in them. Includes tokens that are appended but not
    /// counted in [`KvCache::len`] yet.
    pub(crate) fn parts(
        &self,
        layer: usize,
        head: usize,
        first: usize,
        end: usize,
    ) -> impl Iterator<Item = KvPart<'_>> + Clone {
        let index = layer * self.shape.heads.kv_heads() + head;
        let pages = first / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS);
        pages.map(move |page| {
            let start = page * PAGE_TOKENS;
            let from = first.max(start);
            KvPart {
                head: &self.pages[page].heads[index],
                first: from - first,
                row: from - start,
                count: end.min(start + PAGE_TOKENS) - from,
            }
        })
    }

    /// Counts `count` tokens that were appended in all layers.
    pub(crate) fn advance(&mut self, count: usize) {
        self.len += count;
    }
}

/// Consecutive tokens of a KV head in one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvPart<'a> {
    pub head: &'a KvHead,
    /// Index of the first token among those asked for.
    pub first: usize,
    /// Its row in the page.
    pub row: usize,
    /// The number of tokens.
    pub count: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { q_width: 16, kv_width: 16, width: 8 };
    const SHAPE: KvShape = KvShape { kind: KvKind::F32, heads: HEADS, layers: 2 };

    /// Appends tokens whose keys and values are their numbers.
    fn append(cache: &mut KvCache, numbers: std::ops::Range<usize>) {
        cache.reserve(numbers.len());
        let rows: Vec<f32> = numbers.clone().flat_map(|n| [n as f32; 16]).collect();
        for layer in 0..2 {
            cache.append(Isa::scalar(), &Pool::serial(), layer, &rows, &rows);
        }
        cache.advance(numbers.len());
    }

    fn numbers(cache: &KvCache) -> Vec<f32> {
        let mut all = Vec::new();
        for part in cache.parts(1, 1, 0, cache.len()) {
            let mut rows = vec![0.0; part.count * HEADS.width];
            part.head.values.read(Isa::scalar(), part.row, &mut rows);
            all.extend(rows.chunks(HEADS.width).map(|row| row[0]));
        }
        all
    }

    fn counted(numbers: impl Iterator<Item = usize>) -> Vec<f32> {
        numbers.map(|n| n as f32).collect()
    }

    #[test]
    fn sequences_share_pages_until_they_append() {
        let mut first = KvCache::new(SHAPE, 1000);
        append(&mut first, 0..150);
        append(&mut first, 150..151);
        assert_eq!(numbers(&first), counted(0..151));
        assert!(first.full_page(2).is_none());
        let mut second = KvCache::new(SHAPE, 1000);
        (0..2).for_each(|i| second.push_page(first.full_page(i).unwrap()));
        append(&mut second, 900..903);
        assert_eq!(numbers(&second), counted((0..128).chain(900..903)));
        assert!(Arc::ptr_eq(&first.pages[1], &second.pages[1]));
        // Going back into a shared page copies what is kept of it.
        second.truncate(100);
        append(&mut second, 800..840);
        assert_eq!(numbers(&second), counted((0..100).chain(800..840)));
        first.truncate(0);
        append(&mut first, 500..600);
        assert_eq!(numbers(&first), counted(500..600));
        assert_eq!(numbers(&second), counted((0..100).chain(800..840)));
        assert_eq!(second.bytes(), 140 * 2 * 2 * 2 * 16 * 4);
        assert!(second.check_room(860).is_ok() && second.check_room(861).is_err());
    }

    #[test]
    fn pages_are_freed_with_their_last_user() {
        let mut cache = KvCache::new(SHAPE, 1000);
        append(&mut cache, 0..64);
        let page = cache.full_page(0).unwrap();
        let weak = Arc::downgrade(&page);
        drop(cache);
        assert!(weak.upgrade().is_some());
        drop(page);
        assert!(weak.upgrade().is_none());
    }
}
