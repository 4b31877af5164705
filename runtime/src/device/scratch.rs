//! Reusable buffers of steps on a device.

use std::collections::HashMap;

use stb_kernels::cuda::{
    Attention, AttentionShape, Buffer, Device, Gemm, Gemv, Graph, SlotMapping, TopK,
};

use crate::block::BlockScratch;
use crate::error::Result;
use crate::model::Model;
use crate::rope::Rope;

/// The largest batch of the GEMV kernels, and of the lm_head.
pub(super) const GEMV_BATCH: usize = 16;
/// The largest number of tokens of a step: bounds the memory for activations.
pub(super) const STEP_BATCH: usize = 512;

/// Kernels and reusable buffers of steps.
#[derive(Debug)]
pub(super) struct StepScratch {
    pub gemv: Gemv,
    pub gemm: Gemm,
    pub attend: Attention,
    pub slots: SlotMapping,
    /// Token ids.
    pub ids: Buffer<u32>,
    /// The residual stream, [tokens, hidden].
    pub hidden: Buffer<f32>,
    pub block: BlockScratch<Buffer<f32>>,
    /// A copy of the rows of `hidden` for which logits are computed, [`GEMV_BATCH`, hidden].
    pub last: Buffer<f32>,
    /// Logits, [`GEMV_BATCH`, vocabulary].
    pub logits: Buffer<f32>,
    pub candidates: TopK,
    /// Recorded steps of one token, by the number of visible tokens. `None` after the first such step,
    /// which runs unrecorded because it allocates memory.
    pub graphs: HashMap<usize, Option<Graph>>,
}

impl StepScratch {
    pub(super) fn new(
        device: &Device,
        model: &Model,
        attention: AttentionShape,
        exact: bool,
    ) -> Result<Self> {
        let most = if exact { GEMV_BATCH } else { STEP_BATCH };
        let make = |width: usize| device.zeros("activations", most * width);
        let intermediate = model.spec.block(0).mlp.intermediate_size as usize;
        let (hidden, heads) = (model.hidden_size(), attention.heads * attention.width);
        let kv = attention.kv_heads * attention.width;
        Ok(Self {
            gemv: Gemv::new(device)?,
            gemm: Gemm::new(device)?,
            attend: Attention::new(device, attention, &Rope::new(&model.spec).global.frequencies)?,
            slots: SlotMapping::new(device, STEP_BATCH)?,
            ids: device.zeros("tokens", STEP_BATCH)?,
            hidden: make(hidden)?,
            block: BlockScratch {
                q: make(heads)?,
                k: make(kv)?,
                v: make(kv)?,
                attn_out: make(heads)?,
                gate: make(intermediate)?,
                up: make(intermediate)?,
            },
            last: device.zeros("hidden states", GEMV_BATCH * hidden)?,
            logits: device.zeros("logits", GEMV_BATCH * model.lm_head().rows())?,
            candidates: TopK::new(device)?,
            graphs: HashMap::new(),
        })
    }
}
