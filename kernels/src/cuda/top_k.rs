//! The most likely tokens of a step, selected on the device.

use bytemuck::{Pod, Zeroable};

use super::device::{Buffer, Device};
use super::error::Result;
use super::launch::{Launch, LaunchShape, to_u32};
use super::module::{Module, module};

/// The module of top_k.cu.
pub(super) const MODULE: Module = module!("top_k", "top_k.cu");

/// `SORT_THREADS` and `SORT_KEYS` of top_k.cu.
const THREADS: u32 = 512;
const SORT_KEYS: usize = 1024;
/// The most blocks. One of them sorts the keys that all of them keep.
const BLOCKS: usize = 64;

/// `TopKParams` of top_k.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct TopKParams {
    x: u64,
    changed: u64,
    partial: u64,
    arrived: u64,
    out: u64,
    n: u32,
    count: u32,
    penalized: u32,
    banned: u32,
    slice: u32,
    penalty: f32,
    greedy: u32,
    padding: u32,
}

/// A request for the most likely tokens.
#[derive(Clone, Copy, Debug)]
pub struct TopKRequest<'a> {
    /// The number of tokens, at most [`TopK::MAX_COUNT`].
    pub count: usize,
    /// Whether only the best token counts. NaN is then never the largest, and both zeros are equal.
    /// Otherwise logits are in the order of [`f32::total_cmp`].
    pub greedy: bool,
    /// Positive logits of `penalized` tokens are divided by it, others are multiplied with it.
    pub penalty: f32,
    /// Penalized tokens, without duplicates; with `banned` at most [`TopK::MAX_CHANGED`].
    pub penalized: &'a [u32],
    /// Tokens whose logit counts as −∞.
    pub banned: &'a [u32],
}

/// Selects tokens on one device, with its memory.
#[derive(Debug)]
pub struct TopK {
    device: Device,
    changed: Buffer<u32>,
    partial: Buffer<u64>,
    arrived: Buffer<u32>,
    out: Buffer<u32>,
}

impl TopK {
    /// The most tokens of a request.
    pub const MAX_COUNT: usize = 128;
    /// The most tokens whose logits can be changed: `MAX_CHANGED` of top_k.cu.
    pub const MAX_CHANGED: usize = 512;

    /// Allocates the memory.
    ///
    /// # Errors
    /// [`super::Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            changed: device.zeros("changed tokens", Self::MAX_CHANGED)?,
            partial: device.zeros("top-k tokens", BLOCKS * Self::MAX_COUNT)?,
            arrived: device.zeros("counters", 1)?,
            out: device.zeros("top-k tokens", 2 * Self::MAX_COUNT)?,
        })
    }

    /// The most likely tokens of `logits`, `[n]`, with their logits: the best first, and the lower
    /// token first among equals. Returns all tokens if there are fewer than requested. Waits for
    /// queued work.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for sizes above 2^30, [`super::Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small, or for more tokens than the constants allow.
    pub fn find(
        &mut self,
        logits: &Buffer<f32>,
        n: usize,
        request: &TopKRequest<'_>,
    ) -> Result<Vec<(u32, f32)>> {
        let TopKRequest { count, greedy, penalty, penalized, banned } = *request;
        assert!(logits.len() >= n && n > 0, "logits of all tokens");
        assert!((1..=Self::MAX_COUNT).contains(&count), "up to {} tokens", Self::MAX_COUNT);
        let changed = [penalized, banned].concat();
        assert!(changed.len() <= Self::MAX_CHANGED, "up to {} changed tokens", Self::MAX_CHANGED);
        if !changed.is_empty() {
            self.changed.write(&changed)?;
        }
        let count = count.min(n);
        let blocks = n.div_ceil(SORT_KEYS).min(BLOCKS);
        let params = TopKParams {
            x: logits.address(),
            changed: self.changed.address(),
            partial: self.partial.address(),
            arrived: self.arrived.address(),
            out: self.out.address(),
            n: to_u32("a vocabulary", n)?,
            count: count as u32,
            penalized: penalized.len() as u32,
            banned: banned.len() as u32,
            slice: n.div_ceil(blocks) as u32,
            penalty,
            greedy: u32::from(greedy),
            padding: 0,
        };
        let shape = LaunchShape { blocks: [blocks, 1, 1], threads: THREADS, shared: 0 };
        let launch = Launch::new(MODULE, "top_k", shape, &params);
        // SAFETY: there are n logits and as many changed tokens as the parameter says. The other buffers
        // have room for the most tokens of the most blocks.
        unsafe { self.device.launch(&launch) }?;
        let mut out = [0; 2 * Self::MAX_COUNT];
        self.out.read(&mut out[..2 * count])?;
        let pairs = out[..2 * count].as_chunks::<2>().0;
        Ok(pairs.iter().map(|[token, logit]| (*token, f32::from_bits(*logit))).collect())
    }
}
