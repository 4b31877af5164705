//! The cache of keys and values on a device, and attention over it.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};

use super::compile::Module;
use super::device::{Buffer, Device, Keep};
use super::launch::{Launch, to_u32};
use super::{Error, Result};
use crate::kv::KvKind;

/// Keys of a split of attention.cu, elements of a chunk of attention.cuh.
const KEYS: usize = 256;
const CHUNK: usize = 8;
const BLOCK: u32 = 128;
/// The widest head: a chunk per thread, four times over.
const WIDEST: usize = 512;
/// Tokens of a launch of the kernel for a few.
const TOKENS: usize = 64;
/// More tokens of one sequence are many. A decoded token or a few have too few rows for tensor cores, and need
/// the splits of the other kernel to fill the device.
const FEW: usize = 16;
/// Rows and threads of a block of attention_many.cu, and its stages.
const MANY_ROWS: usize = 64;
const MANY_BLOCK: u32 = 128;
const STAGES: usize = 3;
/// Kernels for many tokens: widest head, name, keys of a tile.
const MANY: [(usize, &str, usize); 4] = [
    (64, "attend_many_64", 64),
    (96, "attend_many_96", 64),
    (128, "attend_many_128", 64),
    (256, "attend_many_256", 32),
];
/// Tokens that a cache has room for at first.
const FIRST_CAPACITY: usize = 256;

/// The shape of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub width: usize,
    /// Decoder layers that have a cache.
    pub layers: usize,
    /// How keys and values are kept.
    pub kind: KvKind,
    /// Whether the pairs of RoPE are neighbors; else they are half a head apart.
    pub interleaved: bool,
}

/// Where the sequence of a token is, and which of its tokens it is: `Slot` of attention.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct KvSlot {
    cache: u64,
    capacity: u32,
    position: u32,
}

/// `Rotate` of attention.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct RotateParams {
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

/// `Attend` of attention.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct AttendParams {
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

/// `Many` of attention_many.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct ManyParams {
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

impl KvSlot {
    /// Token `position` of the sequence whose cache is at an address, with room for `capacity` tokens.
    #[must_use]
    pub fn new(cache: u64, capacity: u32, position: u32) -> Self {
        Self { cache, capacity, position }
    }

    /// The next token of the same sequence.
    fn next(self) -> Self {
        Self { position: self.position + 1, ..self }
    }
}

impl Attention {
    /// # Errors
    /// [`Error::Unsupported`] for shapes that the kernels do not take.
    pub fn check(&self) -> Result<()> {
        let Self { heads, kv_heads, width, .. } = *self;
        let fits = kv_heads > 0 && heads.is_multiple_of(kv_heads) && width.is_multiple_of(2);
        if !fits || width == 0 || width > WIDEST || heads + 2 * kv_heads > 65_535 {
            let why = format!(
                "there is no CUDA kernel for attention with {heads} heads of {width} and {kv_heads} key \
                 heads; use --device cpu"
            );
            return Err(Error::Unsupported { why });
        }
        Ok(())
    }

    /// The kernels' module.
    #[must_use]
    pub fn module(&self) -> Module {
        match self.kind {
            KvKind::F32 => Module::ATTENTION_F32,
            KvKind::F16 => Module::ATTENTION_F16,
            KvKind::Q8 => Module::ATTENTION_Q8,
        }
    }

    fn padded(&self) -> usize {
        self.width.next_multiple_of(CHUNK)
    }

    /// Bytes of keys or values of one layer with `capacity` tokens.
    fn part_bytes(&self, capacity: usize) -> usize {
        let row = match self.kind {
            KvKind::F32 => 4 * self.padded(),
            KvKind::F16 => 2 * self.padded(),
            KvKind::Q8 => self.padded() + 4,
        };
        // Chunks are read as vectors of up to 16 bytes.
        (self.kv_heads * capacity * row).next_multiple_of(16)
    }

    /// Bytes of the cache of a sequence of up to `capacity` tokens.
    #[must_use]
    pub fn cache_bytes(&self, capacity: usize) -> usize {
        2 * self.layers * self.part_bytes(capacity)
    }

    /// Query heads of a block, and blocks for a key head.
    fn blocks(&self) -> (usize, usize) {
        let group = self.heads / self.kv_heads;
        let at_once = match group {
            1 => 1,
            2..=4 => 4,
            _ => 8,
        };
        (at_once, group.div_ceil(at_once))
    }

    /// Floats of partial sums and counters for `tokens` tokens, each of which sees up to `visible`.
    #[must_use]
    pub fn work(&self, tokens: usize, visible: usize) -> [usize; 2] {
        let (at_once, parts) = self.blocks();
        let places = tokens * self.kv_heads * parts;
        [places * visible.div_ceil(KEYS) * at_once * (2 + self.width), places]
    }

    /// Rotates queries in place, and appends rotated keys and values to the caches of `layer`. `q`, `k`,
    /// `v`, `frequencies` and `slots` are addresses: [tokens, heads · width], [tokens, kv_heads · width]
    /// twice, `[width / 2]`, `[tokens]`.
    ///
    /// # Errors
    /// As for [`Attention::check`].
    pub fn plan_rotate(
        &self,
        [q, k, v]: [u64; 3],
        frequencies: u64,
        slots: u64,
        layer: usize,
        tokens: usize,
    ) -> Result<Launch> {
        self.check()?;
        let params = RotateParams {
            q,
            k,
            v,
            frequencies,
            slots,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", layer)?,
            interleaved: u32::from(self.interleaved),
            padding: 0,
        };
        if tokens > 65_535 {
            let why = format!("{tokens} tokens at once are more than a launch takes");
            return Err(Error::Unsupported { why });
        }
        let blocks = [self.heads + 2 * self.kv_heads, tokens, 1];
        Ok(Launch::new(self.module(), "rotate", blocks, 32, 0, &params))
    }

    /// Attention of `tokens` tokens that see up to `visible` tokens each, themselves included: `q` to `out`,
    /// both [tokens, heads · width]. `work` are the addresses of partial sums and counters.
    ///
    /// # Errors
    /// As for [`Attention::check`].
    pub fn plan_attend(
        &self,
        [q, out]: [u64; 2],
        slots: u64,
        work: [u64; 2],
        layer: usize,
        tokens: usize,
        visible: usize,
    ) -> Result<Launch> {
        self.check()?;
        let (at_once, parts) = self.blocks();
        let splits = visible.div_ceil(KEYS);
        let params = AttendParams {
            q,
            out,
            slots,
            partial: work[0],
            arrived: work[1],
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", layer)?,
            splits: to_u32("a context", splits)?,
            scale: 1.0 / (self.width as f32).sqrt(),
        };
        let kernel = match at_once {
            1 => "attend_1",
            4 => "attend_4",
            _ => "attend_8",
        };
        let shared = at_once * (self.padded() + KEYS) * 4;
        let blocks = [splits, self.kv_heads * parts, tokens];
        Ok(Launch::new(self.module(), kernel, blocks, BLOCK, shared, &params))
    }

    /// The same for tokens one after another of one sequence, on tensor cores; `slots` is the place of the first,
    /// whose cache has all of them. Queries and weights are rounded to f16. `None` for a few tokens and for
    /// shapes and caches that only [`Attention::plan_attend`] serves: heads wider than 256, and caches of
    /// f32, which are for exact results.
    ///
    /// # Errors
    /// As for [`Attention::check`]; [`Error::Unsupported`] for more rows than kernels count to.
    pub fn plan_attend_many(
        &self,
        [q, out]: [u64; 2],
        slots: u64,
        layer: usize,
        tokens: usize,
    ) -> Result<Option<Launch>> {
        self.check()?;
        let module = match self.kind {
            KvKind::F32 => return Ok(None),
            KvKind::F16 => Module::ATTENTION_MANY_F16,
            KvKind::Q8 => Module::ATTENTION_MANY_Q8,
        };
        let Some((widest, kernel, keys)) = MANY.into_iter().find(|m| self.width <= m.0) else {
            return Ok(None);
        };
        if tokens <= FEW {
            return Ok(None);
        }
        let rows = tokens * (self.heads / self.kv_heads);
        to_u32("a prompt with rows", rows)?;
        let params = ManyParams {
            q,
            out,
            slots,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            width: self.width as u32,
            layer: to_u32("a model with layers", layer)?,
            tokens: tokens as u32,
            scale: 1.0 / (self.width as f32).sqrt(),
        };
        let tile = 2 * keys * widest;
        let mut shared = match self.kind {
            KvKind::Q8 => STAGES * keys * (widest + 4) + tile,
            _ => STAGES * tile,
        };
        // The queries of wide heads have no room in registers.
        if widest > 128 {
            shared += 2 * MANY_ROWS * widest;
        }
        let blocks = [rows.div_ceil(MANY_ROWS), self.kv_heads, 1];
        Ok(Some(Launch::new(module, kernel, blocks, MANY_BLOCK, shared, &params)))
    }
}

/// Keys and values of one sequence. Its memory grows with the sequence.
#[derive(Debug)]
pub struct KvCache {
    attention: Attention,
    memory: Buffer<u8>,
    capacity: usize,
    device: Device,
}

impl KvCache {
    /// For no tokens yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for shapes without a kernel, [`Error::Driver`].
    pub fn new(device: &Device, attention: Attention) -> Result<Self> {
        attention.check()?;
        let memory = device.zeros("keys and values", 0)?;
        Ok(Self { attention, memory, capacity: 0, device: device.clone() })
    }

    /// Makes room for `tokens` tokens, at most `limit`; whether the cache has moved.
    ///
    /// # Errors
    /// [`Error::Memory`] with what it needs; [`Error::Driver`].
    pub fn reserve(&mut self, tokens: usize, limit: usize) -> Result<bool> {
        if tokens <= self.capacity {
            return Ok(false);
        }
        let capacity = tokens.next_power_of_two().max(FIRST_CAPACITY).min(limit.max(tokens));
        to_u32("a context", capacity)?;
        let a = self.attention;
        let what = format!("a cache for {capacity} tokens");
        let mut memory = self.device.zeros::<u8>(&what, a.cache_bytes(capacity))?;
        // The rows of a head stay together: each moves on its own.
        let row = match a.kind {
            KvKind::F32 => 4 * a.padded(),
            KvKind::F16 => 2 * a.padded(),
            KvKind::Q8 => a.padded(),
        };
        let scale = if a.kind == KvKind::Q8 { 4 } else { 0 };
        for part in 0..if self.capacity == 0 { 0 } else { 2 * a.layers } {
            let old = part * a.part_bytes(self.capacity);
            let new = part * a.part_bytes(capacity);
            for head in 0..a.kv_heads {
                let rows = self.capacity * row;
                let (from, to) = (old + head * rows, new + head * capacity * row);
                memory.copy_part(to, &self.memory, from, rows)?;
                if scale > 0 {
                    let scales = self.capacity * scale;
                    let from = old + a.kv_heads * rows + head * scales;
                    let to = new + a.kv_heads * capacity * row + head * capacity * scale;
                    memory.copy_part(to, &self.memory, from, scales)?;
                }
            }
        }
        self.memory = memory;
        self.capacity = capacity;
        Ok(true)
    }

    /// The place of token `position`.
    ///
    /// # Panics
    /// If there is no room for it.
    #[must_use]
    pub fn slot(&self, position: usize) -> KvSlot {
        assert!(position < self.capacity, "room for the token");
        KvSlot::new(self.memory.address(), self.capacity as u32, position as u32)
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Tokens it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Where the tokens of a step are, on the device.
#[derive(Debug)]
pub struct Slots {
    slots: Buffer<KvSlot>,
    /// Tokens now.
    tokens: usize,
    /// Tokens that the last of them sees, at most.
    visible: usize,
    /// Whether they are of one sequence, one after another.
    is_run: bool,
    attention: Option<Attention>,
    /// Memory that the slots refer to; a recorded graph keeps it through this.
    held: Arc<Mutex<Vec<Keep>>>,
}

impl Slots {
    /// For up to `tokens` tokens at a time.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device, tokens: usize) -> Result<Self> {
        let slots = device.zeros("places of tokens", tokens)?;
        Ok(Self {
            slots,
            tokens: 0,
            visible: 0,
            is_run: false,
            attention: None,
            held: Arc::default(),
        })
    }

    /// From now on the tokens of a step are at these positions of these sequences, whose caches have room.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// For no tokens or more than there is room for, a position without room, or caches of different
    /// shapes.
    pub fn set<'a>(
        &mut self,
        tokens: impl IntoIterator<Item = (&'a KvCache, usize)>,
    ) -> Result<()> {
        let tokens: Vec<_> = tokens.into_iter().collect();
        assert!(!tokens.is_empty() && tokens.len() <= self.slots.len(), "room for the tokens");
        let attention = tokens[0].0.attention;
        assert!(
            tokens.iter().all(|(cache, _)| cache.attention == attention),
            "caches of one shape"
        );
        let slots: Vec<KvSlot> = tokens.iter().map(|(cache, at)| cache.slot(*at)).collect();
        self.slots.write(&slots)?;
        self.is_run = slots.windows(2).all(|two| two[1] == two[0].next());
        self.attention = Some(attention);
        self.tokens = tokens.len();
        self.visible = tokens.iter().map(|(_, at)| at + 1).max().unwrap_or(0);
        let held = tokens.iter().map(|(cache, _)| cache.memory.keep()).collect();
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
        Ok(())
    }

    /// Tokens of the step.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many tokens the last one sees, itself included.
    #[must_use]
    pub fn visible(&self) -> usize {
        self.visible
    }
}

/// Attention on one device, with the memory it needs.
#[derive(Debug)]
pub struct Attend {
    attention: Attention,
    frequencies: Buffer<f32>,
    partial: Buffer<f32>,
    arrived: Buffer<u32>,
    device: Device,
}

impl Attend {
    /// `frequencies` are the turns per token of each pair of a head, `[width / 2]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for shapes without a kernel; [`Error::Compiler`], [`Error::Driver`].
    ///
    /// # Panics
    /// For another number of frequencies.
    pub fn new(device: &Device, attention: Attention, frequencies: &[f32]) -> Result<Self> {
        attention.check()?;
        assert_eq!(frequencies.len(), attention.width / 2, "a frequency per pair");
        Ok(Self {
            attention,
            frequencies: device.upload("frequencies", frequencies)?,
            partial: device.zeros("partial sums", 0)?,
            arrived: device.zeros("counters", 0)?,
            device: device.clone(),
        })
    }

    /// Queues what happens in `layer` between the projections: rotates `q` ([tokens, heads · width]) and `k`,
    /// appends `k` and `v` (both [tokens, kv_heads · width]) to the caches, and writes the attention to `out`.
    /// Kernels are planned for tokens that see up to `visible` tokens, at least those of `slots`: a recorded
    /// graph serves until that is passed.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Driver`].
    ///
    /// # Panics
    /// If slots are not set or for caches of another shape, a buffer is too small, the layer does not exist,
    /// or `visible` is too small.
    pub fn queue(
        &mut self,
        slots: &Slots,
        layer: usize,
        visible: usize,
        q: &mut Buffer<f32>,
        k: &Buffer<f32>,
        v: &Buffer<f32>,
        out: &mut Buffer<f32>,
    ) -> Result<()> {
        let (a, tokens) = (self.attention, slots.tokens);
        assert!(slots.attention == Some(a) && layer < a.layers, "caches of this shape");
        assert!(visible >= slots.visible, "all tokens are seen");
        assert!(q.len().min(out.len()) >= tokens * a.heads * a.width, "room for the heads");
        assert!(k.len().min(v.len()) >= tokens * a.kv_heads * a.width, "whole keys and values");
        let held: Keep = slots.held.clone();
        self.device.keep(&held);
        let places = slots.slots.address();
        let ins = [q.address(), k.address(), v.address()];
        let rotate = a.plan_rotate(ins, self.frequencies.address(), places, layer, tokens)?;
        // SAFETY: queries, keys and values have room for the tokens; the slots refer to caches of this shape
        // with room for their positions, which `held` keeps; the layer is one of the caches'.
        unsafe { self.device.launch(&rotate) }?;
        let ends = [q.address(), out.address()];
        if slots.is_run
            && let Some(attend) = a.plan_attend_many(ends, places, layer, tokens)?
        {
            // SAFETY: as above; queries and results have room for the tokens, which are one after another
            // in the cache of the first slot.
            return unsafe { self.device.launch(&attend) };
        }
        // Partial sums of many tokens over a long context would take more memory than the cache.
        let at_once = tokens.min(TOKENS);
        let [partial, arrived] = a.work(at_once, visible);
        if partial > self.partial.len() {
            self.partial = self.device.zeros("partial sums", partial)?;
        }
        if arrived > self.arrived.len() {
            self.arrived = self.device.zeros("counters", arrived)?;
        }
        let work = [self.partial.address(), self.arrived.address()];
        for first in (0..tokens).step_by(at_once) {
            let count = at_once.min(tokens - first);
            let offset = (first * a.heads * a.width * size_of::<f32>()) as u64;
            let ends = ends.map(|address| address + offset);
            let places = places + (first * size_of::<KvSlot>()) as u64;
            let attend = a.plan_attend(ends, places, work, layer, count, visible)?;
            // SAFETY: as above; the partial sums and counters have room for the splits of `visible` tokens
            // for as many tokens as there are at once.
            unsafe { self.device.launch(&attend) }?;
        }
        Ok(())
    }
}
