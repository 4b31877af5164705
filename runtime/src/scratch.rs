//! Reusable buffers of passes.

use std::sync::{Mutex, PoisonError};

use crate::attention::AttentionScratch;
use crate::block::BlockScratch;
use crate::cpu::CpuScratch;
use crate::rope::RopeAngles;

/// Reusable buffers of a pass.
#[derive(Debug, Default)]
pub(crate) struct ForwardScratch {
    /// The ids of the tokens.
    pub tokens: Vec<u32>,
    /// The residual stream, [tokens, hidden].
    pub hidden: Vec<f32>,
    /// The rows of the residual stream for which logits are computed, [n, hidden].
    pub selected: Vec<f32>,
    pub head: HeadScratch,
    pub angles: RopeAngles,
    pub attention: AttentionScratch,
    pub block: BlockScratch<Vec<f32>>,
    pub cpu: CpuScratch,
}

/// Buffers of the last norm and the lm_head.
#[derive(Debug, Default)]
pub(crate) struct HeadScratch {
    /// The residual stream after the last norm, [tokens, hidden].
    pub normed: Vec<f32>,
    /// The input of the lm_head if it is narrower than the residual stream, [tokens, embedding].
    pub projected: Vec<f32>,
    /// Logits, [tokens, vocab].
    pub logits: Vec<f32>,
}

/// The buffers of an engine that no pass uses. There are as many as passes have run at the same time.
#[derive(Debug, Default)]
pub(crate) struct ScratchPool(Mutex<Vec<ForwardScratch>>);

impl ScratchPool {
    /// Buffers for a pass; with `q8`, linear layers may quantize their activations to 8 bits.
    pub(crate) fn take(&self, q8: bool) -> ForwardScratch {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = kept.unwrap_or_default();
        scratch.cpu.linear.set_q8(q8);
        scratch
    }

    /// Keeps `scratch` for the next pass.
    pub(crate) fn put(&self, scratch: ForwardScratch) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}
