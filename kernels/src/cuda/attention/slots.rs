//! Which cache each token of a step belongs to.

use std::sync::{Arc, Mutex};

use super::kv_cache::{KvCache, KvSlot};
use super::shape::AttentionShape;
use crate::cuda::device::{Buffer, Device, KeepAlive};
use crate::cuda::error::Result;
use crate::cuda::sync::lock;

/// The slots of the tokens of a step, on the device.
#[derive(Debug)]
pub struct SlotMapping {
    pub(super) slots: Buffer<KvSlot>,
    /// The tokens of the step.
    tokens: usize,
    /// The most tokens that one of them attends to, itself included.
    visible: usize,
    /// Whether they are consecutive tokens of one sequence.
    pub(super) is_consecutive: bool,
    pub(super) shape: Option<AttentionShape>,
    /// The memory that the slots refer to, which recorded graphs keep alive.
    pub(super) held: Arc<Mutex<Vec<KeepAlive>>>,
}

impl SlotMapping {
    /// Room for `tokens` slots.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::cuda::Error::Driver).
    pub fn new(device: &Device, tokens: usize) -> Result<Self> {
        let slots = device.zeros("slots of tokens", tokens)?;
        Ok(Self {
            slots,
            tokens: 0,
            visible: 0,
            is_consecutive: false,
            shape: None,
            held: Arc::default(),
        })
    }

    /// Sets the slots to these positions of these sequences, whose caches have room.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::cuda::Error::Driver).
    ///
    /// # Panics
    /// For no tokens, or more than there is room for, a position without room, or caches of different
    /// shapes.
    pub fn set<'a>(
        &mut self,
        tokens: impl IntoIterator<Item = (&'a KvCache, usize)>,
    ) -> Result<()> {
        let tokens: Vec<_> = tokens.into_iter().collect();
        assert!(!tokens.is_empty() && tokens.len() <= self.slots.len(), "room for the tokens");
        let shape = tokens[0].0.shape();
        assert!(tokens.iter().all(|(cache, _)| cache.shape() == shape), "caches of one shape");
        let slots: Vec<KvSlot> = tokens.iter().map(|(cache, at)| cache.slot(*at)).collect();
        self.slots.write(&slots)?;
        self.is_consecutive = slots.windows(2).all(|two| two[1] == two[0].next());
        self.shape = Some(shape);
        self.tokens = tokens.len();
        self.visible = tokens.iter().map(|(_, at)| at + 1).max().unwrap_or(0);
        let held = tokens.iter().map(|(cache, _)| cache.keep()).collect();
        *lock(&self.held) = held;
        Ok(())
    }

    /// The tokens of the step.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The most tokens that one of them attends to, itself included.
    #[must_use]
    pub fn visible(&self) -> usize {
        self.visible
    }
}
