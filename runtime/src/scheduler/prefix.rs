//! [`PrefixCache`]: pages of prompts, kept for later prompts with the same start.
//!
//! Only pages of prefill rows are kept. A row of a prompt that is not short is a prefill row whatever computed it,
//! so a hit gives the bits that a miss gives.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use crate::kv_cache::KvPage;

/// The number of a page in the cache; [`NO_PAGE`] before the first page of a prompt.
pub(super) type PageId = u64;

/// What precedes the first page of a prompt.
pub(super) const NO_PAGE: PageId = 0;

/// Pages of prompts by their tokens and the pages before them. The least recently used ones go first.
pub(super) struct PrefixCache {
    limit: usize,
    page_bytes: usize,
    /// By the page before, by tokens.
    children: HashMap<PageId, HashMap<Box<[u32]>, PageId>>,
    pages: HashMap<PageId, Entry>,
    last_id: PageId,
    clock: u64,
}

struct Entry {
    page: Arc<KvPage>,
    tokens: Box<[u32]>,
    parent: PageId,
    depth: usize,
    used: u64,
}

impl PrefixCache {
    /// An empty cache of at most `limit` bytes.
    pub(super) fn new(limit: usize, page_bytes: usize) -> Self {
        let (children, pages) = (HashMap::new(), HashMap::new());
        Self { limit, page_bytes, children, pages, last_id: NO_PAGE, clock: 0 }
    }

    /// Bytes of the pages.
    pub(super) fn bytes(&self) -> usize {
        self.pages.len() * self.page_bytes
    }

    /// The page with `tokens` after page `parent`.
    pub(super) fn find(&mut self, parent: PageId, tokens: &[u32]) -> Option<(PageId, Arc<KvPage>)> {
        let id = *self.children.get(&parent)?.get(tokens)?;
        self.touch(id);
        self.pages.get(&id).map(|entry| (id, Arc::clone(&entry.page)))
    }

    /// Keeps a page, unless there is one with the same tokens after page `parent`. Returns its number, or that of a
    /// page that is not kept if the cache is too small.
    pub(super) fn insert(&mut self, parent: PageId, tokens: &[u32], page: &Arc<KvPage>) -> PageId {
        if let Some((id, _)) = self.find(parent, tokens) {
            return id;
        }
        self.last_id += 1;
        let id = self.last_id;
        // The page before may have been removed; nothing finds a page after it.
        let before = self.pages.get(&parent).map(|entry| entry.depth);
        if self.page_bytes > self.limit || (parent != NO_PAGE && before.is_none()) {
            return id;
        }
        let tokens: Box<[u32]> = tokens.into();
        self.children.entry(parent).or_default().insert(tokens.clone(), id);
        let depth = before.unwrap_or(0) + 1;
        let entry = Entry { page: Arc::clone(page), tokens, parent, depth, used: 0 };
        self.pages.insert(id, entry);
        self.touch(id);
        while self.bytes() > self.limit {
            self.remove_oldest();
        }
        id
    }

    /// Marks a page and those before it as used now, so that a page is never older than those after it.
    fn touch(&mut self, id: PageId) {
        self.clock += 1;
        let mut next = id;
        while let Some(entry) = self.pages.get_mut(&next) {
            entry.used = self.clock;
            next = entry.parent;
        }
    }

    /// Removes the least recently used page, the last of its prompt.
    fn remove_oldest(&mut self) {
        let age = |(id, entry): (&PageId, &Entry)| (entry.used, Reverse(entry.depth), *id);
        let Some((_, _, id)) = self.pages.iter().map(age).min() else { return };
        let Some(entry) = self.pages.remove(&id) else { return };
        if let Some(siblings) = self.children.get_mut(&entry.parent) {
            siblings.remove(&entry.tokens);
            if siblings.is_empty() {
                self.children.remove(&entry.parent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use stb_kernels::kv::KvKind;

    use super::*;
    use crate::kv_cache::{Heads, KvShape};

    fn page() -> Arc<KvPage> {
        let heads = Heads { q_width: 8, kv_width: 8, width: 8 };
        Arc::new(KvPage::new(KvShape { kind: KvKind::F32, heads, layers: 1 }))
    }

    #[test]
    fn the_least_recently_used_pages_go_first_and_the_last_of_a_prompt_before_the_others() {
        let mut cache = PrefixCache::new(30, 10);
        let a = cache.insert(NO_PAGE, &[1, 2], &page());
        let b = cache.insert(a, &[3, 4], &page());
        let c = cache.insert(NO_PAGE, &[9, 9], &page());
        assert_eq!(cache.insert(a, &[3, 4], &page()), b);
        assert_eq!(cache.bytes(), 30);
        assert_eq!(cache.find(NO_PAGE, &[1, 2]).unwrap().0, a);
        assert!(cache.find(NO_PAGE, &[3, 4]).is_none() && cache.find(b, &[3, 4]).is_none());
        // `c` is the oldest now, then `b`, which comes after `a`.
        cache.insert(b, &[5, 6], &page());
        assert_eq!(cache.bytes(), 30);
        assert!(cache.find(NO_PAGE, &[9, 9]).is_none());
        let d = cache.insert(NO_PAGE, &[7, 7], &page());
        assert!(cache.find(b, &[5, 6]).is_none());
        assert!(cache.find(a, &[3, 4]).is_some() && cache.find(NO_PAGE, &[7, 7]).is_some());
        assert!(d > c);
        // A page after one that was removed is not kept.
        cache.insert(c, &[1, 1], &page());
        assert_eq!(cache.bytes(), 30);
    }

    #[test]
    fn a_cache_without_room_keeps_nothing() {
        let mut cache = PrefixCache::new(9, 10);
        let a = cache.insert(NO_PAGE, &[1], &page());
        assert!(a != NO_PAGE && cache.find(NO_PAGE, &[1]).is_none());
        assert_eq!(cache.bytes(), 0);
    }
}
