//! Causal attention of one sequence forward and backward, as products of matrices: half of each square is
//! computed in vain, and still several times as fast as by single tokens.

use stb_kernels::{Isa, Panels, ops};
use stb_runtime::Engine;

use crate::products::{add_cross_products, product_of};

/// Queries [tokens, q_width], keys and values [tokens, kv_width] of a sequence, rotated.
pub(super) struct Attention<'a> {
    isa: Isa,
    q_width: usize,
    kv_width: usize,
    /// Of a head.
    width: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a> Attention<'a> {
    /// Of one sequence of `length` tokens: `qkv` are its queries, keys and values.
    pub fn new(engine: &Engine, length: usize, qkv: [&'a [f32]; 3]) -> Self {
        let [q, k, v] = qkv;
        Self {
            isa: engine.isa,
            q_width: q.len() / length,
            kv_width: k.len() / length,
            width: engine.model.spec.head_dim as usize,
            q,
            k,
            v,
        }
    }

    /// All heads: where a head is in a row of queries and in one of keys.
    fn heads(&self) -> impl Iterator<Item = (usize, usize)> {
        let (heads, kv_heads) = (self.q_width / self.width, self.kv_width / self.width);
        let width = self.width;
        (0..heads).map(move |h| (h * width, h / (heads / kv_heads) * width))
    }

    fn tokens(&self) -> usize {
        self.k.len() / self.kv_width
    }

    /// A head of `all`, whose rows have `stride` numbers: [tokens, width].
    fn head(&self, all: &[f32], stride: usize, at: usize) -> Vec<f32> {
        all.chunks_exact(stride).flat_map(|row| &row[at..at + self.width]).copied().collect()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// What each token takes of those up to itself, [tokens, tokens].
    fn shares(&self, q: &[f32], k: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack(k, self.width);
        let tokens = self.tokens();
        let mut shares = product_of(self.isa, q, self.width, &panels, tokens);
        let scale = self.scale();
        for (t, row) in shares.chunks_exact_mut(tokens).enumerate() {
            let (seen, unseen) = row.split_at_mut(t + 1);
            seen.iter_mut().for_each(|s| *s *= scale);
            ops::softmax(self.isa, seen);
            unseen.fill(0.0);
        }
        shares
    }

    /// `left`, [tokens, tokens], times `right`, [tokens, width].
    fn times(&self, left: &[f32], right: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack_transposed(right, self.width, self.tokens(), self.width);
        product_of(self.isa, left, self.tokens(), &panels, self.width)
    }

    /// Adds `leftᵀ` [tokens, tokens] times `right` [tokens, width] to a head of `out`.
    fn add_transposed(
        &self,
        out: &mut [f32],
        stride: usize,
        at: usize,
        [left, right]: [&[f32]; 2],
    ) {
        let mut product = vec![0.0; self.tokens() * self.width];
        add_cross_products(self.isa, left, self.tokens(), right, self.width, &mut product);
        self.add(out, stride, at, &product);
    }

    fn add(&self, out: &mut [f32], stride: usize, at: usize, head: &[f32]) {
        for (out, head) in out.chunks_exact_mut(stride).zip(head.chunks_exact(self.width)) {
            out[at..at + self.width].iter_mut().zip(head).for_each(|(o, h)| *o += h);
        }
    }

    /// Adds the values that each token mixes to `attn_out`, [tokens, q_width].
    pub fn forward(&self, attn_out: &mut [f32]) {
        for (q_at, kv_at) in self.heads() {
            let q = self.head(self.q, self.q_width, q_at);
            let [k, v] = [self.k, self.v].map(|all| self.head(all, self.kv_width, kv_at));
            let shares = self.shares(&q, &k);
            self.add(attn_out, self.q_width, q_at, &self.times(&shares, &v));
        }
    }

    /// From the gradient of what is attn_out, [tokens, q_width], adds to those of q, k and v.
    pub fn backward(&self, d_attn_out: &[f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (scale, tokens) = (self.scale(), self.tokens());
        for (q_at, kv_at) in self.heads() {
            let q = self.head(self.q, self.q_width, q_at);
            let [k, v] = [self.k, self.v].map(|all| self.head(all, self.kv_width, kv_at));
            let d_out = self.head(d_attn_out, self.q_width, q_at);
            let shares = self.shares(&q, &k);
            self.add_transposed(dv, self.kv_width, kv_at, [&shares, &d_out]);
            let mut panels = Panels::default();
            panels.pack(&v, self.width);
            // Of the shares, then of the scores.
            let mut d = product_of(self.isa, &d_out, self.width, &panels, tokens);
            for (d, shares) in d.chunks_exact_mut(tokens).zip(shares.chunks_exact(tokens)) {
                let mean = ops::dot(self.isa, d, shares);
                d.iter_mut().zip(shares).for_each(|(d, s)| *d = s * (*d - mean) * scale);
            }
            self.add(dq, self.q_width, q_at, &self.times(&d, &k));
            self.add_transposed(dk, self.kv_width, kv_at, [&d, &q]);
        }
    }
}
