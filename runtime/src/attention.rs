//! Causal attention over cached keys and values.

use rayon::prelude::*;
use stb_format::encoding::{Dense, DenseView, MatrixView};
use stb_kernels::{Isa, Panels, matmul, ops};

/// Queries that share a pass over the keys when there are many.
const BLOCK: usize = 64;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 17;

/// Widths of the tensors of attention.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// heads · head width.
    pub q_width: usize,
    /// key heads · head width.
    pub kv_width: usize,
    /// head width.
    pub width: usize,
}

impl Heads {
    fn count(self) -> usize {
        self.q_width / self.width
    }

    /// Where the keys of query head `head` start in a row of the cache.
    fn kv_offset(self, head: usize) -> usize {
        head / (self.q_width / self.kv_width) * self.width
    }
}

/// Attention of the last tokens over all of them: `q` and `out` are [tokens, q_width], `keys` and
/// `values` [all tokens, kv_width]; the last query sees every key.
pub(crate) fn attention(
    isa: Isa,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    heads: Heads,
    out: &mut [f32],
) {
    let (tokens, seen) = (q.len() / heads.q_width, keys.len() / heads.kv_width);
    let parallel = q.len() * seen >= SERIAL_WORK;
    if tokens < 4 {
        one_by_one(isa, q, keys, values, heads, parallel, out);
        return;
    }
    // The output of a head is strided, so heads are computed apart and interleaved at the end.
    let head = |h: usize| one_head(isa, q, keys, values, heads, h);
    let by_head: Vec<Vec<f32>> = if parallel {
        (0..heads.count()).into_par_iter().map(head).collect()
    } else {
        (0..heads.count()).map(head).collect()
    };
    for (t, out) in out.chunks_exact_mut(heads.q_width).enumerate() {
        for (out, head) in out.chunks_exact_mut(heads.width).zip(&by_head) {
            out.copy_from_slice(&head[t * heads.width..(t + 1) * heads.width]);
        }
    }
}

/// Few queries: a dot product with every key.
fn one_by_one(
    isa: Isa,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    heads: Heads,
    parallel: bool,
    out: &mut [f32],
) {
    let first = keys.len() / heads.kv_width - q.len() / heads.q_width;
    let scale = 1.0 / (heads.width as f32).sqrt();
    let one = |scores: &mut Vec<f32>, (index, out): (usize, &mut [f32])| {
        let (token, head) = (index / heads.count(), index % heads.count());
        let q = &q[index * heads.width..(index + 1) * heads.width];
        let offset = heads.kv_offset(head);
        scores.resize(first + token + 1, 0.0);
        ops::attention_scores(isa, q, &keys[offset..], heads.kv_width, scale, scores);
        ops::softmax(isa, scores);
        ops::attention_mix(isa, scores, &values[offset..], heads.kv_width, out);
    };
    if parallel {
        out.par_chunks_exact_mut(heads.width).enumerate().for_each_init(Vec::new, one);
    } else {
        let mut scores = Vec::new();
        out.chunks_exact_mut(heads.width).enumerate().for_each(|job| one(&mut scores, job));
    }
}

/// Many queries of one head as two matrix products per block of queries: [tokens, width].
fn one_head(
    isa: Isa,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    heads: Heads,
    head: usize,
) -> Vec<f32> {
    let Heads { q_width, kv_width, width } = heads;
    let (tokens, seen) = (q.len() / q_width, keys.len() / kv_width);
    let scale = 1.0 / (width as f32).sqrt();
    let offset = heads.kv_offset(head);
    let (mut key_panels, mut value_panels) = (Panels::default(), Panels::default());
    key_panels.pack_strided(&keys[offset..], seen, width, kv_width);
    value_panels.pack_transposed(&values[offset..], width, seen, kv_width);
    let mut out = Vec::with_capacity(tokens * width);
    let (mut queries, mut scores, mut mixed) = (Vec::new(), Vec::new(), Vec::new());
    for from in (0..tokens).step_by(BLOCK) {
        let count = BLOCK.min(tokens - from);
        // The last query of the block sees this many keys.
        let visible = seen - tokens + from + count;
        queries.clear();
        for q in q[from * q_width..].chunks_exact(q_width).take(count) {
            queries.extend(q[head * width..][..width].iter().map(|q| q * scale));
        }
        let visible_keys = key_panels.first(visible, width);
        let stride = visible_keys.row_stride();
        scores.resize(count * stride, 0.0);
        matmul(isa, &dense(&queries, count, width), visible_keys, 0, &mut scores);
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
        mixed.resize(count * visible_values.row_stride(), 0.0);
        matmul(isa, &weights, visible_values, 0, &mut mixed);
        for row in mixed.chunks_exact(visible_values.row_stride()) {
            out.extend_from_slice(&row[..width]);
        }
    }
    out
}

/// Numbers in memory as a matrix.
fn dense(values: &[f32], rows: usize, cols: usize) -> MatrixView<'_> {
    let view = DenseView::new(Dense::F32, rows as u64, cols as u64, bytemuck::cast_slice(values));
    MatrixView::Dense(view.expect("rows × cols values"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways of computing attention agree, with and without earlier tokens in the cache.
    #[test]
    fn blocks_and_single_queries_agree() {
        let heads = Heads { q_width: 4 * 24, kv_width: 2 * 24, width: 24 };
        let numbers = |n: usize, k: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * k) % 97) as f32 / 48.0 - 1.0).collect()
        };
        let isa = Isa::detect().unwrap();
        for (tokens, seen) in [(5, 5), (70, 70), (130, 200), (64, 65)] {
            let q = numbers(tokens * heads.q_width, 7);
            let keys = numbers(seen * heads.kv_width, 11);
            let values = numbers(seen * heads.kv_width, 13);
            let (mut blocks, mut single) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            attention(isa, &q, &keys, &values, heads, &mut blocks);
            one_by_one(isa, &q, &keys, &values, heads, false, &mut single);
            for (a, b) in blocks.iter().zip(&single) {
                assert!((a - b).abs() < 1e-5, "{tokens} of {seen}: {a} {b}");
            }
        }
    }
}
