//! Causal attention over cached keys and values.

use std::cell::RefCell;

use stb_format::ModelSpec;
use stb_format::arch::Attention;
use stb_kernels::kv::{KvKind, KvRows, mix, scores};
use stb_kernels::{Isa, Panels, Pool, dense, gemm, ops};

/// Queries per GEMM over the keys.
const QUERY_BLOCK: usize = 64;
/// The smallest number of tokens for which attention uses GEMM.
const GEMM_MIN_TOKENS: usize = 4;
/// Keys or values of a head that fit into the cache while all queries of the head use them.
const CACHED_KEYS: usize = 256;
/// Below this many values, one thread copies the output.
const SERIAL_COPY: usize = 1 << 16;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 15;

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

/// How a layer computes attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionSettings {
    /// The factor of scores.
    scale: f32,
    /// The number of tokens that a token attends to, itself included.
    window: usize,
    /// The soft cap of scores.
    soft_cap: Option<f32>,
}

impl AttentionSettings {
    /// The settings of `attention`.
    pub(crate) fn new(attention: &Attention) -> Self {
        Self {
            scale: attention.scale as f32,
            window: attention.window.map_or(usize::MAX, |window| window as usize),
            soft_cap: attention.soft_cap.map(|cap| cap as f32),
        }
    }

    /// The first key that the query of `position` attends to.
    fn first_key(self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// Turns scores into weights.
    fn weigh(self, isa: Isa, scores: &mut [f32]) {
        if let Some(cap) = self.soft_cap {
            ops::soft_cap(isa, cap, scores);
        }
        ops::softmax(isa, scores);
    }
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
    fn group(self) -> usize {
        self.q_width / self.kv_width
    }
}

/// Queries, keys and values of a batch of tokens after RoPE, and the attention output.
#[derive(Debug)]
pub(crate) struct QkvRows<'a> {
    /// Queries, [tokens, q_width].
    pub q: &'a [f32],
    /// Keys, [tokens, kv_width].
    pub k: &'a [f32],
    /// Values, [tokens, kv_width].
    pub v: &'a [f32],
    /// Attention output, [tokens, q_width].
    pub out: &'a mut [f32],
}

/// The KV cache of one decoder layer.
#[derive(Clone, Debug)]
pub(crate) struct KvCache {
    heads: Heads,
    /// One entry per KV head.
    by_head: Vec<KvHead>,
}

/// Keys (after RoPE) and values of one KV head.
#[derive(Clone, Debug)]
struct KvHead {
    keys: KvRows,
    values: KvRows,
    /// Borrowed from [`AttentionScratch`] during [`KvCache::attend`], else empty.
    scratch: HeadScratch,
}

/// Reusable buffers for the attention of one layer at a time, by KV head.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttentionScratch(Vec<HeadScratch>);

/// Reusable buffers for the query heads of one KV head.
#[derive(Clone, Debug, Default)]
struct HeadScratch {
    /// Queries: of one token, [group, padded width], or of a block, [block, width].
    queries: Vec<f32>,
    /// Attention scores: of one token, [group, keys], or of a block, [block, padded keys].
    scores: Vec<f32>,
    /// Padded attention output of one token or block.
    attn_out: Vec<f32>,
    /// Attention output of all tokens, [tokens, group · width].
    out: Vec<f32>,
}

/// Keys and values of one KV head, packed for GEMM.
#[derive(Default)]
struct HeadPanels {
    /// The decoded keys or values, [tokens, width].
    decoded: Vec<f32>,
    keys: Panels,
    values: Panels,
}

thread_local! {
    /// The panels of the head that the thread computes.
    static HEAD_PANELS: RefCell<HeadPanels> = RefCell::default();
}

impl KvCache {
    pub(crate) fn new(kind: KvKind, heads: Heads) -> Self {
        let rows = || KvRows::new(kind, heads.width);
        let head = || KvHead { keys: rows(), values: rows(), scratch: HeadScratch::default() };
        Self { heads, by_head: (0..heads.kv_width / heads.width).map(|_| head()).collect() }
    }

    pub(crate) fn truncate(&mut self, tokens: usize) {
        for head in &mut self.by_head {
            head.keys.truncate(tokens);
            head.values.truncate(tokens);
        }
    }

    /// Bytes of the keys and values.
    pub(crate) fn bytes(&self) -> usize {
        self.by_head.iter().map(|head| head.keys.bytes() + head.values.bytes()).sum()
    }

    /// Appends the keys and values of a batch of tokens and computes causal attention of their queries
    /// over all cached tokens.
    pub(crate) fn attend(
        &mut self,
        isa: Isa,
        pool: &Pool,
        scratch: &mut AttentionScratch,
        settings: AttentionSettings,
        x: QkvRows<'_>,
    ) {
        let QkvRows { q, k, v, out } = x;
        self.swap_scratch(scratch);
        let heads = self.heads;
        let tokens = q.len() / heads.q_width;
        let seen = self.by_head.first().map_or(0, |head| head.keys.len()) + tokens;
        let pool = pool.or_serial(q.len() * seen >= SERIAL_WORK);
        pool.run_chunks(&mut self.by_head, 1, |index, head| {
            for head in head {
                head.append(isa, heads, index, k, v);
                head.attend(isa, heads, settings, index, q);
            }
        });
        let group_width = heads.group() * heads.width;
        let by_head = &self.by_head;
        pool.or_serial(q.len() >= SERIAL_COPY).run_chunks(out, heads.q_width, |first, out| {
            let t = first / heads.q_width;
            for (out, head) in out.chunks_exact_mut(group_width).zip(by_head) {
                out.copy_from_slice(&head.scratch.out[t * group_width..][..group_width]);
            }
        });
        self.swap_scratch(scratch);
    }

    /// Moves the buffers of `scratch` into the heads, or back.
    fn swap_scratch(&mut self, scratch: &mut AttentionScratch) {
        scratch.0.resize_with(self.by_head.len().max(scratch.0.len()), HeadScratch::default);
        for (head, buffers) in self.by_head.iter_mut().zip(&mut scratch.0) {
            std::mem::swap(&mut head.scratch, buffers);
        }
    }
}

/// The queries of the heads that share a KV head.
#[derive(Clone, Copy)]
struct QueryHeads<'a> {
    heads: Heads,
    settings: AttentionSettings,
    /// The index of the KV head.
    index: usize,
    /// Queries of all heads, [tokens, q_width].
    q: &'a [f32],
}

impl KvHead {
    fn append(&mut self, isa: Isa, heads: Heads, index: usize, k: &[f32], v: &[f32]) {
        let part = index * heads.width..(index + 1) * heads.width;
        for (k, v) in k.chunks_exact(heads.kv_width).zip(v.chunks_exact(heads.kv_width)) {
            self.keys.push(isa, &k[part.clone()]);
            self.values.push(isa, &v[part.clone()]);
        }
    }

    fn attend(
        &mut self,
        isa: Isa,
        heads: Heads,
        settings: AttentionSettings,
        index: usize,
        q: &[f32],
    ) {
        let query = QueryHeads { heads, settings, index, q };
        let tokens = q.len() / heads.q_width;
        self.scratch.out.clear();
        self.scratch.out.resize(tokens * heads.group() * heads.width, 0.0);
        if tokens < GEMM_MIN_TOKENS {
            for token in 0..tokens {
                self.attend_token(isa, query, token);
            }
        } else {
            HEAD_PANELS.with_borrow_mut(|panels| self.attend_batch(isa, query, panels));
        }
    }

    /// Attention of one token of `q`: scores, softmax, weighted sum of the values. All query heads of
    /// the group use a block of keys or values while it is in cache.
    fn attend_token(&mut self, isa: Isa, query: QueryHeads<'_>, token: usize) {
        let QueryHeads { heads, settings, index, q } = query;
        let Self { keys, values, scratch } = self;
        let HeadScratch { queries, scores: score_rows, attn_out, out } = scratch;
        let (group, width, padded) = (heads.group(), heads.width, keys.padded_width());
        let end = keys.len() - (q.len() / heads.q_width - 1 - token);
        let first = settings.first_key(end - 1);
        let visible = end - first;
        let q = &q[token * heads.q_width + index * group * width..][..group * width];
        queries.clear();
        queries.resize(group * padded, 0.0);
        for (query, q) in queries.chunks_exact_mut(padded).zip(q.chunks_exact(width)) {
            query[..width].copy_from_slice(q);
        }
        score_rows.resize(group * visible, 0.0);
        for from in (0..visible).step_by(CACHED_KEYS) {
            for (q, row) in queries.chunks_exact(padded).zip(score_rows.chunks_exact_mut(visible)) {
                let to = from + CACHED_KEYS.min(visible - from);
                scores(isa, q, keys, first + from, settings.scale, &mut row[from..to]);
            }
        }
        score_rows.chunks_exact_mut(visible).for_each(|row| settings.weigh(isa, row));
        attn_out.clear();
        attn_out.resize(group * padded, 0.0);
        for from in (0..visible).step_by(CACHED_KEYS) {
            for (row, attn_out) in
                score_rows.chunks_exact(visible).zip(attn_out.chunks_exact_mut(padded))
            {
                let to = from + CACHED_KEYS.min(visible - from);
                mix(isa, &row[from..to], values, first + from, attn_out);
            }
        }
        let out = &mut out[token * group * width..][..group * width];
        for (out, attn_out) in out.chunks_exact_mut(width).zip(attn_out.chunks_exact(padded)) {
            out.copy_from_slice(&attn_out[..width]);
        }
    }

    /// Attention of all tokens of `q`, with two GEMMs per query head and block of queries.
    fn attend_batch(&mut self, isa: Isa, query: QueryHeads<'_>, panels: &mut HeadPanels) {
        let QueryHeads { heads, settings, index, q } = query;
        let Self { keys, values, scratch } = self;
        let (group, width) = (heads.group(), heads.width);
        let tokens = q.len() / heads.q_width;
        let HeadPanels { decoded, keys: key_panels, values: value_panels } = panels;
        // Keys before the window of the first query are left out.
        let first = settings.first_key(keys.len() - tokens);
        let seen = keys.len() - first;
        keys.read(isa, decoded);
        key_panels.pack_strided(&decoded[first * width..], seen, width, width);
        values.read(isa, decoded);
        value_panels.pack_transposed(&decoded[first * width..], width, seen, width);
        let HeadScratch { queries, scores, attn_out, out } = scratch;
        for (h, from) in
            (0..group).flat_map(|h| (0..tokens).step_by(QUERY_BLOCK).map(move |t| (h, t)))
        {
            let count = QUERY_BLOCK.min(tokens - from);
            // The number of keys that the last query of the block attends to.
            let visible = seen - tokens + from + count;
            queries.clear();
            for q in q[from * heads.q_width..].chunks_exact(heads.q_width).take(count) {
                let head = (index * group + h) * width;
                queries.extend(q[head..head + width].iter().map(|q| q * settings.scale));
            }
            let visible_keys = key_panels.first(visible, width);
            let stride = visible_keys.row_stride();
            scores.resize(count * stride, 0.0);
            gemm(isa, &dense(queries, count, width), visible_keys, 0, scores);
            // The mask: softmax over the past keys of the window, weight zero for all others.
            for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
                let position = visible - count + i;
                let (past, future) = row.split_at_mut(position + 1);
                let (before, window) = past.split_at_mut(settings.first_key(position));
                settings.weigh(isa, window);
                before.fill(0.0);
                future.fill(0.0);
            }
            // `dense` takes rows without padding.
            for i in 1..count {
                scores.copy_within(i * stride..i * stride + visible, i * visible);
            }
            let weights = dense(&scores[..count * visible], count, visible);
            let visible_values = value_panels.first(width, visible);
            attn_out.resize(count * visible_values.row_stride(), 0.0);
            gemm(isa, &weights, visible_values, 0, attn_out);
            for (i, row) in attn_out.chunks_exact(visible_values.row_stride()).enumerate() {
                out[((from + i) * group + h) * width..][..width].copy_from_slice(&row[..width]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_values(n: usize, k: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * k) % 97) as f32 / 48.0 - 1.0).collect()
    }

    /// softmax(cap(scale · q · kᵀ)) · v with a causal mask and a window, in f64.
    fn naive(
        heads: Heads,
        settings: AttentionSettings,
        q: &[f32],
        keys: &[f32],
        values: &[f32],
    ) -> Vec<f64> {
        let (tokens, seen) = (q.len() / heads.q_width, keys.len() / heads.kv_width);
        let mut out = Vec::new();
        for (t, head) in
            (0..tokens).flat_map(|t| (0..heads.q_width / heads.width).map(move |h| (t, h)))
        {
            let q = &q[t * heads.q_width + head * heads.width..][..heads.width];
            let row = |all: &[f32], s: usize| -> Vec<f64> {
                let at = s * heads.kv_width + head / heads.group() * heads.width;
                all[at..at + heads.width].iter().map(|v| f64::from(*v)).collect()
            };
            let position = seen - tokens + t;
            let visible = (0..=position).filter(|s| position - s < settings.window);
            let weights: Vec<(usize, f64)> = visible
                .map(|s| {
                    let terms = row(keys, s).into_iter().zip(q).map(|(k, q)| k * f64::from(*q));
                    let score = terms.sum::<f64>() * f64::from(settings.scale);
                    let capped = settings.soft_cap.map(f64::from).map(|c| c * (score / c).tanh());
                    (s, capped.unwrap_or(score).exp())
                })
                .collect();
            let total: f64 = weights.iter().map(|(_, w)| w).sum();
            for i in 0..heads.width {
                let terms = weights.iter().map(|(s, w)| w * row(values, *s)[i]);
                out.push(terms.sum::<f64>() / total);
            }
        }
        out
    }

    /// Batches and single tokens, with and without cached tokens, for every KV cache type.
    #[test]
    fn attention_matches_its_definition() {
        let scale = 1.0 / 24f32.sqrt();
        for (window, soft_cap) in [(usize::MAX, None), (40, None), (7, Some(1.5))] {
            let settings = AttentionSettings { scale: scale * 1.1, window, soft_cap };
            for (kind, tolerance) in [(KvKind::F32, 1e-5), (KvKind::F16, 2e-3), (KvKind::Q8, 3e-2)]
            {
                check_attention(settings, kind, tolerance);
            }
        }
    }

    fn check_attention(settings: AttentionSettings, kind: KvKind, tolerance: f64) {
        let heads = Heads { q_width: 4 * 24, kv_width: 2 * 24, width: 24 };
        let isa = Isa::detect().unwrap();
        let pool = Pool::new(2).unwrap();
        for (earlier, tokens) in [(0, 5), (0, 70), (70, 130), (1, 64), (300, 1), (0, 1), (9, 3)] {
            let q = test_values((earlier + tokens) * heads.q_width, 7);
            let keys = test_values((earlier + tokens) * heads.kv_width, 11);
            let values = test_values((earlier + tokens) * heads.kv_width, 13);
            let mut cache = KvCache::new(kind, heads);
            let mut out = vec![0.0; q.len()];
            let (q_split, kv_split) = (earlier * heads.q_width, earlier * heads.kv_width);
            let ranges = [(0..q_split, 0..kv_split), (q_split..q.len(), kv_split..keys.len())];
            for (q_range, kv_range) in ranges {
                let (k, v) = (&keys[kv_range.clone()], &values[kv_range]);
                let out = &mut out[q_range.clone()];
                let mut scratch = AttentionScratch::default();
                let q = &q[q_range];
                cache.attend(isa, &pool, &mut scratch, settings, QkvRows { q, k, v, out });
            }
            let exact = naive(heads, settings, &q[q_split..], &keys, &values);
            for (a, b) in out[q_split..].iter().zip(&exact) {
                let error = (f64::from(*a) - b).abs();
                assert!(error < tolerance, "{kind:?} {tokens} after {earlier}: {a} {b}");
            }
        }
    }
}
