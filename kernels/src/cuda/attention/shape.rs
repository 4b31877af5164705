//! The shape of attention, and the plans of its launches.

use bytemuck::{Pod, Zeroable};

use crate::cuda::error::{Error, Result};
use crate::cuda::launch::{
    Launch, LaunchShape, ScratchAddresses, ScratchSize, check_grid_y, to_u32,
};
use crate::cuda::module::{Header, Module, header, module};
use crate::kv::KvKind;

const KV_CACHE: Header = header!("kv_cache.cuh");
const DECODE_F32: Module =
    module!("attention decode f32", "attention_decode.cu", "KV=KvF32"; KV_CACHE);
const DECODE_F16: Module =
    module!("attention decode f16", "attention_decode.cu", "KV=KvF16"; KV_CACHE);
const DECODE_Q8: Module =
    module!("attention decode q8", "attention_decode.cu", "KV=KvQ8"; KV_CACHE);
const PREFILL_F16: Module =
    module!("attention prefill f16", "attention_prefill.cu", "KV=KvF16"; KV_CACHE);
const PREFILL_Q8: Module =
    module!("attention prefill q8", "attention_prefill.cu", "KV=KvQ8"; KV_CACHE);

/// The modules of attention.
pub(in crate::cuda) const MODULES: [Module; 5] =
    [DECODE_F32, DECODE_F16, DECODE_Q8, PREFILL_F16, PREFILL_Q8];

/// `SPLIT_KEYS` and `BLOCK_THREADS` of attention_decode.cu, `CHUNK` of kv_cache.cuh.
const SPLIT_KEYS: usize = 256;
const DECODE_THREADS: u32 = 128;
const CHUNK: usize = 8;
/// The widest head, 64 chunks: at least two groups of threads then sum values.
const MAX_WIDTH: usize = 512;
/// The most tokens of a sequence that the decode kernel computes. So few tokens have too few rows for
/// tensor cores, and need the splits of the decode kernel to fill the device.
const MAX_DECODE_TOKENS: usize = 16;
/// `ROWS`, `BLOCK_THREADS` and `STAGES` of attention_prefill.cu.
const PREFILL_ROWS: usize = 64;
const PREFILL_THREADS: u32 = 128;
const STAGES: usize = 3;

/// A kernel of attention_prefill.cu.
#[derive(Clone, Copy, Debug)]
struct PrefillKernel {
    /// The widest head.
    width: usize,
    name: &'static str,
    /// Keys of a tile.
    keys: usize,
}

const PREFILL: [PrefillKernel; 4] = [
    PrefillKernel { width: 64, name: "attention_prefill_64", keys: 64 },
    PrefillKernel { width: 96, name: "attention_prefill_96", keys: 64 },
    PrefillKernel { width: 128, name: "attention_prefill_128", keys: 64 },
    PrefillKernel { width: 256, name: "attention_prefill_256", keys: 32 },
];

/// The shape of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub width: usize,
    /// Decoder layers that have a cache.
    pub layers: usize,
    /// The element type of the cache.
    pub kind: KvKind,
    /// Whether the two elements of a RoPE pair are neighbors. Otherwise they are half a head apart.
    pub interleaved: bool,
}

/// The addresses of RoPE: [tokens, heads · width], [tokens, kv_heads · width] twice, `[width / 2]`,
/// `[tokens]`.
#[derive(Clone, Copy, Debug)]
pub struct RopeAddresses {
    /// Queries, rotated in place.
    pub q: u64,
    /// Keys.
    pub k: u64,
    /// Values.
    pub v: u64,
    /// Radians per position of each pair.
    pub frequencies: u64,
    /// The [`super::KvSlot`] of each token.
    pub slots: u64,
}

/// The addresses of attention: [tokens, heads · width] twice, `[tokens]`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionAddresses {
    /// Rotated queries.
    pub q: u64,
    /// The attention output.
    pub out: u64,
    /// The [`super::KvSlot`] of each token.
    pub slots: u64,
}

/// The tokens of a launch.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBatch {
    /// The decoder layer.
    pub layer: usize,
    /// Tokens.
    pub tokens: usize,
    /// The most tokens that one of them attends to, itself included.
    pub visible: usize,
}

/// `RopeParams` of attention_decode.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct RopeParams {
    q: u64,
    k: u64,
    v: u64,
    frequencies: u64,
    slots: u64,
    heads: u32,
    kv_heads: u32,
    width: u32,
    layer: u32,
    interleaved: u32,
    padding: u32,
}

/// `AttentionDecodeParams` of attention_decode.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct AttentionDecodeParams {
    q: u64,
    out: u64,
    slots: u64,
    partial: u64,
    arrived: u64,
    heads: u32,
    kv_heads: u32,
    width: u32,
    layer: u32,
    splits: u32,
    scale: f32,
}

/// `AttentionPrefillParams` of attention_prefill.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct AttentionPrefillParams {
    q: u64,
    out: u64,
    slots: u64,
    heads: u32,
    kv_heads: u32,
    width: u32,
    layer: u32,
    tokens: u32,
    scale: f32,
}

/// The query heads of a key-value head, divided among blocks.
#[derive(Clone, Copy, Debug)]
struct HeadSplit {
    /// Query heads of a block.
    block_heads: usize,
    /// Blocks of a key-value head.
    blocks: usize,
}

impl AttentionShape {
    /// # Errors
    /// [`Error::Unsupported`] for shapes that the kernels do not support.
    pub fn check(&self) -> Result<()> {
        let Self { heads, kv_heads, width, .. } = *self;
        let fits = kv_heads > 0 && heads.is_multiple_of(kv_heads) && width.is_multiple_of(2);
        if !fits || width == 0 || width > MAX_WIDTH || heads + 2 * kv_heads > 65_535 {
            let why = format!(
                "there is no CUDA kernel for attention with {heads} heads of {width} and {kv_heads} key \
                 heads; use --device cpu"
            );
            return Err(Error::Unsupported { why });
        }
        Ok(())
    }

    /// The module of RoPE and of the decode kernel.
    #[must_use]
    pub fn decode_module(&self) -> Module {
        match self.kind {
            KvKind::F32 => DECODE_F32,
            KvKind::F16 => DECODE_F16,
            KvKind::Q8 => DECODE_Q8,
        }
    }

    fn padded_width(&self) -> usize {
        self.width.next_multiple_of(CHUNK)
    }

    /// Bytes of a row of the cache without its scale.
    pub(super) fn row_bytes(&self) -> usize {
        match self.kind {
            KvKind::F32 => 4 * self.padded_width(),
            KvKind::F16 => 2 * self.padded_width(),
            KvKind::Q8 => self.padded_width(),
        }
    }

    /// Bytes of the scale of a row of the cache.
    pub(super) fn scale_bytes(&self) -> usize {
        if self.kind == KvKind::Q8 { 4 } else { 0 }
    }

    /// Bytes of the keys or of the values of one layer for `capacity` tokens.
    pub(super) fn layer_bytes(&self, capacity: usize) -> usize {
        let row = self.row_bytes() + self.scale_bytes();
        // Chunks are read as vectors of up to 16 bytes.
        (self.kv_heads * capacity * row).next_multiple_of(16)
    }

    /// Bytes of the cache of a sequence of up to `capacity` tokens.
    #[must_use]
    pub fn cache_bytes(&self, capacity: usize) -> usize {
        2 * self.layers * self.layer_bytes(capacity)
    }

    fn head_split(&self) -> HeadSplit {
        let group = self.heads / self.kv_heads;
        let block_heads = match group {
            1 => 1,
            2..=4 => 4,
            _ => 8,
        };
        HeadSplit { block_heads, blocks: group.div_ceil(block_heads) }
    }

    /// The scratch memory of the decode kernel for `tokens` tokens that attend to up to `visible`
    /// tokens each.
    #[must_use]
    pub fn decode_scratch(&self, tokens: usize, visible: usize) -> ScratchSize {
        let HeadSplit { block_heads, blocks } = self.head_split();
        let arrived = tokens * self.kv_heads * blocks;
        let splits = visible.div_ceil(SPLIT_KEYS);
        ScratchSize { partial: arrived * splits * block_heads * (2 + self.width), arrived }
    }

    /// Plans RoPE: rotates queries in place, and appends rotated keys and values to the caches of
    /// `layer`.
    ///
    /// # Errors
    /// As for [`AttentionShape::check`].
    pub fn plan_rope(&self, at: RopeAddresses, layer: usize, tokens: usize) -> Result<Launch> {
        self.check()?;
        let params = RopeParams {
            q: at.q,
            k: at.k,
            v: at.v,
            frequencies: at.frequencies,
            slots: at.slots,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", layer)?,
            interleaved: u32::from(self.interleaved),
            padding: 0,
        };
        check_grid_y(tokens, tokens, "tokens")?;
        let blocks = [self.heads + 2 * self.kv_heads, tokens, 1];
        let shape = LaunchShape { blocks, threads: 32, shared: 0 };
        Ok(Launch::new(self.decode_module(), "rope_kv", shape, &params))
    }

    /// Plans attention with the decode kernel, which reads the cache once for each token.
    ///
    /// # Errors
    /// As for [`AttentionShape::check`].
    pub fn plan_decode(
        &self,
        at: AttentionAddresses,
        scratch: ScratchAddresses,
        batch: AttentionBatch,
    ) -> Result<Launch> {
        self.check()?;
        let HeadSplit { block_heads, blocks } = self.head_split();
        let splits = batch.visible.div_ceil(SPLIT_KEYS);
        let params = AttentionDecodeParams {
            q: at.q,
            out: at.out,
            slots: at.slots,
            partial: scratch.partial,
            arrived: scratch.arrived,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", batch.layer)?,
            splits: to_u32("a context", splits)?,
            scale: 1.0 / (self.width as f32).sqrt(),
        };
        let kernel = match block_heads {
            1 => "attention_decode_1",
            4 => "attention_decode_4",
            _ => "attention_decode_8",
        };
        let shape = LaunchShape {
            blocks: [splits, self.kv_heads * blocks, batch.tokens],
            threads: DECODE_THREADS,
            shared: block_heads * (self.padded_width() + SPLIT_KEYS) * 4,
        };
        Ok(Launch::new(self.decode_module(), kernel, shape, &params))
    }

    /// Plans attention on tensor cores, for `tokens` consecutive tokens of one sequence. Only the
    /// first slot is read, whose cache holds all of the tokens. Queries and weights are rounded to
    /// f16. Returns `None` for up to 16 tokens, for heads wider than 256, and for caches in f32,
    /// which are for exact results; [`AttentionShape::plan_decode`] serves those.
    ///
    /// # Errors
    /// As for [`AttentionShape::check`]; [`Error::Unsupported`] for more than 2^30 rows.
    pub fn plan_prefill(
        &self,
        at: AttentionAddresses,
        layer: usize,
        tokens: usize,
    ) -> Result<Option<Launch>> {
        self.check()?;
        let module = match self.kind {
            KvKind::F32 => return Ok(None),
            KvKind::F16 => PREFILL_F16,
            KvKind::Q8 => PREFILL_Q8,
        };
        let Some(kernel) = PREFILL.into_iter().find(|kernel| self.width <= kernel.width) else {
            return Ok(None);
        };
        if tokens <= MAX_DECODE_TOKENS {
            return Ok(None);
        }
        let rows = tokens * (self.heads / self.kv_heads);
        to_u32("a prompt with rows", rows)?;
        let params = AttentionPrefillParams {
            q: at.q,
            out: at.out,
            slots: at.slots,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", layer)?,
            tokens: tokens as u32,
            scale: 1.0 / (self.width as f32).sqrt(),
        };
        let PrefillKernel { width, name, keys } = kernel;
        let tile = 2 * keys * width;
        let mut shared = match self.kind {
            KvKind::Q8 => STAGES * keys * (width + 4) + tile,
            _ => STAGES * tile,
        };
        // The queries of wide heads do not fit registers.
        if width > 128 {
            shared += 2 * PREFILL_ROWS * width;
        }
        let blocks = [rows.div_ceil(PREFILL_ROWS), self.kv_heads, 1];
        let shape = LaunchShape { blocks, threads: PREFILL_THREADS, shared };
        Ok(Some(Launch::new(module, name, shape, &params)))
    }
}
