//! Causal attention over cached keys and values.

use std::cell::RefCell;

use stb_format::ModelSpec;
use stb_kernels::kv::{KvKind, KvRows, mix, scores};
use stb_kernels::{Isa, Panels, Pool, dense, gemm, ops};

/// Queries that share a pass over the keys when there are many.
const BLOCK: usize = 64;
/// Fewer tokens than this are computed one by one.
const SMALL_BATCH: usize = 4;
/// Keys or values of a head that stay in cache while all its queries use them.
const CACHED: usize = 256;
/// Below this many numbers, they are copied by one thread.
const SERIAL_COPY: usize = 1 << 16;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 15;

/// Widths of the tensors of attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// heads · head width.
    pub q_width: usize,
    /// key heads · head width.
    pub kv_width: usize,
    /// head width.
    pub width: usize,
}

impl Heads {
    /// Those of `spec`.
    pub(crate) fn of(spec: &ModelSpec) -> Self {
        let attention = spec.block(0).attention;
        let width = attention.head_dim as usize;
        Self {
            q_width: attention.heads as usize * width,
            kv_width: attention.kv_heads as usize * width,
            width,
        }
    }

    /// Query heads that share a key head.
    fn group(self) -> usize {
        self.q_width / self.kv_width
    }
}

/// The queries, keys and values of some tokens, q and k rotated, and the attention output.
#[derive(Debug)]
pub(crate) struct QkvRows<'a> {
    /// [tokens, q_width].
    pub q: &'a [f32],
    /// [tokens, kv_width].
    pub k: &'a [f32],
    /// [tokens, kv_width].
    pub v: &'a [f32],
    /// [tokens, q_width].
    pub out: &'a mut [f32],
}

/// Keys and values of the tokens so far in one decoder layer.
#[derive(Clone, Debug)]
pub(crate) struct KvCache {
    heads: Heads,
    /// By key head: keys (rotated), values, and what is computed with them.
    by_head: Vec<KvHead>,
}

#[derive(Clone, Debug)]
struct KvHead {
    keys: KvRows,
    values: KvRows,
    /// Lent by [`AttentionScratch`] while it is needed.
    scratch: HeadScratch,
}

/// Reusable buffers for the attention of one layer at a time, by key head.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttentionScratch(Vec<HeadScratch>);

#[derive(Clone, Debug, Default)]
struct HeadScratch {
    /// Queries of the group, padded, [group, padded width].
    queries: Vec<f32>,
    /// [group, keys], or by block of queries.
    scores: Vec<f32>,
    attn_out: Vec<f32>,
    /// [tokens, group · width].
    out: Vec<f32>,
}

/// Keys and values of one head in the form that products with many queries need.
#[derive(Default)]
struct Packed {
    numbers: Vec<f32>,
    keys: Panels,
    values: Panels,
}

thread_local! {
    /// Of the head that a thread works on.
    static PACKED: RefCell<Packed> = RefCell::default();
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

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> usize {
        self.by_head.iter().map(|head| head.keys.bytes() + head.values.bytes()).sum()
    }

    /// Appends the keys and values of some tokens and computes the attention of their queries over
    /// all tokens so far.
    pub(crate) fn attend(
        &mut self,
        isa: Isa,
        pool: &Pool,
        scratch: &mut AttentionScratch,
        x: QkvRows<'_>,
    ) {
        let QkvRows { q, k, v, out } = x;
        self.swap(scratch);
        let heads = self.heads;
        let tokens = q.len() / heads.q_width;
        let seen = self.by_head.first().map_or(0, |head| head.keys.len()) + tokens;
        let pool = pool.or_serial(q.len() * seen >= SERIAL_WORK);
        pool.run_chunks(&mut self.by_head, 1, |index, head| {
            for head in head {
                head.append(isa, heads, index, k, v);
                head.attend(isa, heads, index, q);
            }
        });
        let wide = heads.group() * heads.width;
        let by_head = &self.by_head;
        pool.or_serial(q.len() >= SERIAL_COPY).run_chunks(out, heads.q_width, |first, out| {
            let t = first / heads.q_width;
            for (out, head) in out.chunks_exact_mut(wide).zip(by_head) {
                out.copy_from_slice(&head.scratch.out[t * wide..][..wide]);
            }
        });
        self.swap(scratch);
    }

    fn swap(&mut self, scratch: &mut AttentionScratch) {
        scratch.0.resize_with(self.by_head.len().max(scratch.0.len()), HeadScratch::default);
        for (head, lent) in self.by_head.iter_mut().zip(&mut scratch.0) {
            std::mem::swap(&mut head.scratch, lent);
        }
    }
}

impl KvHead {
    fn append(&mut self, isa: Isa, heads: Heads, index: usize, k: &[f32], v: &[f32]) {
        let part = index * heads.width..(index + 1) * heads.width;
        for (k, v) in k.chunks_exact(heads.kv_width).zip(v.chunks_exact(heads.kv_width)) {
            self.keys.push(isa, &k[part.clone()]);
            self.values.push(isa, &v[part.clone()]);
        }
    }

    fn attend(&mut self, isa: Isa, heads: Heads, index: usize, q: &[f32]) {
        let tokens = q.len() / heads.q_width;
        self.scratch.out.clear();
        self.scratch.out.resize(tokens * heads.group() * heads.width, 0.0);
        if tokens < SMALL_BATCH {
            for token in 0..tokens {
                self.one_token(isa, heads, index, token, q);
            }
        } else {
            PACKED.with_borrow_mut(|packed| self.many_tokens(isa, heads, index, q, packed));
        }
    }

    /// Scores, softmax and mixture for the queries of one token, some keys at a time.
    fn one_token(&mut self, isa: Isa, heads: Heads, index: usize, token: usize, q: &[f32]) {
        let Self { keys, values, scratch } = self;
        let HeadScratch { queries, scores: all, attn_out, out } = scratch;
        let (group, width, padded) = (heads.group(), heads.width, keys.padded_width());
        let visible = keys.len() - (q.len() / heads.q_width - 1 - token);
        let scale = 1.0 / (width as f32).sqrt();
        let q = &q[token * heads.q_width + index * group * width..][..group * width];
        queries.clear();
        queries.resize(group * padded, 0.0);
        for (to, q) in queries.chunks_exact_mut(padded).zip(q.chunks_exact(width)) {
            to[..width].copy_from_slice(q);
        }
        all.resize(group * visible, 0.0);
        for from in (0..visible).step_by(CACHED) {
            for (q, row) in queries.chunks_exact(padded).zip(all.chunks_exact_mut(visible)) {
                let to = from + CACHED.min(visible - from);
                scores(isa, q, keys, from, scale, &mut row[from..to]);
            }
        }
        all.chunks_exact_mut(visible).for_each(|row| ops::softmax(isa, row));
        attn_out.clear();
        attn_out.resize(group * padded, 0.0);
        for from in (0..visible).step_by(CACHED) {
            for (row, attn_out) in all.chunks_exact(visible).zip(attn_out.chunks_exact_mut(padded))
            {
                let to = from + CACHED.min(visible - from);
                mix(isa, &row[from..to], values, from, attn_out);
            }
        }
        let out = &mut out[token * group * width..][..group * width];
        for (out, attn_out) in out.chunks_exact_mut(width).zip(attn_out.chunks_exact(padded)) {
            out.copy_from_slice(&attn_out[..width]);
        }
    }

    /// Many queries as two matrix products per head and block of queries.
    fn many_tokens(
        &mut self,
        isa: Isa,
        heads: Heads,
        index: usize,
        q: &[f32],
        packed: &mut Packed,
    ) {
        let Self { keys, values, scratch } = self;
        let (group, width, seen) = (heads.group(), heads.width, keys.len());
        let tokens = q.len() / heads.q_width;
        let Packed { numbers, keys: key_panels, values: value_panels } = packed;
        keys.read(isa, numbers);
        key_panels.pack_strided(numbers, seen, width, width);
        values.read(isa, numbers);
        value_panels.pack_transposed(numbers, width, seen, width);
        let scale = 1.0 / (width as f32).sqrt();
        let HeadScratch { queries, scores, attn_out, out } = scratch;
        for (h, from) in (0..group).flat_map(|h| (0..tokens).step_by(BLOCK).map(move |t| (h, t))) {
            let count = BLOCK.min(tokens - from);
            // The last query of the block sees this many keys.
            let visible = seen - tokens + from + count;
            queries.clear();
            for q in q[from * heads.q_width..].chunks_exact(heads.q_width).take(count) {
                let head = (index * group + h) * width;
                queries.extend(q[head..head + width].iter().map(|q| q * scale));
            }
            let visible_keys = key_panels.first(visible, width);
            let stride = visible_keys.row_stride();
            scores.resize(count * stride, 0.0);
            gemm(isa, &dense(queries, count, width), visible_keys, 0, scores);
            // Softmax over what each query may see; the future gets weight zero.
            for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
                let (past, future) = row.split_at_mut(visible - count + i + 1);
                ops::softmax(isa, past);
                future.fill(0.0);
            }
            // Panels need rows without padding.
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

    fn numbers(n: usize, k: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * k) % 97) as f32 / 48.0 - 1.0).collect()
    }

    /// The definition, in f64.
    fn naive(heads: Heads, q: &[f32], keys: &[f32], values: &[f32]) -> Vec<f64> {
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
            let weights: Vec<f64> = (0..=seen - tokens + t)
                .map(|s| {
                    let terms = row(keys, s).into_iter().zip(q).map(|(k, q)| k * f64::from(*q));
                    (terms.sum::<f64>() / (heads.width as f64).sqrt()).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for i in 0..heads.width {
                let terms = weights.iter().enumerate().map(|(s, w)| w * row(values, s)[i]);
                out.push(terms.sum::<f64>() / total);
            }
        }
        out
    }

    /// Prompt and single tokens, with and without earlier tokens, for every kind of cache.
    #[test]
    fn attention_matches_its_definition() {
        let heads = Heads { q_width: 4 * 24, kv_width: 2 * 24, width: 24 };
        let isa = Isa::detect().unwrap();
        let pool = Pool::new(2).unwrap();
        for (kind, tolerance) in [(KvKind::F32, 1e-5), (KvKind::F16, 2e-3), (KvKind::Q8, 3e-2)] {
            for (earlier, tokens) in [(0, 5), (0, 70), (70, 130), (1, 64), (300, 1), (0, 1), (9, 3)]
            {
                let q = numbers((earlier + tokens) * heads.q_width, 7);
                let keys = numbers((earlier + tokens) * heads.kv_width, 11);
                let values = numbers((earlier + tokens) * heads.kv_width, 13);
                let mut cache = KvCache::new(kind, heads);
                let mut out = vec![0.0; q.len()];
                let (q_split, kv_split) = (earlier * heads.q_width, earlier * heads.kv_width);
                let ranges = [(0..q_split, 0..kv_split), (q_split..q.len(), kv_split..keys.len())];
                for (q_range, kv_range) in ranges {
                    let (k, v) = (&keys[kv_range.clone()], &values[kv_range]);
                    let out = &mut out[q_range.clone()];
                    let mut scratch = AttentionScratch::default();
                    let q = &q[q_range];
                    cache.attend(isa, &pool, &mut scratch, QkvRows { q, k, v, out });
                }
                let exact = naive(heads, &q[q_split..], &keys, &values);
                for (a, b) in out[q_split..].iter().zip(&exact) {
                    let error = (f64::from(*a) - b).abs();
                    assert!(error < tolerance, "{kind:?} {tokens} after {earlier}: {a} {b}");
                }
            }
        }
    }
}
