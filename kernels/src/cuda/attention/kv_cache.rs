//! The KV cache of a sequence on a device.

use bytemuck::{Pod, Zeroable};

use super::shape::AttentionShape;
use crate::cuda::device::{Buffer, Device, KeepAlive};
use crate::cuda::error::Result;
use crate::cuda::launch::to_u32;

/// The smallest capacity of a cache in tokens, unless the context is shorter.
const FIRST_CAPACITY: usize = 256;

/// The cache of a token's sequence, and the position of the token: `KvSlot` of kv_cache.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct KvSlot {
    cache: u64,
    capacity: u32,
    position: u32,
}

impl KvSlot {
    /// Token `position` of the sequence whose cache is at the address `cache`, with room for `capacity`
    /// tokens.
    #[must_use]
    pub fn new(cache: u64, capacity: u32, position: u32) -> Self {
        Self { cache, capacity, position }
    }

    /// The next token of the same sequence.
    pub(super) fn next(self) -> Self {
        Self { position: self.position + 1, ..self }
    }
}

/// The keys and values of one sequence. The memory grows with the sequence.
#[derive(Debug)]
pub struct KvCache {
    shape: AttentionShape,
    memory: Buffer<u8>,
    capacity: usize,
    device: Device,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::cuda::Error::Unsupported) for shapes without a kernel, [`Error::Driver`](crate::cuda::Error::Driver).
    pub fn new(device: &Device, shape: AttentionShape) -> Result<Self> {
        shape.check()?;
        let memory = device.zeros("keys and values", 0)?;
        Ok(Self { shape, memory, capacity: 0, device: device.clone() })
    }

    /// Makes room for `tokens` tokens, at most `limit`. Returns whether the cache has moved.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::cuda::Error::Memory) with the bytes needed; [`Error::Driver`](crate::cuda::Error::Driver).
    pub fn reserve(&mut self, tokens: usize, limit: usize) -> Result<bool> {
        if tokens <= self.capacity {
            return Ok(false);
        }
        let capacity = tokens.next_power_of_two().max(FIRST_CAPACITY).min(limit.max(tokens));
        to_u32("a context", capacity)?;
        let what = format!("a cache for {capacity} tokens");
        let mut memory = self.device.zeros::<u8>(&what, self.shape.cache_bytes(capacity))?;
        if self.capacity > 0 {
            for part in 0..2 * self.shape.layers {
                self.copy_layer(part, &mut memory, capacity)?;
            }
        }
        self.memory = memory;
        self.capacity = capacity;
        Ok(true)
    }

    /// Copies the keys or values of a layer to `memory`, which has room for `capacity` tokens. The rows
    /// of a head are contiguous, so each head is copied by itself.
    fn copy_layer(&self, part: usize, memory: &mut Buffer<u8>, capacity: usize) -> Result<()> {
        let shape = self.shape;
        let (row, scale) = (shape.row_bytes(), shape.scale_bytes());
        let old = part * shape.layer_bytes(self.capacity);
        let new = part * shape.layer_bytes(capacity);
        for head in 0..shape.kv_heads {
            let rows = self.capacity * row;
            let (from, to) = (old + head * rows, new + head * capacity * row);
            memory.copy_part(to, &self.memory, from, rows)?;
            if scale > 0 {
                let scales = self.capacity * scale;
                let from = old + shape.kv_heads * rows + head * scales;
                let to = new + shape.kv_heads * capacity * row + head * capacity * scale;
                memory.copy_part(to, &self.memory, from, scales)?;
            }
        }
        Ok(())
    }

    /// The slot of token `position`.
    ///
    /// # Panics
    /// If the cache has no room for it.
    #[must_use]
    pub fn slot(&self, position: usize) -> KvSlot {
        assert!(position < self.capacity, "room for the token");
        KvSlot::new(self.memory.address(), self.capacity as u32, position as u32)
    }

    /// The shape.
    pub(super) fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Keeps the memory alive.
    pub(super) fn keep(&self) -> KeepAlive {
        self.memory.keep()
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The capacity in tokens.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}
