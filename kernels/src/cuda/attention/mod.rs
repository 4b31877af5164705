//! Attention over the KV cache of a device.

mod kv_cache;
mod run;
mod shape;
mod slots;

pub use kv_cache::{KvCache, KvSlot};
pub use run::{Attention, AttentionArgs};
pub(super) use shape::MODULES;
pub use shape::{AttentionAddresses, AttentionBatch, AttentionShape, RopeAddresses};
pub use slots::SlotMapping;
