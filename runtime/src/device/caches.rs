//! The KV caches of the sequences of a call.

use stb_kernels::cuda::{AttentionShape, Device, KvCache, SlotMapping};

use crate::error::Result;

/// The part of a sequence that is on the device.
pub(crate) struct DeviceCache<'a> {
    /// The KV cache, once there is a token.
    pub cache: &'a mut Option<KvCache>,
    /// Tokens before the call.
    pub tokens: usize,
    /// The most tokens it may hold.
    pub limit: usize,
}

/// The caches of a call: that of one sequence, which gets all tokens, or of several, which get one each.
pub(crate) struct DeviceCaches<'a>(Vec<DeviceCache<'a>>);

impl<'a> DeviceCaches<'a> {
    /// The caches of these sequences.
    pub(crate) fn new(sequences: impl Iterator<Item = DeviceCache<'a>>) -> Self {
        Self(sequences.collect())
    }

    /// Makes room for `count` tokens from the `first` of the call on, and puts their places into `slots`.
    pub(super) fn place(
        &mut self,
        slots: &mut SlotMapping,
        device: &Device,
        attention: AttentionShape,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let is_one = self.0.len() == 1;
        let range = if is_one { 0..1 } else { first..first + count };
        let mut places = Vec::with_capacity(count);
        for DeviceCache { cache, tokens, limit } in &mut self.0[range] {
            let from = *tokens + if is_one { first } else { 0 };
            let added = if is_one { count } else { 1 };
            let cache = match cache {
                Some(cache) => cache,
                None => cache.insert(KvCache::new(device, attention)?),
            };
            cache.reserve(from + added, *limit)?;
            let cache = &*cache;
            places.extend((from..from + added).map(|position| (cache, position)));
        }
        slots.set(places)?;
        Ok(())
    }
}
