//! Entry points of the forward pass, and the embeddings of tokens.

use stb_kernels::packed;

use crate::elementwise::MIN_PARALLEL_ELEMENTS;
use crate::engine::{Engine, Tail};
use crate::error::{Error, Result};
use crate::layer::{Layer, LayerMatrix};
use crate::linear::{LinearScratch, RowKind, Rows, apply};
use crate::pass::{Output, OutputKind, OutputSink, Segment};
use crate::sampler::{Sampler, SamplerInput};
use crate::state::State;
use crate::weights::Weight;

/// The largest prefill batch: large, so that unpacking the weights is amortized where no q8 GEMM kernel
/// exists.
const MAX_PREFILL_BATCH: usize = 512;
/// Prefill batches are multiples of this, which is a multiple of the tokens that any GEMM kernel processes
/// together (8, 16 or 32).
const PREFILL_GROUP: usize = 32;

impl Engine {
    /// Appends `tokens` and returns the logits after the last one, `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Usage`] if `tokens` is empty or does not fit into the context; [`Error::Invalid`] if a
    /// token is not in the vocabulary; [`Error::Device`] if the device fails. After an error the
    /// sequence has its former length.
    pub fn forward<'s>(&self, state: &'s mut State, tokens: &[u32]) -> Result<&'s [f32]> {
        let mut kept = std::mem::take(&mut state.logits);
        let kind = RowKind::of_prompt(tokens.len());
        let done = self.run(state, tokens, kind, OutputKind::LastLogits, &mut |_, output| {
            if let Output::Logits { logits, .. } = output {
                kept.clear();
                kept.extend_from_slice(logits);
            }
        });
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
        let kind = RowKind::of_prompt(tokens.len());
        self.sampled(state, (tokens, kind), sampler, banned, input)
    }

    /// [`Engine::forward_sampled`] for tokens of the given role.
    pub(crate) fn sampled(
        &self,
        state: &mut State,
        (tokens, kind): (&[u32], RowKind),
        sampler: &mut Sampler,
        banned: &[u32],
        input: &mut SamplerInput,
    ) -> Result<()> {
        let top_k = sampler.top_k_request(banned);
        let output = top_k.as_ref().map_or(OutputKind::LastLogits, OutputKind::TopK);
        self.run(state, tokens, kind, output, &mut |_, output| match output {
            Output::TopK(best) => *input = SamplerInput::TopK(best),
            Output::Logits { logits, .. } => match input {
                SamplerInput::Logits(kept) => {
                    kept.clear();
                    kept.extend_from_slice(logits);
                }
                SamplerInput::TopK(_) => *input = SamplerInput::Logits(logits.to_vec()),
            },
            Output::Hidden { .. } => {}
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
        let sequences = states.iter_mut().zip(tokens.chunks(1)).enumerate();
        let mut segments: Vec<Segment<'_>> = sequences
            .map(|(id, (state, token))| {
                let (kind, output) = (RowKind::Decode, OutputKind::LastLogits);
                Segment::new(id, &mut state.cache, token, kind, output)
            })
            .collect();
        // Sequences of one role keep their order.
        let done = self.run_pass(&mut segments, &mut |output| {
            if let Output::Logits { logits, .. } = output {
                all.extend_from_slice(logits);
            }
        });
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
        let kind = RowKind::of_prompt(tokens.len());
        self.run(state, tokens, kind, OutputKind::AllLogits, &mut |before, output| {
            if let Output::Logits { first, logits, .. } = output {
                sink(before + first, logits);
            }
        })
    }

    /// Appends `tokens` to one sequence, in as many passes as are fastest. `sink` also receives the number of tokens
    /// before the pass. After an error the sequence has its former length.
    fn run(
        &self,
        state: &mut State,
        tokens: &[u32],
        kind: RowKind,
        output: OutputKind<'_>,
        sink: &mut dyn FnMut(usize, Output<'_>),
    ) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::usage("there are no tokens to continue from; give a prompt"));
        }
        state.cache.check_room(tokens.len())?;
        self.check_vocabulary(tokens)?;
        let (size, length) = (self.prefill_size(tokens.len()), state.len());
        for (i, piece) in tokens.chunks(size).enumerate() {
            let is_last = (i + 1) * size >= tokens.len();
            let is_needed = is_last || matches!(output, OutputKind::AllLogits);
            let output = if is_needed { output } else { OutputKind::CacheOnly };
            let segment = Segment::new(0, &mut state.cache, piece, kind, output);
            let sink: &mut OutputSink<'_> = &mut |output| sink(i * size, output);
            if let Err(e) = self.run_pass(&mut [segment], sink) {
                state.truncate(length);
                return Err(e);
            }
        }
        Ok(())
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
        let prefill = if tokens.len() > 1 { tokens.len() } else { 0 };
        self.embed_rows((table, prefill), tokens, positions, hidden)
    }

    /// [`Engine::embed_with`] for a table and a number of prefill rows; decode rows follow them.
    pub(crate) fn embed_rows(
        &self,
        (table, prefill): (&Weight, usize),
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
            let rows = Rows { x: &embedded, prefill };
            apply(self.isa, &self.pool, scratch, [project_in], rows, [hidden]);
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
    pub(crate) fn prefill_size(&self, tokens: usize) -> usize {
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

    /// Checks that all tokens are in the vocabulary.
    pub(crate) fn check_vocabulary(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.model.embeddings.rows();
        match tokens.iter().find(|t| **t as usize >= vocabulary) {
            Some(token) => Err(Error::invalid(format!(
                "token {token} is outside the vocabulary of {vocabulary}"
            ))),
            None => Ok(()),
        }
    }
}
