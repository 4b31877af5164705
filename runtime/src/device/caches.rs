//! KV caches on a device.

use stb_kernels::cuda::{AttentionShape, Device, KvCache, SlotMapping};

use crate::error::Result;

/// The part of a sequence on the device.
pub(crate) struct DeviceCache<'a> {
    /// The KV cache; allocated with the first token.
    pub cache: &'a mut Option<KvCache>,
    /// The number of cached tokens before the pass.
    pub tokens: usize,
    /// The largest number of tokens in the cache.
    pub limit: usize,
}

/// The caches of a pass: one sequence that receives all tokens, or several that receive one token each.
pub(crate) struct DeviceCaches<'a>(Vec<DeviceCache<'a>>);

impl<'a> DeviceCaches<'a> {
    /// The caches of these sequences.
    pub(crate) fn new(sequences: impl Iterator<Item = DeviceCache<'a>>) -> Self {
        Self(sequences.collect())
    }

    /// Reserves cache slots for tokens `first..first + count` of the pass and writes them to `slots`.
    pub(super) fn assign_slots(
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
