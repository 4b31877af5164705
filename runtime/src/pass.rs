//! One pass over the weights: the tokens of each sequence, and the outputs that the caller requests.

use stb_kernels::cuda::TopKRequest;

use crate::kv_cache::KvCache;
use crate::linear::{RowKind, Rows};

/// A prompt of fewer tokens is computed as decode rows: GEMV is faster for so few.
pub const SHORT_PROMPT: usize = 16;

impl RowKind {
    /// The role of the rows of a prompt of `tokens` tokens. It depends on nothing else, so a prompt has the same
    /// result however it is cut and whatever is computed beside it.
    pub(crate) fn of_prompt(tokens: usize) -> Self {
        if tokens < SHORT_PROMPT { Self::Decode } else { Self::Prefill }
    }
}

impl<'a> Rows<'a> {
    /// The rows of a whole prompt, [tokens, cols], in the role that follows from their number.
    #[must_use]
    pub fn of_prompt(x: &'a [f32], cols: usize) -> Self {
        let tokens = x.len() / cols;
        let prefill = match RowKind::of_prompt(tokens) {
            RowKind::Prefill => tokens,
            RowKind::Decode => 0,
        };
        Self { x, prefill }
    }
}

/// The output that the caller requests for a sequence.
#[derive(Clone, Copy)]
pub(crate) enum OutputKind<'a> {
    /// No output: the pass only fills the KV cache.
    CacheOnly,
    /// The logits after the last token, as of a decode row.
    LastLogits,
    /// The logits after every token.
    AllLogits,
    /// The most likely tokens after the last one. The CPU returns all logits instead.
    TopK(&'a TopKRequest<'a>),
    /// The hidden state of every token after the last norm.
    Hidden,
}

/// An output of a pass.
pub(crate) enum Output<'a> {
    /// Logits of some tokens of a sequence.
    Logits {
        /// The number of the sequence, see [`Segment::id`].
        id: usize,
        /// Index of the first token in the tokens of the sequence.
        first: usize,
        /// [n, vocab].
        logits: &'a [f32],
    },
    /// The most likely tokens with their logits, best first.
    TopK(Vec<(u32, f32)>),
    /// Hidden states of some tokens of a sequence.
    Hidden {
        /// The number of the sequence.
        id: usize,
        /// [n, hidden].
        rows: &'a [f32],
    },
}

/// Receives the outputs of a pass.
pub(crate) type OutputSink<'a> = dyn FnMut(Output<'_>) + 'a;

/// What one sequence receives in a pass.
pub(crate) struct Segment<'a> {
    /// A number that the caller chooses.
    pub id: usize,
    /// The keys and values of the sequence, to which those of the tokens are appended.
    pub cache: &'a mut KvCache,
    /// The number of tokens.
    pub count: usize,
    /// The ids of the tokens; empty if the caller has embedded them.
    pub tokens: &'a [u32],
    /// The role of the tokens.
    pub kind: RowKind,
    pub output: OutputKind<'a>,
}

impl<'a> Segment<'a> {
    /// `tokens` for the sequence with this cache.
    pub(crate) fn new(
        id: usize,
        cache: &'a mut KvCache,
        tokens: &'a [u32],
        kind: RowKind,
        output: OutputKind<'a>,
    ) -> Self {
        Self { id, cache, count: tokens.len(), tokens, kind, output }
    }
}

/// The number of prefill rows of a pass, which come first.
pub(crate) fn prefill_rows(segments: &[Segment<'_>]) -> usize {
    segments.iter().filter(|s| s.kind == RowKind::Prefill).map(|s| s.count).sum()
}

/// The tokens of a pass on a device: of one sequence, or one of each of several.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub tokens: &'a [u32],
    pub output: OutputKind<'a>,
}
