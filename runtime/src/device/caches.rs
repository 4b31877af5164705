//! KV caches on a device.

use stb_kernels::cuda::{self, AttentionShape, Device, SlotMapping};

use crate::error::Result;
use crate::kv_cache::KvCache;

/// The caches of a pass: one sequence that receives all tokens, or several that receive one token each.
pub(crate) struct DeviceCaches<'a>(Vec<&'a mut KvCache>);

impl<'a> DeviceCaches<'a> {
    /// The caches of these sequences.
    pub(crate) fn new(sequences: impl Iterator<Item = &'a mut KvCache>) -> Self {
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
        for sequence in &mut self.0[range] {
            let from = sequence.len() + if is_one { first } else { 0 };
            let added = if is_one { count } else { 1 };
            let limit = sequence.limit();
            let slot = &mut sequence.device;
            let cache = match slot {
                Some(cache) => cache,
                None => slot.insert(cuda::KvCache::new(device, attention)?),
            };
            cache.reserve(from + added, limit)?;
            let cache = &*cache;
            places.extend((from..from + added).map(|position| (cache, position)));
        }
        slots.set(places)?;
        Ok(())
    }
}
