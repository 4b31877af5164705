//! Steps on a device: batches of up to [`STEP_BATCH`] tokens.

use std::ops::ControlFlow;

use stb_format::arch::LinearInput;
use stb_kernels::cuda::{
    self, ActivationInput, ActivationPrecision, Attention, AttentionArgs, Buffer, Gemm, Gemv,
    Matrix, SlotMapping,
};

use super::caches::DeviceCaches;
use super::common::{kernel_input, matrix_only, missing_kernel, residual_matrix_only};
use super::model::DeviceModel;
use super::scratch::{GEMV_BATCH, STEP_BATCH, StepScratch};
use crate::block::{
    AttentionBuffers, AttentionLayer, BlockInput, BlockOps, Flow, LinearWeights, NormWeights,
    ResidualLinear, run_block,
};
use crate::error::{Error, Result};
use crate::experts::ExpertsLayer;
use crate::pass::{OutputKind, Pass};

/// `ready(scratch, first, count)` is called when the logits of tokens `first..first + count` of the
/// pass are in `scratch`.
pub(super) type LogitsReady<'a> = dyn FnMut(&mut StepScratch, usize, usize) -> Result<()> + 'a;

impl DeviceModel {
    /// Runs all steps of a pass.
    pub(super) fn steps(
        &self,
        scratch: &mut StepScratch,
        caches: &mut DeviceCaches<'_>,
        pass: Pass<'_>,
        hidden: Option<&[f32]>,
        ready: &mut LogitsReady<'_>,
    ) -> Result<()> {
        let (tokens, width) = (pass.tokens, self.norm.len());
        // Larger batches use tensor cores, which round to f16.
        let most = if self.precision == ActivationPrecision::F32 { GEMV_BATCH } else { STEP_BATCH };
        for first in (0..tokens.len()).step_by(most) {
            let count = most.min(tokens.len() - first);
            caches.assign_slots(&mut scratch.slots, &self.device, self.attention, first, count)?;
            match hidden {
                Some(hidden) => {
                    scratch.hidden.write(&hidden[first * width..(first + count) * width])?;
                }
                None => scratch.ids.write(&tokens[first..first + count])?,
            }
            let is_end = first + count == tokens.len();
            let with_logits = match pass.output {
                OutputKind::AllLogits => 0..count,
                OutputKind::LastLogits | OutputKind::TopK(_) if is_end => count - 1..count,
                OutputKind::LastLogits
                | OutputKind::TopK(_)
                | OutputKind::CacheOnly
                | OutputKind::Hidden => count..count,
            };
            if count == 1 && with_logits == (0..1) {
                self.run_single(scratch)?;
            } else {
                self.queue_layers(scratch, count, scratch.slots.visible())?;
            }
            for from in with_logits.clone().step_by(GEMV_BATCH) {
                let batch = GEMV_BATCH.min(with_logits.end - from);
                if count > 1 || from > 0 {
                    self.queue_logits(scratch, from, batch)?;
                }
                ready(scratch, first + from, batch)?;
            }
        }
        Ok(())
    }

    /// Runs a step of one token. Its graph is recorded at the second step with the same number of
    /// visible tokens, rounded up to a power of two.
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
                        // Steps return no other errors.
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

    /// Queues the layers for `tokens` tokens. The last one attends to `visible` tokens.
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
            precision: self.precision,
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

    /// Queues the logits of tokens `first..first + n` of the step; `n` is at most [`GEMV_BATCH`].
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
        Ok(gemv.queue(&[self.lm_head()], normed, self.precision, &mut [logits], false, n)?)
    }
}

/// [`BlockOps`] with packed matrices.
struct StepOps<'a> {
    gemv: &'a mut Gemv,
    gemm: &'a mut Gemm,
    attend: &'a mut Attention,
    slots: &'a SlotMapping,
    precision: ActivationPrecision,
    eps: f32,
    tokens: usize,
    /// The number of tokens that the last one attends to.
    visible: usize,
    /// Index among the layers on the device.
    layer: usize,
}

impl StepOps<'_> {
    /// Queues `out[i] = x · matrices[i]ᵀ`, or `+=` with `add`: GEMV kernels for up to [`GEMV_BATCH`]
    /// tokens, GEMM on tensor cores for more.
    fn queue(
        &mut self,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        matrices: &[&Matrix],
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Flow<Error> {
        let input = kernel_input(x, self.eps)?;
        if self.tokens <= GEMV_BATCH {
            self.gemv.queue(matrices, input, self.precision, out, add, self.tokens)?;
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
        weights: [LinearWeights<'_, Matrix, Buffer<f32>>; N],
        mut out: [&mut Buffer<f32>; N],
    ) -> Flow<Error> {
        let matrices = weights.iter().map(matrix_only).collect::<Result<Vec<_>>>()?;
        self.queue(x, &matrices, &mut out, false)
    }

    fn linear_residual(
        &mut self,
        _: LinearInput,
        x: BlockInput<'_, Buffer<f32>, Buffer<f32>>,
        output: ResidualLinear<'_, Matrix, Buffer<f32>>,
        residual: &mut Buffer<f32>,
    ) -> Flow<Error> {
        self.queue(x, &[residual_matrix_only(&output)?], &mut [residual], true)
    }

    fn experts(
        &mut self,
        _: NormWeights<'_, Buffer<f32>>,
        _: ExpertsLayer<'_, Matrix>,
        _: &mut Buffer<f32>,
    ) -> Flow<Error> {
        Err(missing_kernel("mixtures of experts"))
    }

    fn normalize(&mut self, _: &mut Buffer<f32>, _: NormWeights<'_, Buffer<f32>>) -> Result<()> {
        Err(missing_kernel("norms of the residual stream"))
    }

    fn attend(
        &mut self,
        _: AttentionLayer<'_, Buffer<f32>>,
        x: AttentionBuffers<'_, Buffer<f32>>,
    ) -> Result<()> {
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
