//! The forward pass of a LLaMA-type decoder, top to bottom.

use stb_format::{RopePairing, RopeScaling};
use stb_kernels::{Isa, ops};

use crate::attention::{Heads, attention};
use crate::error::{Error, Result};
use crate::linear::{Linears, apply};
use crate::model::{Layer, Model};

/// Which input of a decoder layer an [`Observer`] sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearInput {
    /// What q, k and v read: [tokens, hidden].
    Attention,
    /// What o reads: [tokens, heads · head_dim].
    AttentionOutput,
    /// What gate and up read: [tokens, hidden].
    Mlp,
    /// What down reads: [tokens, intermediate].
    MlpDown,
}

impl LinearInput {
    /// All inputs in the order of computation.
    pub const ALL: [Self; 4] = [Self::Attention, Self::AttentionOutput, Self::Mlp, Self::MlpDown];

    /// The place in [`LinearInput::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Sees the inputs of the linear layers as they are computed: how calibration collects statistics.
pub trait Observer {
    /// `x` is [tokens, in features].
    fn observe(&mut self, input: LinearInput, x: &[f32]);
}

/// Sees nothing.
impl Observer for () {
    fn observe(&mut self, _: LinearInput, _: &[f32]) {}
}

/// Keys and values of the tokens so far, per layer.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    /// [tokens, kv_heads · head_dim], rotated.
    keys: Vec<f32>,
    /// [tokens, kv_heads · head_dim].
    values: Vec<f32>,
}

/// One sequence: its position, its caches and reusable memory.
#[derive(Debug)]
pub struct State {
    caches: Vec<KvCache>,
    tokens: usize,
    context: usize,
    memory: Memory,
    logits: Vec<f32>,
}

/// Reusable memory of a forward pass; all [tokens, width].
#[derive(Default, Debug)]
struct Memory {
    linears: Linears,
    hidden: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

impl State {
    /// An empty sequence of at most `context` tokens.
    #[must_use]
    pub fn new(model: &Model, context: usize) -> Self {
        Self {
            caches: vec![KvCache::default(); model.layers.len()],
            tokens: 0,
            context,
            memory: Memory { linears: Linears::new(!model.exact), ..Memory::default() },
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
        if tokens >= self.tokens {
            return;
        }
        for cache in &mut self.caches {
            let width = cache.keys.len() / self.tokens;
            cache.keys.truncate(tokens * width);
            cache.values.truncate(tokens * width);
        }
        self.tokens = tokens;
    }
}

impl Model {
    /// Appends `tokens` and returns the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not fit into the context or are none; [`Error::Invalid`] if a
    /// token is not in the vocabulary.
    pub fn forward<'s>(&self, state: &'s mut State, tokens: &[u32]) -> Result<&'s [f32]> {
        let hidden = self.run_layers(state, tokens)?;
        let width = self.norm.len();
        let last = &hidden[hidden.len() - width..];
        let mut logits = std::mem::take(&mut state.logits);
        self.logits(&mut state.memory.linears, &mut state.memory.normed, last, &mut logits);
        state.memory.hidden = hidden;
        state.logits = logits;
        Ok(&state.logits)
    }

    /// Appends `tokens` and hands the logits after each of them to `sink`, some tokens at a time:
    /// the index of the first token and [n, vocab].
    ///
    /// # Errors
    /// As for [`Model::forward`].
    pub fn forward_all(
        &self,
        state: &mut State,
        tokens: &[u32],
        mut sink: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        const CHUNK: usize = 64;
        let hidden = self.run_layers(state, tokens)?;
        let mut logits = Vec::new();
        for (i, hidden) in hidden.chunks(CHUNK * self.norm.len()).enumerate() {
            let Memory { linears, normed, .. } = &mut state.memory;
            self.logits(linears, normed, hidden, &mut logits);
            sink(i * CHUNK, &logits);
        }
        state.memory.hidden = hidden;
        Ok(())
    }

    /// Embeds `tokens` and runs all layers: [tokens, hidden].
    fn run_layers(&self, state: &mut State, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Err(Error::usage("there is no token to continue from; give a prompt"));
        }
        if state.tokens + tokens.len() > state.context {
            return Err(Error::usage(format!(
                "{} tokens do not fit into a context of {}; shorten the prompt or raise -c",
                state.tokens + tokens.len(),
                state.context
            )));
        }
        let mut hidden = std::mem::take(&mut state.memory.hidden);
        self.embed(tokens, &mut hidden)?;
        let rotary = self.rotary(state.tokens, tokens.len());
        for (layer, cache) in self.layers.iter().zip(&mut state.caches) {
            self.layer(layer, cache, &rotary, &mut state.memory, &mut hidden, &mut ());
        }
        state.tokens += tokens.len();
        Ok(hidden)
    }

    /// The embeddings of `tokens`, [tokens, hidden], into `hidden`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a token is not in the vocabulary.
    pub fn embed(&self, tokens: &[u32], hidden: &mut Vec<f32>) -> Result<()> {
        let width = self.embeddings.cols();
        hidden.resize(tokens.len() * width, 0.0);
        let table = self.embeddings.view();
        for (token, out) in tokens.iter().zip(hidden.chunks_exact_mut(width)) {
            if *token as usize >= table.rows() {
                return Err(Error::invalid(format!(
                    "token {token} is outside the vocabulary of {}",
                    table.rows()
                )));
            }
            table.decode_row(*token as usize, out);
        }
        Ok(())
    }

    /// Runs one decoder layer over a whole sequence from its start: `hidden` is [tokens, hidden],
    /// changed in place. `observer` sees the inputs of the linear layers.
    pub fn run_layer(&self, layer: &Layer, hidden: &mut [f32], observer: &mut dyn Observer) {
        let rotary = self.rotary(0, hidden.len() / self.norm.len());
        let (mut cache, mut memory) = (KvCache::default(), Memory::default());
        self.layer(layer, &mut cache, &rotary, &mut memory, hidden, observer);
    }

    fn layer(
        &self,
        layer: &Layer,
        cache: &mut KvCache,
        rotary: &Rotary,
        memory: &mut Memory,
        hidden: &mut [f32], // [tokens, hidden]
        observer: &mut dyn Observer,
    ) {
        let isa = self.isa;
        let Memory { linears, normed, q, k, v, mixed, gate, up, out, .. } = memory;
        let eps = self.spec.norm_eps as f32;
        let head_dim = self.spec.head_dim as usize;

        rms_norm_rows(isa, hidden, &layer.attention_norm, eps, normed);
        observer.observe(LinearInput::Attention, normed);
        apply(isa, linears, &[&layer.q, &layer.k, &layer.v], normed, &mut [q, k, v]);
        rotary.rotate(q, layer.q.rows(), head_dim);
        rotary.rotate(k, layer.k.rows(), head_dim);
        cache.keys.extend_from_slice(k);
        cache.values.extend_from_slice(v);

        mixed.resize(q.len(), 0.0);
        let heads = Heads { q_width: layer.q.rows(), kv_width: layer.k.rows(), width: head_dim };
        attention(isa, q, &cache.keys, &cache.values, heads, mixed);
        observer.observe(LinearInput::AttentionOutput, mixed);
        apply(isa, linears, &[&layer.o], mixed, &mut [out]);
        add(hidden, out);

        rms_norm_rows(isa, hidden, &layer.mlp_norm, eps, normed);
        observer.observe(LinearInput::Mlp, normed);
        apply(isa, linears, &[&layer.gate, &layer.up], normed, &mut [gate, up]);
        ops::silu_mul(isa, gate, up);
        observer.observe(LinearInput::MlpDown, gate);
        apply(isa, linears, &[&layer.down], gate, &mut [out]);
        add(hidden, out);
    }

    /// Last norm and head: `hidden` [tokens, hidden] to `logits` [tokens, vocab].
    fn logits(
        &self,
        linears: &mut Linears,
        normed: &mut Vec<f32>,
        hidden: &[f32],
        logits: &mut Vec<f32>,
    ) {
        rms_norm_rows(self.isa, hidden, &self.norm, self.spec.norm_eps as f32, normed);
        apply(self.isa, linears, &[self.head()], normed, &mut [logits]);
    }

    /// Angles of `count` positions from `first`.
    fn rotary(&self, first: usize, count: usize) -> Rotary {
        let frequencies = inverse_frequencies(
            self.spec.head_dim as usize,
            self.spec.rope_theta,
            self.spec.rope_scaling,
        );
        let mut turns = Vec::with_capacity(count * frequencies.len());
        for position in first..first + count {
            for frequency in &frequencies {
                // The angle is rounded to f32, as the reference implementations do.
                let angle = f64::from(position as f32 * frequency);
                turns.push((angle.cos() as f32, angle.sin() as f32));
            }
        }
        Rotary { turns, pairing: self.spec.rope_pairing }
    }
}

/// 1 / θ^(2i/head_dim) for each pair, scaled.
fn inverse_frequencies(head_dim: usize, theta: f64, scaling: RopeScaling) -> Vec<f32> {
    let pairs = head_dim / 2;
    let frequency = |i: usize| 1.0 / theta.powf(2.0 * i as f64 / head_dim as f64);
    let scale = |frequency: f64| match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = original_context as f64 * frequency / (2.0 * std::f64::consts::PI);
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = smooth.clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / factor)
        }
    };
    (0..pairs).map(|i| scale(frequency(i)) as f32).collect()
}

/// Cosine and sine for each position and pair.
struct Rotary {
    /// [positions, head_dim / 2].
    turns: Vec<(f32, f32)>,
    pairing: RopePairing,
}

impl Rotary {
    /// Rotates the heads of `x`, [tokens, width], in place.
    fn rotate(&self, x: &mut [f32], width: usize, head_dim: usize) {
        let half = head_dim / 2;
        for (x, turns) in x.chunks_exact_mut(width).zip(self.turns.chunks_exact(half)) {
            for head in x.chunks_exact_mut(head_dim) {
                for (i, (cos, sin)) in turns.iter().enumerate() {
                    let (a, b) = match self.pairing {
                        RopePairing::Half => (i, i + half),
                        RopePairing::Interleaved => (2 * i, 2 * i + 1),
                    };
                    let (u, v) = (head[a], head[b]);
                    head[a] = u * cos - v * sin;
                    head[b] = v * cos + u * sin;
                }
            }
        }
    }
}

fn rms_norm_rows(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        ops::rms_norm(isa, x, weight, eps, out);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_fast_and_stretches_slow_turns() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = inverse_frequencies(128, 500_000.0, RopeScaling::None);
        let scaled = inverse_frequencies(128, 500_000.0, scaling);
        // transformers' _compute_llama3_parameters for the same configuration.
        assert_eq!(plain[0], scaled[0]);
        assert!((scaled[63] / plain[63] - 0.125).abs() < 1e-6);
        for (i, (s, p)) in scaled.iter().zip(&plain).enumerate() {
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(*p);
            let expected = if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                0.125
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (1.0 - smooth) / 8.0 + smooth
            };
            assert!((f64::from(s / p) - expected).abs() < 1e-5, "{i}");
        }
    }
}
