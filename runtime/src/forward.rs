//! The forward pass of a model: embeddings, decoder layers, last norm, lm_head.

use stb_kernels::{Pool, ops, packed};

use crate::block::NormWeights;
use crate::block::run_block;
use crate::cpu::CpuOps;
use crate::device::DeviceCaches;
use crate::elementwise::{Elementwise, MIN_PARALLEL_ELEMENTS};
use crate::engine::{Engine, Tail};
use crate::error::{Error, Result};
use crate::kv_cache::{AttentionScratch, AttentionSettings, Heads, QkvRows};
use crate::layer::{Layer, LayerMatrix};
use crate::linear::{LinearScratch, apply};
use crate::pass::{Output, OutputKind, Pass};
use crate::sampler::{Sampler, SamplerInput};
use crate::state::{ForwardScratch, State};
use crate::weights::Weight;

/// The largest prefill batch: large, so that unpacking the weights is amortized where no q8 GEMM kernel
/// exists.
const MAX_PREFILL_BATCH: usize = 512;
/// Prefill batches are multiples of this, which is a multiple of the tokens that any GEMM kernel processes
/// together (8, 16 or 32).
const PREFILL_GROUP: usize = 32;
/// Tokens whose logits are computed at a time.
const LOGITS_BATCH: usize = 64;
/// Logits per task of the soft cap.
const CAPPED_LOGITS: usize = 1 << 14;

impl Engine {
    /// Appends `tokens` and returns the logits after the last one, `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Usage`] if `tokens` is empty or does not fit into the context; [`Error::Invalid`] if a
    /// token is not in the vocabulary; [`Error::Device`] if the device fails. After an error the
    /// sequence has its former length.
    pub fn forward<'s>(&self, state: &'s mut State, tokens: &[u32]) -> Result<&'s [f32]> {
        let mut kept = std::mem::take(&mut state.logits);
        let keep = &mut |output: Output<'_>| {
            if let Output::Logits { logits, .. } = output {
                std::mem::swap(&mut kept, logits);
            }
        };
        let done = self.run(std::slice::from_mut(state), tokens, OutputKind::LastLogits, keep);
        state.logits = kept;
        done.map(|()| &state.logits[..])
    }

    /// Appends `tokens` and stores what `sampler` needs to choose the next token in `input`: the top-k tokens
    /// without `banned` if a device can select them, else the logits of the whole vocabulary after the last
    /// token, in which [`Sampler::choose`] excludes `banned`.
    ///
    /// # Errors
    /// The errors of [`Engine::forward`].
    pub fn forward_sampled(
        &self,
        state: &mut State,
        tokens: &[u32],
        sampler: &mut Sampler,
        banned: &[u32],
        input: &mut SamplerInput,
    ) -> Result<()> {
        let top_k = sampler.top_k_request(banned);
        let kind = top_k.as_ref().map_or(OutputKind::LastLogits, OutputKind::TopK);
        self.run(std::slice::from_mut(state), tokens, kind, &mut |output| match output {
            Output::TopK(best) => *input = SamplerInput::TopK(best),
            Output::Logits { logits, .. } => match input {
                SamplerInput::Logits(kept) => std::mem::swap(kept, logits),
                SamplerInput::TopK(_) => *input = SamplerInput::Logits(std::mem::take(logits)),
            },
        })
    }

    /// Appends one token to each of several sequences in one pass over the weights. Returns the
    /// logits, [sequences, vocab], stored in the first state.
    ///
    /// # Errors
    /// The errors of [`Engine::forward`]; [`Error::Usage`] if `states` is empty or `tokens` has another
    /// length.
    pub fn forward_batch<'s>(&self, states: &'s mut [State], tokens: &[u32]) -> Result<&'s [f32]> {
        if states.is_empty() || states.len() != tokens.len() {
            return Err(Error::usage("a batch takes one token for each of its sequences"));
        }
        let mut all = std::mem::take(&mut states[0].logits);
        all.clear();
        let keep = &mut |output: Output<'_>| {
            if let Output::Logits { logits, .. } = output {
                all.extend_from_slice(logits);
            }
        };
        let done = self.run(states, tokens, OutputKind::AllLogits, keep);
        states[0].logits = all;
        done.map(|()| &states[0].logits[..])
    }

    /// Appends `tokens` and computes the logits after each of them. `sink(first, logits)` receives
    /// them in batches: the index of the first token and [n, vocab].
    ///
    /// # Errors
    /// The errors of [`Engine::forward`].
    pub fn forward_all(
        &self,
        state: &mut State,
        tokens: &[u32],
        mut sink: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let forward_logits = &mut |output: Output<'_>| {
            if let Output::Logits { first, logits } = output {
                sink(first, logits);
            }
        };
        self.run(std::slice::from_mut(state), tokens, OutputKind::AllLogits, forward_logits)
    }

    /// Appends `tokens` to one sequence, or one token to each of several. After an error the
    /// sequences have their former length.
    fn run(
        &self,
        states: &mut [State],
        tokens: &[u32],
        output: OutputKind<'_>,
        sink: &mut dyn FnMut(Output<'_>),
    ) -> Result<()> {
        self.check_tokens(states, tokens)?;
        // A batch of sequences takes one token for each of them.
        let is_batch = states.len() > 1;
        let size = if is_batch { tokens.len() } else { self.prefill_size(tokens.len()) };
        for (i, piece) in tokens.chunks(size).enumerate() {
            let is_last = (i + 1) * size >= tokens.len();
            let is_needed = is_last || matches!(output, OutputKind::AllLogits);
            let output = if is_needed { output } else { OutputKind::CacheOnly };
            let pass = Pass { tokens: piece, first: i * size, output };
            let before_call = states[0].tokens - i * size;
            if let Err(e) = self.run_pass(states, pass, sink) {
                // The KV caches of a failed pass may be longer than `tokens` says, so cut them in any case.
                for state in states {
                    state.truncate(if is_batch { state.tokens } else { before_call });
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// One pass over the weights.
    fn run_pass(
        &self,
        states: &mut [State],
        pass: Pass<'_>,
        sink: &mut dyn FnMut(Output<'_>),
    ) -> Result<()> {
        // A batch uses the scratch of its first sequence.
        let mut scratch = std::mem::take(&mut states[0].scratch);
        let on_host = self.host_layers() > 0;
        if on_host && let Err(e) = self.run_host_layers(states, pass.tokens, &mut scratch) {
            states[0].scratch = scratch;
            return Err(e);
        }
        let done = match &self.tail {
            Tail::Cpu => {
                self.run_lm_head(pass, &mut scratch, sink);
                Ok(())
            }
            Tail::Cuda(device) => {
                let hidden = on_host.then_some(&scratch.hidden[..]);
                let mut caches = DeviceCaches::new(states.iter_mut().map(State::device_cache));
                device.run(&mut caches, pass, hidden, sink)
            }
        };
        states[0].scratch = scratch;
        if done.is_ok() {
            let each = if states.len() == 1 { pass.tokens.len() } else { 1 };
            states.iter_mut().for_each(|state| state.tokens += each);
        }
        done
    }

    /// Embeds `tokens` and runs the layers on the CPU. The result, [tokens, hidden], is in
    /// `scratch.hidden`.
    fn run_host_layers(
        &self,
        states: &mut [State],
        tokens: &[u32],
        scratch: &mut ForwardScratch,
    ) -> Result<()> {
        let ForwardScratch { hidden, angles, attention, block, cpu, .. } = scratch;
        match &*states {
            [state] => {
                let positions = state.tokens..state.tokens + tokens.len();
                self.embed_with(&self.model.embeddings, tokens, positions.clone(), hidden)?;
                self.rope.angles(positions.map(|p| (p, state.context())), angles);
            }
            _ => {
                let positions = states.iter().map(|state| state.tokens);
                self.embed_with(&self.model.embeddings, tokens, positions, hidden)?;
                self.rope.angles(states.iter().map(|s| (s.tokens, s.context())), angles);
            }
        }
        for (i, layer) in self.model.layers[..self.host_layers()].iter().enumerate() {
            let mut ops = CpuOps {
                isa: self.isa,
                pool: &self.pool,
                norm: self.model.spec.norm(),
                activation: self.model.spec.activation,
                head_dim: self.model.spec.head_dim as usize,
                angles,
                attend: |x: QkvRows<'_>, settings| self.attend(states, i, attention, settings, x),
                scratch: cpu,
                observer: &mut (),
            };
            // The CPU cannot fail, and no observer stops the layer.
            let Ok(_) = run_block(&mut ops, layer, block, hidden);
        }
        Ok(())
    }

    /// Attention in decoder layer `layer`, for all tokens of one sequence or for one token of each
    /// sequence.
    fn attend(
        &self,
        states: &mut [State],
        layer: usize,
        scratch: &mut AttentionScratch,
        settings: AttentionSettings,
        x: QkvRows<'_>,
    ) {
        if let [state] = states {
            return state.caches[layer].attend(self.isa, &self.pool, scratch, settings, x);
        }
        let Heads { q_width, kv_width, .. } = Heads::of(&self.model.spec);
        let rows = x.q.chunks_exact(q_width).zip(x.out.chunks_exact_mut(q_width));
        let keys = x.k.chunks_exact(kv_width).zip(x.v.chunks_exact(kv_width));
        for ((state, (q, out)), (k, v)) in states.iter_mut().zip(rows).zip(keys) {
            let cache = &mut state.caches[layer];
            let x = QkvRows { q, k, v, out };
            cache.attend(self.isa, &self.pool, scratch, settings, x);
        }
    }

    /// Applies last norm and lm_head on the CPU to `scratch.hidden`, [tokens, hidden]. `sink` receives
    /// the logits.
    fn run_lm_head(
        &self,
        pass: Pass<'_>,
        scratch: &mut ForwardScratch,
        sink: &mut dyn FnMut(Output<'_>),
    ) {
        let ForwardScratch { hidden, normed, projected, logits, cpu, .. } = scratch;
        let width = self.model.hidden_size();
        let selected = match pass.output {
            OutputKind::CacheOnly => return,
            OutputKind::AllLogits => &hidden[..],
            OutputKind::LastLogits | OutputKind::TopK(_) => &hidden[hidden.len() - width..],
        };
        for (i, hidden) in selected.chunks(LOGITS_BATCH * width).enumerate() {
            let mut x = hidden;
            if self.model.spec.has_final_norm() {
                self.last_norm(&self.pool, hidden, normed);
                x = normed;
            }
            if let Some(project_out) = &self.model.project_out {
                apply(self.isa, &self.pool, &mut cpu.linear, [project_out], x, [&mut *projected]);
                x = projected;
            }
            // [n, vocab] = [n, embedding] · [vocab, embedding]ᵀ
            let lm_head = self.model.lm_head();
            apply(self.isa, &self.pool, &mut cpu.linear, [lm_head], x, [&mut *logits]);
            if let Some(cap) = self.model.spec.logit_soft_cap {
                self.pool.or_serial(logits.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
                    logits,
                    CAPPED_LOGITS,
                    |_, x| ops::soft_cap(self.isa, cap as f32, x),
                );
            }
            sink(Output::Logits { first: pass.first + i * LOGITS_BATCH, logits });
        }
    }

    /// The last norm of the model for `hidden`, [tokens, hidden], into `out`, which is resized.
    pub(crate) fn last_norm(&self, pool: &Pool, hidden: &[f32], out: &mut Vec<f32>) {
        let weights = NormWeights { weight: &self.model.norm, bias: self.model.norm_bias.as_ref() };
        let elementwise = Elementwise { isa: self.isa, pool };
        elementwise.norm_rows(hidden, weights, self.model.spec.norm(), out);
    }

    /// Writes the embeddings of `tokens` at the start of a sequence, [tokens, hidden], to `hidden`, which is
    /// resized.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a token is not in the vocabulary, [`Error::Usage`] if there are more tokens than
    /// positions.
    pub fn embed(&self, tokens: &[u32], hidden: &mut Vec<f32>) -> Result<()> {
        self.embed_with(&self.model.embeddings, tokens, 0..tokens.len(), hidden)
    }

    /// Like [`Engine::embed`], with the token embeddings of `table` and at any positions.
    ///
    /// # Errors
    /// The errors of [`Engine::embed`].
    pub fn embed_with(
        &self,
        table: &Weight,
        tokens: &[u32],
        positions: impl Iterator<Item = usize>,
        hidden: &mut Vec<f32>,
    ) -> Result<()> {
        self.check_vocabulary(tokens)?;
        let (width, rows) = (table.cols(), table.view());
        hidden.resize(tokens.len() * width, 0.0);
        let scale = self.model.spec.embedding_scale.map(|scale| scale as f32);
        let pool = self.pool.or_serial(hidden.len() > MIN_PARALLEL_ELEMENTS);
        pool.run_chunks(hidden, width, |first, out| {
            for (token, out) in tokens[first / width..].iter().zip(out.chunks_exact_mut(width)) {
                rows.decode_row(*token as usize, out);
                if let Some(scale) = scale {
                    out.iter_mut().for_each(|x| *x *= scale);
                }
            }
        });
        if let Some(project_in) = &self.model.project_in {
            let embedded = std::mem::take(hidden);
            let scratch = &mut LinearScratch::default();
            apply(self.isa, &self.pool, scratch, [project_in], &embedded, [hidden]);
        }
        let Some(learned) = &self.model.positions else { return Ok(()) };
        let mut embedding = vec![0.0; learned.cols()];
        for (position, x) in positions.zip(hidden.chunks_exact_mut(learned.cols())) {
            if position >= learned.rows() {
                let most = learned.rows();
                let why =
                    format!("the model has embeddings for {most} positions; shorten the text");
                return Err(Error::usage(why));
            }
            learned.view().decode_row(position, &mut embedding);
            x.iter_mut().zip(&embedding).for_each(|(x, e)| *x += e);
        }
        Ok(())
    }

    /// The prefill batch for `tokens` tokens: large enough for the q8 GEMM kernels, small enough to
    /// keep the activations in cache.
    fn prefill_size(&self, tokens: usize) -> usize {
        let kernel_batch = |w: &Weight| {
            let view = w.view();
            let kernel = packed(&view).gemm_q8().filter(|_| !self.exact)?;
            Some(kernel.prefill_batch(self.isa))
        };
        let layers = &self.model.layers[..self.host_layers()];
        let mut matrices =
            layers.iter().flat_map(Layer::matrices).filter(|(key, _)| *key != LayerMatrix::Router);
        let smallest = matrices
            .try_fold(MAX_PREFILL_BATCH, |most, (_, weight)| Some(most.min(kernel_batch(weight)?)));
        let most = smallest.unwrap_or(MAX_PREFILL_BATCH);
        // Batches of nearly equal size: a small last batch would cost almost as much as a full one.
        let count = tokens.div_ceil(most).max(1);
        tokens.div_ceil(count).next_multiple_of(PREFILL_GROUP)
    }

    /// The number of layers that the CPU computes: all, or those before the layers on a device.
    pub(crate) fn host_layers(&self) -> usize {
        match &self.tail {
            Tail::Cpu => self.model.layers.len(),
            Tail::Cuda(device) => device.host_layers(),
        }
    }

    /// Checks that `tokens` can be appended.
    fn check_tokens(&self, states: &[State], tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::usage("there are no tokens to continue from; give a prompt"));
        }
        match states {
            [state] => state.check_room(tokens.len())?,
            _ => states.iter().try_for_each(|state| state.check_room(1))?,
        }
        self.check_vocabulary(tokens)
    }

    fn check_vocabulary(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.model.embeddings.rows();
        match tokens.iter().find(|t| **t as usize >= vocabulary) {
            Some(token) => Err(Error::invalid(format!(
                "token {token} is outside the vocabulary of {vocabulary}"
            ))),
            None => Ok(()),
        }
    }
}
