//! The most likely tokens of a step, found on the device.

use bytemuck::{Pod, Zeroable};

use super::Result;
use super::compile::Module;
use super::device::{Buffer, Device};
use super::launch::{Launch, to_u32};

/// `SORTERS` and `SORTED` of candidates.cu.
const THREADS: u32 = 512;
const SORTED: usize = 1024;
/// Blocks at most: what they keep is sorted by one.
const BLOCKS: usize = 64;

/// `Candidates` of candidates.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
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

/// Which tokens are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// How many, at most [`Candidates::MOST`].
    pub count: usize,
    /// Whether it is about the single best one: NaN is then never larger, and zeros are equal. Else logits are in
    /// the order of [`f32::total_cmp`].
    pub greedy: bool,
    /// Divides positive logits of `penalized` tokens, multiplies others.
    pub penalty: f32,
    /// Each once; together with `banned` at most [`Candidates::CHANGED`].
    pub penalized: &'a [u32],
    /// Tokens that count as −∞.
    pub banned: &'a [u32],
}

/// Finds tokens on one device, with the memory that takes.
#[derive(Debug)]
pub struct Candidates {
    device: Device,
    changed: Buffer<u32>,
    partial: Buffer<u64>,
    arrived: Buffer<u32>,
    out: Buffer<u32>,
}

impl Candidates {
    /// The most tokens that can be wanted.
    pub const MOST: usize = 128;
    /// The most tokens whose logits can be changed: `CHANGED` of candidates.cu.
    pub const CHANGED: usize = 512;

    /// # Errors
    /// [`super::Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            changed: device.zeros("changed tokens", Self::CHANGED)?,
            partial: device.zeros("candidates", BLOCKS * Self::MOST)?,
            arrived: device.zeros("counters", 1)?,
            out: device.zeros("candidates", 2 * Self::MOST)?,
        })
    }

    /// The most likely tokens after `logits`, `[n]`, with their logits, best first, of equals the lower token: as many
    /// as wanted, or all. Waits for what is queued.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] for sizes beyond what kernels count to, [`super::Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small, or for more tokens than the constants say.
    pub fn find(
        &mut self,
        logits: &Buffer<f32>,
        n: usize,
        wanted: &Wanted<'_>,
    ) -> Result<Vec<(u32, f32)>> {
        let Wanted { count, greedy, penalty, penalized, banned } = *wanted;
        assert!(logits.len() >= n && n > 0, "logits of all tokens");
        assert!((1..=Self::MOST).contains(&count), "up to {} tokens", Self::MOST);
        let changed = [penalized, banned].concat();
        assert!(changed.len() <= Self::CHANGED, "up to {} changed tokens", Self::CHANGED);
        if !changed.is_empty() {
            self.changed.write(&changed)?;
        }
        let count = count.min(n);
        let blocks = n.div_ceil(SORTED).min(BLOCKS);
        let params = Params {
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
        let grid = [blocks, 1, 1];
        let launch = Launch::new(Module::CANDIDATES, "candidates", grid, THREADS, 0, &params);
        // SAFETY: there are n logits and as many changed tokens as the parameter says; the other buffers
        // have room for the most candidates of the most blocks.
        unsafe { self.device.launch(&launch) }?;
        let mut out = [0; 2 * Self::MOST];
        self.out.read(&mut out[..2 * count])?;
        let pairs = out[..2 * count].as_chunks::<2>().0;
        Ok(pairs.iter().map(|[token, logit]| (*token, f32::from_bits(*logit))).collect())
    }
}
