//! Causal attention over cached keys and values.
//!
//! Prefill rows use GEMM, in which each output is one chain of additions over all keys; decode rows use the kernels
//! for one token, with partial sums by page of the cache. A row has the same result however its sequence is cut into
//! batches.

use std::cell::RefCell;

use stb_format::arch::Attention;
use stb_kernels::kv::{mix, scores};
use stb_kernels::{Isa, Panels, dense, gemm, ops};

use crate::kv_cache::{Heads, KvCache};
use crate::linear::{RowKind, Threads};
use crate::pass::Segment;

/// Queries per GEMM over the keys.
const QUERY_BLOCK: usize = 64;
/// Below this many values, one thread copies the output.
const SERIAL_COPY: usize = 1 << 16;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 15;

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

/// Queries, keys and values of the tokens of a pass after RoPE, and the attention output.
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

/// Reusable buffers for the attention of one layer at a time, by sequence and KV head.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch(Vec<QueryScratch>);

/// Reusable buffers for the query heads of one KV head.
#[derive(Debug, Default)]
struct QueryScratch {
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

/// How and where a layer attends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttendLayer<'a> {
    pub threads: Threads<'a>,
    pub settings: AttentionSettings,
    /// The index of the layer in the caches.
    pub layer: usize,
}

/// Appends the keys and values of a pass to the caches of its sequences, and computes causal attention of the
/// queries over all tokens of their sequence. Each cache has reserved room.
pub(crate) fn attend(
    at: AttendLayer<'_>,
    segments: &mut [Segment<'_>],
    scratch: &mut AttentionScratch,
    x: QkvRows<'_>,
) {
    let QkvRows { q, k, v, out } = x;
    let Threads { isa, pool } = at.threads;
    let Some(heads) = segments.first().map(|segment| segment.cache.heads()) else { return };
    let (mut first, mut work) = (0, 0);
    for segment in &mut *segments {
        let rows = first * heads.kv_width..(first + segment.count) * heads.kv_width;
        segment.cache.append(isa, pool, at.layer, &k[rows.clone()], &v[rows]);
        first += segment.count;
        work += segment.count * (segment.cache.len() + segment.count) * heads.q_width;
    }
    let (segments, kv_heads) = (&*segments, heads.kv_heads());
    let items = segments.len() * kv_heads;
    scratch.0.resize_with(items.max(scratch.0.len()), QueryScratch::default);
    let scratch = &mut scratch.0[..items];
    pool.or_serial(work >= SERIAL_WORK).run_chunks(scratch, 1, |item, scratch| {
        let (index, head) = (item / kv_heads, item % kv_heads);
        let before: usize = segments[..index].iter().map(|segment| segment.count).sum();
        let segment = &segments[index];
        let q = &q[before * heads.q_width..][..segment.count * heads.q_width];
        let queries = HeadQueries { at, heads, cache: &*segment.cache, head, q };
        for scratch in scratch {
            queries.attend(segment.kind, scratch);
        }
    });
    let (group_width, scratch) = (heads.group() * heads.width, &*scratch);
    pool.or_serial(q.len() >= SERIAL_COPY).run_chunks(out, heads.q_width, |at, out| {
        let (mut index, mut token) = (0, at / heads.q_width);
        while token >= segments[index].count {
            token -= segments[index].count;
            index += 1;
        }
        let by_head = &scratch[index * kv_heads..];
        for (out, head) in out.chunks_exact_mut(group_width).zip(by_head) {
            out.copy_from_slice(&head.out[token * group_width..][..group_width]);
        }
    });
}

/// The queries of the heads that share a KV head, for some tokens of one sequence.
#[derive(Clone, Copy)]
struct HeadQueries<'a> {
    at: AttendLayer<'a>,
    heads: Heads,
    /// The cache, with the keys and values of the tokens.
    cache: &'a KvCache,
    /// The index of the KV head.
    head: usize,
    /// Queries of all heads, [tokens, q_width].
    q: &'a [f32],
}

impl HeadQueries<'_> {
    fn attend(self, kind: RowKind, scratch: &mut QueryScratch) {
        let tokens = self.q.len() / self.heads.q_width;
        scratch.out.clear();
        scratch.out.resize(tokens * self.heads.group() * self.heads.width, 0.0);
        match kind {
            RowKind::Decode => (0..tokens).for_each(|token| self.attend_token(token, scratch)),
            RowKind::Prefill => {
                HEAD_PANELS.with_borrow_mut(|panels| self.attend_batch(panels, scratch));
            }
        }
    }

    /// Attention of one token of `q`: scores, softmax, weighted sum of the values. All query heads of
    /// the group use a page of keys or values while it is in cache.
    fn attend_token(self, token: usize, scratch: &mut QueryScratch) {
        let Self { at: AttendLayer { threads: Threads { isa, .. }, settings, layer }, .. } = self;
        let Self { heads, cache, head, q, .. } = self;
        let QueryScratch { queries, scores: score_rows, attn_out, out } = scratch;
        let (group, width) = (heads.group(), heads.width);
        let padded = width.next_multiple_of(16);
        let position = cache.len() + token;
        let first = settings.first_key(position);
        let visible = position + 1 - first;
        let q = &q[token * heads.q_width + head * group * width..][..group * width];
        queries.clear();
        queries.resize(group * padded, 0.0);
        for (query, q) in queries.chunks_exact_mut(padded).zip(q.chunks_exact(width)) {
            query[..width].copy_from_slice(q);
        }
        score_rows.resize(group * visible, 0.0);
        let parts = cache.parts(layer, head, first, position + 1);
        for part in parts.clone() {
            for (q, row) in queries.chunks_exact(padded).zip(score_rows.chunks_exact_mut(visible)) {
                let row = &mut row[part.first..][..part.count];
                scores(isa, q, &part.head.keys, part.row, settings.scale, row);
            }
        }
        score_rows.chunks_exact_mut(visible).for_each(|row| settings.weigh(isa, row));
        attn_out.clear();
        attn_out.resize(group * padded, 0.0);
        for part in parts {
            for (row, attn_out) in
                score_rows.chunks_exact(visible).zip(attn_out.chunks_exact_mut(padded))
            {
                let row = &row[part.first..][..part.count];
                mix(isa, row, &part.head.values, part.row, attn_out);
            }
        }
        let out = &mut out[token * group * width..][..group * width];
        for (out, attn_out) in out.chunks_exact_mut(width).zip(attn_out.chunks_exact(padded)) {
            out.copy_from_slice(&attn_out[..width]);
        }
    }

    /// Attention of all tokens of `q`, with two GEMMs per query head and block of queries.
    fn attend_batch(self, panels: &mut HeadPanels, scratch: &mut QueryScratch) {
        let Self { at: AttendLayer { threads: Threads { isa, .. }, settings, .. }, .. } = self;
        let Self { heads, cache, head, q, .. } = self;
        let (group, width) = (heads.group(), heads.width);
        let tokens = q.len() / heads.q_width;
        // Keys before the window of the first query are left out.
        let first = settings.first_key(cache.len());
        let seen = cache.len() + tokens - first;
        self.pack(first, seen, panels);
        let HeadPanels { keys: key_panels, values: value_panels, .. } = panels;
        let QueryScratch { queries, scores, attn_out, out } = scratch;
        for (h, from) in
            (0..group).flat_map(|h| (0..tokens).step_by(QUERY_BLOCK).map(move |t| (h, t)))
        {
            let count = QUERY_BLOCK.min(tokens - from);
            // The number of keys that the last query of the block attends to.
            let visible = seen - tokens + from + count;
            queries.clear();
            for q in q[from * heads.q_width..].chunks_exact(heads.q_width).take(count) {
                let head = (head * group + h) * width;
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

    /// Packs the keys and values of `seen` tokens from `first` on for GEMM.
    fn pack(self, first: usize, seen: usize, panels: &mut HeadPanels) {
        let (isa, width) = (self.at.threads.isa, self.heads.width);
        let parts = self.cache.parts(self.at.layer, self.head, first, first + seen);
        let HeadPanels { decoded, keys, values } = panels;
        decoded.resize(seen * width, 0.0);
        for part in parts.clone() {
            let to = &mut decoded[part.first * width..][..part.count * width];
            part.head.keys.read(isa, part.row, to);
        }
        keys.pack_strided(decoded, seen, width, width);
        for part in parts {
            let to = &mut decoded[part.first * width..][..part.count * width];
            part.head.values.read(isa, part.row, to);
        }
        values.pack_transposed(decoded, width, seen, width);
    }
}

#[cfg(test)]
mod tests {
    use stb_kernels::Pool;
    use stb_kernels::kv::KvKind;

    use super::*;
    use crate::kv_cache::KvShape;
    use crate::pass::OutputKind;

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

    /// The caches and the results of a sequence that is computed in pieces.
    fn in_pieces(
        at: AttendLayer<'_>,
        shape: KvShape,
        pieces: &[usize],
        kind: RowKind,
        [q, k, v]: [&[f32]; 3],
    ) -> Vec<f32> {
        let heads = shape.heads;
        let mut cache = KvCache::new(shape, 1 << 20);
        let mut out = vec![0.0; q.len()];
        let mut first = 0;
        for count in pieces.iter().copied().filter(|count| *count > 0) {
            cache.reserve(count);
            let q_rows = first * heads.q_width..(first + count) * heads.q_width;
            let kv_rows = first * heads.kv_width..(first + count) * heads.kv_width;
            let (q, out) = (&q[q_rows.clone()], &mut out[q_rows]);
            let x = QkvRows { q, k: &k[kv_rows.clone()], v: &v[kv_rows], out };
            let segment = Segment {
                id: 0,
                cache: &mut cache,
                count,
                tokens: &[],
                kind,
                output: OutputKind::CacheOnly,
            };
            attend(at, &mut [segment], &mut AttentionScratch::default(), x);
            cache.advance(count);
            first += count;
        }
        out
    }

    /// A row has the same bits however its sequence is cut, on every instruction set.
    #[test]
    fn attention_does_not_depend_on_the_cut() {
        let heads = Heads { q_width: 4 * 24, kv_width: 2 * 24, width: 24 };
        let pool = Pool::new(2).unwrap();
        let tokens = 200;
        let q = test_values(tokens * heads.q_width, 7);
        let k = test_values(tokens * heads.kv_width, 11);
        let v = test_values(tokens * heads.kv_width, 13);
        for (window, soft_cap) in [(usize::MAX, None), (40, None), (70, Some(1.5))] {
            let settings = AttentionSettings { scale: 0.2, window, soft_cap };
            for kv in [KvKind::F32, KvKind::F16, KvKind::Q8] {
                for row_kind in [RowKind::Prefill, RowKind::Decode] {
                    let mut expected: Option<Vec<f32>> = None;
                    for isa in Isa::available() {
                        let at = AttendLayer {
                            threads: Threads { isa, pool: &pool },
                            settings,
                            layer: 0,
                        };
                        let shape = KvShape { kind: kv, heads, layers: 1 };
                        for pieces in [&[200][..], &[1, 63, 136], &[130, 3, 67], &[7, 1, 1, 191]] {
                            let found = in_pieces(at, shape, pieces, row_kind, [&q, &k, &v]);
                            let expected = expected.get_or_insert_with(|| found.clone());
                            let what = format!("{kv:?} {row_kind:?} {window} {pieces:?}");
                            assert!(*expected == found, "{what} {}", isa.name());
                        }
                    }
                }
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
            let at = AttendLayer { threads: Threads { isa, pool: &pool }, settings, layer: 0 };
            let shape = KvShape { kind, heads, layers: 1 };
            for row_kind in [RowKind::Prefill, RowKind::Decode] {
                let x = [&q[..], &keys, &values];
                let out = in_pieces(at, shape, &[earlier, tokens], row_kind, x);
                let q_split = earlier * heads.q_width;
                let exact = naive(heads, settings, &q[q_split..], &keys, &values);
                for (a, b) in out[q_split..].iter().zip(&exact) {
                    let error = (f64::from(*a) - b).abs();
                    assert!(error < tolerance, "{kind:?} {tokens} after {earlier}: {a} {b}");
                }
            }
        }
    }
}
