//! Attention on a device.

use super::kv_cache::KvSlot;
use super::shape::{AttentionAddresses, AttentionBatch, AttentionShape, RopeAddresses};
use super::slots::SlotMapping;
use crate::cuda::device::{Buffer, Device, KeepAlive};
use crate::cuda::error::Result;
use crate::cuda::scratch::SplitScratch;

/// The most tokens of a launch of the decode kernel.
const LAUNCH_TOKENS: usize = 64;

/// The arguments of [`Attention::queue`].
#[derive(Debug)]
pub struct AttentionArgs<'a> {
    /// The caches and positions of the tokens.
    pub slots: &'a SlotMapping,
    /// The decoder layer, as numbered in the caches.
    pub layer: usize,
    /// The most tokens that one of them may attend to, at least [`SlotMapping::visible`]. A recorded
    /// graph can be used until a token attends to more.
    pub visible: usize,
    /// Queries, [tokens, heads · width], rotated in place.
    pub q: &'a mut Buffer<f32>,
    /// Keys, [tokens, kv_heads · width].
    pub k: &'a Buffer<f32>,
    /// Values, [tokens, kv_heads · width].
    pub v: &'a Buffer<f32>,
    /// The attention output, [tokens, heads · width].
    pub out: &'a mut Buffer<f32>,
}

/// Attention on one device, with its memory.
#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    frequencies: Buffer<f32>,
    scratch: SplitScratch,
    device: Device,
}

impl Attention {
    /// `frequencies` are the radians per position of each pair of a head, `[width / 2]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::cuda::Error::Unsupported) for shapes without a kernel; [`Error::Compiler`](crate::cuda::Error::Compiler), [`Error::Driver`](crate::cuda::Error::Driver).
    ///
    /// # Panics
    /// If the number of frequencies is wrong.
    pub fn new(device: &Device, shape: AttentionShape, frequencies: &[f32]) -> Result<Self> {
        shape.check()?;
        assert_eq!(frequencies.len(), shape.width / 2, "a frequency per pair");
        Ok(Self {
            shape,
            frequencies: device.upload("frequencies", frequencies)?,
            scratch: SplitScratch::new(device)?,
            device: device.clone(),
        })
    }

    /// Queues the attention of one layer between its projections: rotates `q` and `k`, appends `k` and
    /// `v` to the caches, and writes the attention output.
    ///
    /// # Errors
    /// [`crate::cuda::Error::Memory`], [`crate::cuda::Error::Driver`].
    ///
    /// # Panics
    /// If slots are not set or are of caches of another shape, a buffer is too small, the layer does
    /// not exist, or `visible` is too small.
    pub fn queue(&mut self, args: AttentionArgs<'_>) -> Result<()> {
        let AttentionArgs { slots, layer, visible, q, k, v, out } = args;
        let (shape, tokens) = (self.shape, slots.tokens());
        assert!(slots.shape == Some(shape) && layer < shape.layers, "caches of this shape");
        assert!(visible >= slots.visible(), "all tokens are visible");
        let [q_width, kv_width] = [shape.heads, shape.kv_heads].map(|heads| heads * shape.width);
        assert!(q.len().min(out.len()) >= tokens * q_width, "room for the heads");
        assert!(k.len().min(v.len()) >= tokens * kv_width, "whole keys and values");
        let held: KeepAlive = slots.held.clone();
        self.device.keep(&held);
        let rope = RopeAddresses {
            q: q.address(),
            k: k.address(),
            v: v.address(),
            frequencies: self.frequencies.address(),
            slots: slots.slots.address(),
        };
        let at = AttentionAddresses { q: rope.q, out: out.address(), slots: rope.slots };
        let rope = shape.plan_rope(rope, layer, tokens)?;
        // SAFETY: queries, keys and values have room for the tokens. The slots refer to caches of this
        // shape with room for their positions, which `held` keeps alive, and the caches have this
        // layer.
        unsafe { self.device.launch(&rope) }?;
        if slots.is_consecutive
            && let Some(prefill) = shape.plan_prefill(at, layer, tokens)?
        {
            // SAFETY: as above. Queries and results have room for the tokens, which are consecutive in
            // the cache of the first slot.
            return unsafe { self.device.launch(&prefill) };
        }
        self.queue_decode(at, AttentionBatch { layer, tokens, visible })
    }

    /// Queues the decode kernel, for some of the tokens at a time: the partial sums of many tokens
    /// over a long context would take more memory than the cache.
    ///
    /// The caller has checked that the addresses are of live buffers with room for the tokens.
    fn queue_decode(&mut self, at: AttentionAddresses, batch: AttentionBatch) -> Result<()> {
        let AttentionBatch { layer, tokens, visible } = batch;
        let step = tokens.min(LAUNCH_TOKENS);
        let scratch = self.scratch.reserve(self.shape.decode_scratch(step, visible))?;
        for first in (0..tokens).step_by(step) {
            let row = (first * self.shape.heads * self.shape.width * size_of::<f32>()) as u64;
            let at = AttentionAddresses {
                q: at.q + row,
                out: at.out + row,
                slots: at.slots + (first * size_of::<KvSlot>()) as u64,
            };
            let batch = AttentionBatch { layer, tokens: step.min(tokens - first), visible };
            let decode = self.shape.plan_decode(at, scratch, batch)?;
            // SAFETY: as in `queue`. The scratch memory is for `step` tokens and `visible` keys.
            unsafe { self.device.launch(&decode) }?;
        }
        Ok(())
    }
}
