//! Causal attention of one sequence, forward and backward, as matrix products. The masked half of each product is
//! computed and discarded; this is still several times as fast as token by token.

use stb_format::arch::Attention;
use stb_kernels::{Isa, Panels, ops};

use crate::products::{add_cross_products, product_of};

/// Queries [tokens, q_width], keys and values [tokens, kv_width] of a sequence, rotated.
pub(super) struct SequenceAttention<'a> {
    isa: Isa,
    spec: &'a Attention,
    q_width: usize,
    kv_width: usize,
    /// Values per head.
    width: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// The attention probabilities of one head, [tokens, tokens]: zero outside the window.
struct Probabilities {
    values: Vec<f32>,
    /// The derivative of the soft cap at each score; `None` without a soft cap.
    slopes: Option<Vec<f32>>,
}

impl<'a> SequenceAttention<'a> {
    /// Attention of one sequence with its queries, keys and values.
    pub fn new(isa: Isa, spec: &'a Attention, [q, k, v]: [&'a [f32]; 3]) -> Self {
        let width = spec.head_dim as usize;
        let (q_width, kv_width) = (spec.heads as usize * width, spec.kv_heads as usize * width);
        Self { isa, spec, q_width, kv_width, width, q, k, v }
    }

    /// Each head's offset in a row of queries, and its KV head's offset in a row of keys.
    fn heads(&self) -> impl Iterator<Item = (usize, usize)> {
        let (heads, kv_heads) = (self.q_width / self.width, self.kv_width / self.width);
        let width = self.width;
        (0..heads).map(move |h| (h * width, h / (heads / kv_heads) * width))
    }

    fn tokens(&self) -> usize {
        self.k.len() / self.kv_width
    }

    /// The head at offset `at` of `rows`, [tokens, stride]: [tokens, width].
    fn head(&self, rows: &[f32], stride: usize, at: usize) -> Vec<f32> {
        rows.chunks_exact(stride).flat_map(|row| &row[at..at + self.width]).copied().collect()
    }

    fn scale(&self) -> f32 {
        self.spec.scale as f32
    }

    /// The first key that the query of `position` attends to.
    fn first_key(&self, position: usize) -> usize {
        self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
    }

    fn probabilities(&self, q: &[f32], k: &[f32]) -> Probabilities {
        let mut panels = Panels::default();
        panels.pack(k, self.width);
        let tokens = self.tokens();
        let mut values = product_of(self.isa, q, self.width, &panels, tokens);
        let cap = self.spec.soft_cap.map(|cap| cap as f32);
        let mut slopes = cap.map(|_| vec![0.0; values.len()]);
        let scale = self.scale();
        for (t, row) in values.chunks_exact_mut(tokens).enumerate() {
            let (past, masked) = row.split_at_mut(t + 1);
            let (before, visible) = past.split_at_mut(self.first_key(t));
            visible.iter_mut().for_each(|s| *s *= scale);
            if let (Some(cap), Some(slopes)) = (cap, &mut slopes) {
                ops::soft_cap(self.isa, cap, visible);
                let slopes = &mut slopes[t * tokens + before.len()..];
                // The derivative of c · tanh(s / c) is 1 − tanh².
                for (slope, s) in slopes.iter_mut().zip(&*visible) {
                    *slope = 1.0 - (s / cap) * (s / cap);
                }
            }
            ops::softmax(self.isa, visible);
            before.fill(0.0);
            masked.fill(0.0);
        }
        Probabilities { values, slopes }
    }

    /// `left`, [tokens, tokens], times `right`, [tokens, width].
    fn multiply(&self, left: &[f32], right: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack_transposed(right, self.width, self.tokens(), self.width);
        product_of(self.isa, left, self.tokens(), &panels, self.width)
    }

    /// Adds `leftᵀ` [tokens, tokens] times `right` [tokens, width] to the head at offset `at` of `out`.
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

    /// Adds the attention output of all heads to `attn_out`, [tokens, q_width].
    pub fn forward(&self, attn_out: &mut [f32]) {
        for (q_at, kv_at) in self.heads() {
            let q = self.head(self.q, self.q_width, q_at);
            let [k, v] = [self.k, self.v].map(|all| self.head(all, self.kv_width, kv_at));
            let probabilities = self.probabilities(&q, &k);
            self.add(attn_out, self.q_width, q_at, &self.multiply(&probabilities.values, &v));
        }
    }

    /// Adds the gradients of q, k and v to `dq`, `dk` and `dv`, given the gradient of the attention output,
    /// [tokens, q_width].
    pub fn backward(&self, d_attn_out: &[f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (scale, tokens) = (self.scale(), self.tokens());
        for (q_at, kv_at) in self.heads() {
            let q = self.head(self.q, self.q_width, q_at);
            let [k, v] = [self.k, self.v].map(|all| self.head(all, self.kv_width, kv_at));
            let d_out = self.head(d_attn_out, self.q_width, q_at);
            let Probabilities { values: probabilities, slopes } = self.probabilities(&q, &k);
            self.add_transposed(dv, self.kv_width, kv_at, [&probabilities, &d_out]);
            let mut panels = Panels::default();
            panels.pack(&v, self.width);
            // The gradient of the probabilities, which becomes that of q·k.
            let mut d = product_of(self.isa, &d_out, self.width, &panels, tokens);
            for (d, p) in d.chunks_exact_mut(tokens).zip(probabilities.chunks_exact(tokens)) {
                let mean = ops::dot(self.isa, d, p);
                d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean) * scale);
            }
            if let Some(slopes) = slopes {
                d.iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope);
            }
            self.add(dq, self.q_width, q_at, &self.multiply(&d, &k));
            self.add_transposed(dk, self.kv_width, kv_at, [&d, &q]);
        }
    }
}
