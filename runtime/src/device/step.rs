//! Steps of the decoder on a device: up to [`STEP_BATCH`] tokens through its layers.

use std::ops::ControlFlow;

use stb_format::arch::LinearInput;
use stb_kernels::cuda::{
    self, ActivationInput, ActivationPrecision, Attention, AttentionArgs, Buffer, Gemm, Gemv,
    Matrix, SlotMapping,
};

use super::caches::DeviceCaches;
use super::common::kernel_input;
use super::model::DeviceModel;
use super::scratch::{GEMV_BATCH, STEP_BATCH, StepScratch};
use crate::block::{AttentionBuffers, BlockInput, BlockOps, Flow, run_block};
use crate::error::{Error, Result};
use crate::pass::{Pass, Want};

/// Called when the logits of `count` tokens from token `first` of the pass on are ready:
/// `(scratch, first, count)`.
pub(super) type LogitsReady<'a> = dyn FnMut(&mut StepScratch, usize, usize) -> Result<()> + 'a;

impl DeviceModel {
    /// All steps of a pass.
    pub(super) fn steps(
        &self,
        scratch: &mut StepScratch,
        caches: &mut DeviceCaches<'_>,
        pass: Pass<'_>,
        hidden: Option<&[f32]>,
        ready: &mut LogitsReady<'_>,
    ) -> Result<()> {
        let (tokens, width) = (pass.tokens, self.norm.len());
        // Without tensor cores, whose products round to f16, there is nothing to gain from more.
        let most = if self.numbers == ActivationPrecision::F32 { GEMV_BATCH } else { STEP_BATCH };
        for first in (0..tokens.len()).step_by(most) {
            let count = most.min(tokens.len() - first);
            caches.place(&mut scratch.slots, &self.device, self.attention, first, count)?;
            match hidden {
                Some(hidden) => {
                    scratch.hidden.write(&hidden[first * width..(first + count) * width])?;
                }
                None => scratch.ids.write(&tokens[first..first + count])?,
            }
            let is_end = first + count == tokens.len();
            let wanted = match pass.want {
                Want::AllLogits => 0..count,
                Want::LastLogits | Want::TopK(_) if is_end => count - 1..count,
                Want::LastLogits | Want::TopK(_) | Want::Cache => count..count,
            };
            if count == 1 && wanted == (0..1) {
                self.run_single(scratch)?;
            } else {
                self.queue_layers(scratch, count, scratch.slots.visible())?;
            }
            for from in wanted.clone().step_by(GEMV_BATCH) {
                let some = GEMV_BATCH.min(wanted.end - from);
                if count > 1 || from > 0 {
                    self.queue_logits(scratch, from, some)?;
                }
                ready(scratch, first + from, some)?;
            }
        }
        Ok(())
    }

    /// A step of one token: a graph, recorded at the second step with as many tokens to see (rounded up).
    fn run_single(&self, scratch: &mut StepScratch) -> Result<()> {
        let visible = scratch.slots.visible().next_power_of_two().max(256);
        match scratch.graphs.remove(&visible) {
            Some(Some(mut graph)) => {
                graph.run()?;
                scratch.graphs.insert(visible, Some(graph));
            }
            Some(None) => {
                let mut graph = self.device.record(|| {
                    self.queue_single(scratch, visible).map_err(|e| match e {
                        Error::Device { error } => error,
                        // Nothing else can fail in a step.
                        other => cuda::Error::Unsupported { why: other.to_string() },
                    })
                })?;
                graph.run()?;
                scratch.graphs.insert(visible, Some(graph));
            }
            None => {
                self.queue_single(scratch, visible)?;
                scratch.graphs.insert(visible, None);
            }
        }
        Ok(())
    }

    /// Queues a step of one token with its logits.
    fn queue_single(&self, scratch: &mut StepScratch, visible: usize) -> Result<()> {
        self.queue_layers(scratch, 1, visible)?;
        self.queue_logits(scratch, 0, 1)
    }

    /// Queues the layers for `tokens` tokens, of which the last sees `visible`.
    fn queue_layers(&self, scratch: &mut StepScratch, tokens: usize, visible: usize) -> Result<()> {
        let StepScratch { gemv, gemm, attend, slots, ids, hidden, block, .. } = scratch;
        if self.first == 0
            && let Some(embeddings) = &self.embeddings
        {
            gemv.queue_rows(embeddings, ids, tokens, hidden)?;
        }
        let mut ops = StepOps {
            gemv,
            gemm,
            attend,
            slots,
            numbers: self.numbers,
            eps: self.eps,
            tokens,
            visible,
            layer: 0,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            ops.layer = index;
            let _ = run_block(&mut ops, layer, block, hidden)?;
        }
        Ok(())
    }

    /// Queues the logits of `n` tokens of the step from token `first` on, at most [`GEMV_BATCH`].
    fn queue_logits(&self, scratch: &mut StepScratch, first: usize, n: usize) -> Result<()> {
        let StepScratch { gemv, hidden, last, logits, .. } = scratch;
        let width = self.norm.len();
        let x = if first == 0 {
            &*hidden
        } else {
            last.copy_part(0, hidden, first * width, n * width)?;
            &*last
        };
        let normed = ActivationInput::RmsNorm { x, weight: &self.norm, eps: self.eps };
        Ok(gemv.queue(&[self.lm_head()], normed, self.numbers, &mut [logits], false, n)?)
    }
}

/// The decoder layer with packed matrices.
struct StepOps<'a> {
    gemv: &'a mut Gemv,
    gemm: &'a mut Gemm,
    attend: &'a mut Attention,
    slots: &'a SlotMapping,
    numbers: ActivationPrecision,
    eps: f32,
    tokens: usize,
    /// Tokens that the last one sees.
    visible: usize,
    /// Which of the layers on the device this is.
    layer: usize,
}

impl StepOps<'_> {
    /// Queues `out[i]` (+)= `x` · `matrices[i]`ᵀ: for a few tokens with kernels that read the weights
    /// once, for many on tensor cores.
    fn queue(
        &mut self,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        matrices: &[&Matrix],
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Flow<Error> {
        let input = kernel_input(x, self.eps);
        if self.tokens <= GEMV_BATCH {
            self.gemv.queue(matrices, input, self.numbers, out, add, self.tokens)?;
        } else {
            self.gemm.queue(matrices, input, out, add, self.tokens)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl BlockOps for StepOps<'_> {
    type Matrix = Matrix;
    type Vector = Buffer<f32>;
    type Buffer = Buffer<f32>;
    type Residual = Buffer<f32>;
    type Error = Error;

    fn linear<const N: usize>(
        &mut self,
        _: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        matrices: [&Matrix; N],
        mut out: [&mut Buffer<f32>; N],
    ) -> Flow<Error> {
        self.queue(x, &matrices, &mut out, false)
    }

    fn linear_residual(
        &mut self,
        _: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        matrix: &Matrix,
        residual: &mut Buffer<f32>,
    ) -> Flow<Error> {
        self.queue(x, &[matrix], &mut [residual], true)
    }

    fn attention(&mut self, x: AttentionBuffers<'_, Buffer<f32>>) -> Result<()> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        Ok(self.attend.queue(AttentionArgs {
            slots: self.slots,
            layer: self.layer,
            visible: self.visible,
            q,
            k,
            v,
            out: attn_out,
        })?)
    }
}
