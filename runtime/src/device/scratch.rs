//! Reusable memory of steps on a device.

use std::collections::HashMap;

use stb_kernels::cuda::{
    Attention, AttentionShape, Buffer, Device, Gemm, Gemv, Graph, SlotMapping, TopK,
};

use crate::block::BlockScratch;
use crate::error::Result;
use crate::model::Model;
use crate::rope::Rope;

/// Tokens that the GEMV kernels compute at most, and that get logits at a time.
pub(super) const GEMV_BATCH: usize = 16;
/// Tokens of a step at most: bounds the memory for activations.
pub(super) const STEP_BATCH: usize = 512;

/// Reusable memory of steps.
#[derive(Debug)]
pub(super) struct StepScratch {
    pub gemv: Gemv,
    pub gemm: Gemm,
    pub attend: Attention,
    pub slots: SlotMapping,
    pub ids: Buffer<u32>,
    /// The residual stream, [tokens, hidden].
    pub hidden: Buffer<f32>,
    pub block: BlockScratch<Buffer<f32>>,
    /// Rows of `hidden` that get logits, [`GEMV_BATCH`, hidden].
    pub last: Buffer<f32>,
    /// [`GEMV_BATCH`, vocabulary].
    pub logits: Buffer<f32>,
    pub candidates: TopK,
    /// Recorded steps of one token by the tokens that it may see; `None` after the first such step,
    /// which has allocated everything.
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
            attend: Attention::new(device, attention, &Rope::new(&model.spec).frequencies)?,
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
