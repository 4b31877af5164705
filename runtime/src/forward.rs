//! The forward pass of a LLaMA-type decoder, top to bottom.

use std::ops::ControlFlow;

use stb_format::RopePairing;
use stb_kernels::cuda::{self, AttentionShape};
use stb_kernels::kv::KvKind;
use stb_kernels::{Isa, Pool, has_gemm_q8, ops, prefill_batch};

use crate::attention::{Heads, KvCache, Scratch};
use crate::device::{Caches, DeviceModel, Logits};
use crate::error::{Error, Result};
use crate::linear::{LinearScratch, apply};
use crate::model::{Layer, Model};
use crate::rotary::Rotary;
use crate::sampler::{Next, Sampler};
use crate::weights::Weight;

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
    /// `x` is [tokens, in features]. To break ends the layer there, before that linear layer: the
    /// residual stream is then what its output would be added to (or, for inputs that are not, what it
    /// was made of).
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()>;
}

/// Sees nothing.
impl Observer for () {
    fn observe(&mut self, _: LinearInput, _: &[f32]) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// One sequence: its position, its caches and reusable memory.
#[derive(Debug)]
pub struct State {
    /// Of the layers that the CPU computes.
    caches: Vec<KvCache>,
    /// Of the layers on the device, once there is a token.
    device: Option<cuda::KvCache>,
    tokens: usize,
    context: usize,
    memory: Memory,
    scratch: Scratch,
    logits: Vec<f32>,
}

/// Reusable memory of a forward pass; all [tokens, width].
#[derive(Default, Debug)]
struct Memory {
    linears: LinearScratch,
    rotary: Rotary,
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
            caches: vec![KvCache::new(model.kv, model.heads()); model.host_layers()],
            device: None,
            tokens: 0,
            context,
            memory: Memory { linears: LinearScratch::new(!model.exact), ..Memory::default() },
            scratch: Scratch::default(),
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
        self.caches.iter_mut().for_each(|cache| cache.truncate(tokens));
        self.tokens = tokens;
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        let host: usize = self.caches.iter().map(KvCache::bytes).sum();
        host + self.device.as_ref().map_or(0, cuda::KvCache::bytes)
    }

    /// What a device needs to know of it, with the tokens before a call.
    fn device_cache(&mut self, before: usize) -> (&mut Option<cuda::KvCache>, usize, usize) {
        (&mut self.device, before, self.context)
    }

    /// Whether `count` more tokens fit.
    fn check_room(&self, count: usize) -> Result<()> {
        if self.tokens + count > self.context {
            return Err(Error::usage(format!(
                "{} tokens do not fit into a context of {}; shorten the prompt or raise -c",
                self.tokens + count,
                self.context
            )));
        }
        Ok(())
    }
}

impl Model {
    /// Appends `tokens` and returns the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not fit into the context or are none; [`Error::Invalid`] if a
    /// token is not in the vocabulary.
    pub fn forward<'s>(&self, state: &'s mut State, tokens: &[u32]) -> Result<&'s [f32]> {
        if self.device.is_some() {
            let mut logits = std::mem::take(&mut state.logits);
            self.forward_on_device(state, tokens, Logits::Last, |_, last| {
                logits.clear();
                logits.extend_from_slice(last);
            })?;
            state.logits = logits;
            return Ok(&state.logits);
        }
        self.check_tokens(state, tokens)?;
        let (passes, last_pass) = self.passes(tokens);
        for tokens in passes {
            state.memory.hidden = self.run_layers(state, tokens)?;
        }
        let hidden = self.run_layers(state, last_pass)?;
        let width = self.norm.len();
        let last = &hidden[hidden.len() - width..];
        self.logits(&mut state.memory, last, &mut state.logits);
        state.memory.hidden = hidden;
        Ok(&state.logits)
    }

    /// Appends `tokens` and puts what a sampler needs of the logits after the last one into `next`. `banned` tokens
    /// are not for it to choose.
    ///
    /// # Errors
    /// As for [`Model::forward`].
    pub fn next(
        &self,
        state: &mut State,
        tokens: &[u32],
        sampler: &mut Sampler,
        banned: &[u32],
        next: &mut Next,
    ) -> Result<()> {
        if let Some(device) = &self.device
            && let Some(wanted) = sampler.wanted(banned)
        {
            return self.append_on_device(state, tokens, |caches, hidden| {
                *next = Next::Best(device.best(caches, tokens, hidden, &wanted)?);
                Ok(())
            });
        }
        let logits = self.forward(state, tokens)?;
        match next {
            Next::Logits(kept) => {
                kept.clear();
                kept.extend_from_slice(logits);
            }
            Next::Best(_) => *next = Next::Logits(logits.to_vec()),
        }
        Ok(())
    }

    /// Appends one token to each of several sequences, which share one pass over the weights, and
    /// returns the logits, [sequences, vocab], in the memory of the first.
    ///
    /// # Errors
    /// As for [`Model::forward`], before anything is changed; [`Error::Usage`] for no sequence or
    /// another number of tokens.
    pub fn forward_batch<'s>(&self, states: &'s mut [State], tokens: &[u32]) -> Result<&'s [f32]> {
        if states.is_empty() || states.len() != tokens.len() {
            return Err(Error::usage("a batch takes one token for each of its sequences"));
        }
        states.iter().try_for_each(|state| state.check_room(1))?;
        let mut memory = std::mem::take(&mut states[0].memory);
        let mut hidden = std::mem::take(&mut memory.hidden);
        if let Err(e) = self.embed(tokens, &mut hidden) {
            states[0].memory = memory;
            return Err(e);
        }
        self.turn(&mut memory.rotary, states.iter().map(|state| state.tokens));
        let heads = self.heads();
        let mut scratch = std::mem::take(&mut states[0].scratch);
        for (i, layer) in self.layers[..self.host_layers()].iter().enumerate() {
            let attend = |q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]| {
                let rows = q.chunks_exact(heads.q_width).zip(out.chunks_exact_mut(heads.q_width));
                let keys = k.chunks_exact(heads.kv_width).zip(v.chunks_exact(heads.kv_width));
                for ((state, (q, out)), (k, v)) in states.iter_mut().zip(rows).zip(keys) {
                    let cache = &mut state.caches[i];
                    cache.attend(self.isa, &self.pool, &mut scratch, q, k, v, out);
                }
            };
            self.layer(layer, &self.pool, attend, &mut memory, &mut hidden);
        }
        states[0].scratch = scratch;
        if let Some(device) = &self.device {
            let mut logits = std::mem::take(&mut states[0].logits);
            let sequences = states.iter_mut().map(|s| s.device_cache(s.tokens));
            let mut caches = Caches { sequences: sequences.collect() };
            logits.clear();
            let input = (self.host_layers() > 0).then_some(&hidden[..]);
            let done = device.run(&mut caches, tokens, input, Logits::All, |_, some| {
                logits.extend_from_slice(some);
            });
            memory.hidden = hidden;
            states[0].memory = memory;
            states[0].logits = logits;
            if let Err(e) = done {
                for State { caches, tokens, .. } in states {
                    caches.iter_mut().for_each(|cache| cache.truncate(*tokens));
                }
                return Err(e);
            }
            states.iter_mut().for_each(|state| state.tokens += 1);
            return Ok(&states[0].logits);
        }
        states.iter_mut().for_each(|state| state.tokens += 1);
        let first = &mut states[0];
        self.logits(&mut memory, &hidden, &mut first.logits);
        memory.hidden = hidden;
        first.memory = memory;
        Ok(&first.logits)
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
        if self.device.is_some() {
            return self.forward_on_device(state, tokens, Logits::All, sink);
        }
        self.check_tokens(state, tokens)?;
        let (passes, last_pass) = self.passes(tokens);
        let (mut logits, mut first) = (Vec::new(), 0);
        for tokens in passes.chain([last_pass]) {
            let hidden = self.run_layers(state, tokens)?;
            for (i, hidden) in hidden.chunks(CHUNK * self.norm.len()).enumerate() {
                self.logits(&mut state.memory, hidden, &mut logits);
                sink(first + i * CHUNK, &logits);
            }
            first += tokens.len();
            state.memory.hidden = hidden;
        }
        Ok(())
    }

    /// `tokens` in pieces that go through all layers one after the other, and the last of them: as
    /// many as share work, but no more, so that activations stay in cache.
    fn passes<'t>(&self, tokens: &'t [u32]) -> (impl Iterator<Item = &'t [u32]>, &'t [u32]) {
        let shared = |w: &Weight| {
            let rounded = !self.exact && has_gemm_q8(&w.view());
            rounded.then(|| prefill_batch(self.isa, &w.view()))
        };
        let mut matrices = self.layers.iter().flat_map(Layer::matrices).map(shared);
        let fewest = matrices.try_fold(EXACT_TOKENS, |most, shared| Some(most.min(shared?)));
        let most = fewest.unwrap_or(EXACT_TOKENS);
        // Of nearly one size: a few tokens alone cost as much as many.
        let count = tokens.len().div_ceil(most).max(1);
        let size = tokens.len().div_ceil(count).next_multiple_of(GROUP);
        let (passes, last) = tokens.split_at(tokens.len().saturating_sub(1) / size * size);
        (passes.chunks(size), last)
    }

    /// Layers that the CPU computes: all, or those before the layers on the device.
    fn host_layers(&self) -> usize {
        self.device.as_ref().map_or(self.layers.len(), DeviceModel::host_layers)
    }

    /// Appends `tokens` with a device and hands their logits to `sink`.
    fn forward_on_device(
        &self,
        state: &mut State,
        tokens: &[u32],
        which: Logits,
        sink: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let Some(device) = &self.device else {
            return Err(Error::Internal { what: "no device".into() });
        };
        self.append_on_device(state, tokens, |caches, hidden| {
            device.run(caches, tokens, hidden, which, sink)
        })
    }

    /// Appends `tokens` with a device, which does `run`, after the layers that the CPU computes, if any.
    fn append_on_device(
        &self,
        state: &mut State,
        tokens: &[u32],
        run: impl FnOnce(&mut Caches<'_>, Option<&[f32]>) -> Result<()>,
    ) -> Result<()> {
        let before = state.tokens;
        let hidden = if self.host_layers() > 0 {
            Some(self.run_layers(state, tokens)?)
        } else {
            self.check_tokens(state, tokens)?;
            state.tokens += tokens.len();
            None
        };
        let mut caches = Caches { sequences: vec![state.device_cache(before)] };
        let done = run(&mut caches, hidden.as_deref());
        state.memory.hidden = hidden.unwrap_or_default();
        if done.is_err() {
            state.truncate(before);
        }
        done
    }

    /// Whether `tokens` can be appended.
    fn check_tokens(&self, state: &State, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::usage("there is no token to continue from; give a prompt"));
        }
        state.check_room(tokens.len())?;
        self.check_vocabulary(tokens)
    }

    fn check_vocabulary(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.embeddings.rows();
        match tokens.iter().find(|t| **t as usize >= vocabulary) {
            Some(token) => Err(Error::invalid(format!(
                "token {token} is outside the vocabulary of {vocabulary}"
            ))),
            None => Ok(()),
        }
    }

    /// Embeds `tokens` and runs the layers of the CPU: [tokens, hidden].
    fn run_layers(&self, state: &mut State, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check_tokens(state, tokens)?;
        let mut hidden = std::mem::take(&mut state.memory.hidden);
        self.embed(tokens, &mut hidden)?;
        self.turn(&mut state.memory.rotary, state.tokens..state.tokens + tokens.len());
        let State { caches, memory, scratch, .. } = state;
        for (layer, cache) in self.layers.iter().zip(caches) {
            let attend = |q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]| {
                cache.attend(self.isa, &self.pool, scratch, q, k, v, out);
            };
            self.layer(layer, &self.pool, attend, memory, &mut hidden);
        }
        state.tokens += tokens.len();
        Ok(hidden)
    }

    /// The embeddings of `tokens`, [tokens, hidden], into `hidden`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a token is not in the vocabulary.
    pub fn embed(&self, tokens: &[u32], hidden: &mut Vec<f32>) -> Result<()> {
        self.check_vocabulary(tokens)?;
        let (width, table) = (self.embeddings.cols(), self.embeddings.view());
        hidden.resize(tokens.len() * width, 0.0);
        let pool = self.pool.or_serial(hidden.len() > SERIAL);
        pool.run_chunks(hidden, width, |first, out| {
            for (token, out) in tokens[first / width..].iter().zip(out.chunks_exact_mut(width)) {
                table.decode_row(*token as usize, out);
            }
        });
        Ok(())
    }

    /// Runs one decoder layer over a whole sequence from its start, exactly and on this thread alone:
    /// `hidden` is [tokens, hidden], changed in place. `observer` sees the inputs of the linear layers.
    pub fn run_layer(&self, layer: &Layer, hidden: &mut [f32], observer: &mut dyn Observer) {
        if self.run_attention(layer, hidden, observer).is_continue() {
            let _ = self.run_mlp(layer, hidden, observer);
        }
    }

    /// The first half of [`Model::run_layer`]: attention, added to the residual stream.
    pub fn run_attention(
        &self,
        layer: &Layer,
        hidden: &mut [f32],
        observer: &mut dyn Observer,
    ) -> ControlFlow<()> {
        let mut memory = Memory::default();
        self.turn(&mut memory.rotary, 0..hidden.len() / self.norm.len());
        let mut cache = KvCache::new(KvKind::F32, self.heads());
        let mut scratch = Scratch::default();
        let pool = self.pool.or_serial(false);
        let attend = |q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]| {
            cache.attend(self.isa, pool, &mut scratch, q, k, v, out);
        };
        self.attention(layer, pool, attend, &mut memory, hidden, observer)
    }

    /// The second half of [`Model::run_layer`], for streams that have passed attention.
    pub fn run_mlp(
        &self,
        layer: &Layer,
        hidden: &mut [f32],
        observer: &mut dyn Observer,
    ) -> ControlFlow<()> {
        self.mlp(layer, self.pool.or_serial(false), &mut Memory::default(), hidden, observer)
    }

    /// Adds `x` [tokens, in] · `weight`ᵀ to `hidden` [tokens, out], as those layers do that write to
    /// the residual stream: what [`Model::run_layer`] does behind its observer, on this thread alone.
    pub fn add_linear(&self, weight: &Weight, x: &[f32], hidden: &mut [f32]) {
        let (pool, mut out) = (self.pool.or_serial(false), Vec::new());
        apply(self.isa, pool, &mut LinearScratch::default(), [weight], x, [&mut out]);
        add(pool, hidden, &out);
    }

    /// Rotates the heads of `x`, [tokens, width] from the start of a sequence, as queries and keys are,
    /// or, with `back`, the other way: the transpose.
    pub fn rotate(&self, x: &mut [f32], width: usize, back: bool) {
        let mut rotary = Rotary::default();
        self.turn(&mut rotary, 0..x.len() / width);
        if back {
            rotary.sin.iter_mut().for_each(|sin| *sin = -*sin);
        }
        rotary.rotate(self.pool.or_serial(false), x, width);
    }

    fn layer(
        &self,
        layer: &Layer,
        pool: &Pool,
        attend: impl FnMut(&[f32], &[f32], &[f32], &mut [f32]),
        memory: &mut Memory,
        hidden: &mut [f32], // [tokens, hidden]
    ) {
        let _ = self.attention(layer, pool, attend, memory, hidden, &mut ());
        let _ = self.mlp(layer, pool, memory, hidden, &mut ());
    }

    /// `attend` appends keys and values (both [tokens, kv_width]) to the caches and computes the
    /// attention of queries ([tokens, q_width]), both rotated.
    fn attention(
        &self,
        layer: &Layer,
        pool: &Pool,
        mut attend: impl FnMut(&[f32], &[f32], &[f32], &mut [f32]),
        memory: &mut Memory,
        hidden: &mut [f32], // [tokens, hidden]
        observer: &mut dyn Observer,
    ) -> ControlFlow<()> {
        let isa = self.isa;
        let Memory { linears, rotary, normed, q, k, v, mixed, out, .. } = memory;
        let eps = self.spec.norm_eps as f32;
        norm_rows(isa, pool, hidden, &layer.attention_norm, eps, normed);
        observer.observe(LinearInput::Attention, normed)?;
        apply(isa, pool, linears, [&layer.q, &layer.k, &layer.v], normed, [q, k, v]);
        rotary.rotate(pool, q, layer.q.rows());
        rotary.rotate(pool, k, layer.k.rows());
        mixed.resize(q.len(), 0.0);
        attend(q, k, v, mixed);
        observer.observe(LinearInput::AttentionOutput, mixed)?;
        apply(isa, pool, linears, [&layer.o], mixed, [out]);
        add(pool, hidden, out);
        ControlFlow::Continue(())
    }

    fn mlp(
        &self,
        layer: &Layer,
        pool: &Pool,
        memory: &mut Memory,
        hidden: &mut [f32], // [tokens, hidden]
        observer: &mut dyn Observer,
    ) -> ControlFlow<()> {
        let isa = self.isa;
        let Memory { linears, normed, gate, up, out, .. } = memory;
        let eps = self.spec.norm_eps as f32;
        norm_rows(isa, pool, hidden, &layer.mlp_norm, eps, normed);
        observer.observe(LinearInput::Mlp, normed)?;
        apply(isa, pool, linears, [&layer.gate, &layer.up], normed, [gate, up]);
        let up = &*up;
        pool.or_serial(gate.len() > SERIAL).run_chunks(gate, CHUNK, |first, gate| {
            ops::silu_mul(isa, gate, &up[first..first + gate.len()]);
        });
        observer.observe(LinearInput::MlpDown, gate)?;
        apply(isa, pool, linears, [&layer.down], gate, [out]);
        add(pool, hidden, out);
        ControlFlow::Continue(())
    }

    /// Last norm and head: `hidden` [tokens, hidden] to `logits` [tokens, vocab].
    fn logits(&self, memory: &mut Memory, hidden: &[f32], logits: &mut Vec<f32>) {
        let Memory { linears, normed, .. } = memory;
        let eps = self.spec.norm_eps as f32;
        norm_rows(self.isa, &self.pool, hidden, &self.norm, eps, normed);
        apply(self.isa, &self.pool, linears, [self.head()], normed, [logits]);
    }

    /// The shape of attention in `layers` layers on a device.
    pub(crate) fn device_attention(&self, layers: usize) -> AttentionShape {
        let heads = self.heads();
        AttentionShape {
            heads: heads.q_width / heads.width,
            kv_heads: heads.kv_width / heads.width,
            width: heads.width,
            layers,
            kind: self.kv,
            interleaved: self.spec.rope_pairing == RopePairing::Interleaved,
        }
    }

    /// Widths of the tensors of attention.
    fn heads(&self) -> Heads {
        let width = self.spec.head_dim as usize;
        let widths = self.layers.first().map(|layer| (layer.q.rows(), layer.k.rows()));
        let (q_width, kv_width) = widths.unwrap_or((width, width));
        Heads { q_width, kv_width, width }
    }

    /// Angles of `positions`.
    fn turn(&self, rotary: &mut Rotary, positions: impl Iterator<Item = usize>) {
        rotary.cos.clear();
        rotary.sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                // The angle is rounded to f32, as the reference implementations do.
                let angle = f64::from(position as f32 * frequency);
                rotary.cos.push(angle.cos() as f32);
                rotary.sin.push(angle.sin() as f32);
            }
        }
        rotary.pairs = self.frequencies.len();
        rotary.interleaved = self.spec.rope_pairing == RopePairing::Interleaved;
    }
}

/// Tokens that share the weights once these are unpacked.
const EXACT_TOKENS: usize = 512;
/// Of so many tokens kernels make use together.
const GROUP: usize = 32;
/// Up to so many numbers, operations between the linear layers stay on one thread.
pub(crate) const SERIAL: usize = 1 << 15;
/// Numbers per task above that.
const CHUNK: usize = 1 << 14;

fn norm_rows(isa: Isa, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    pool.or_serial(x.len() > SERIAL).run_chunks(out, weight.len(), |first, out| {
        ops::rms_norm(isa, &x[first..first + out.len()], weight, eps, out);
    });
}

fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    pool.or_serial(x.len() > SERIAL).run_chunks(x, CHUNK, |first, x| {
        for (x, y) in x.iter_mut().zip(&y[first..]) {
            *x += y;
        }
    });
}
