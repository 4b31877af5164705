//! Scratch memory for launches whose blocks share results.

use super::device::{Buffer, Device};
use super::error::Result;
use super::launch::{ScratchAddresses, ScratchSize};

/// Partial sums and counters. The memory grows on demand.
#[derive(Debug)]
pub(super) struct SplitScratch {
    partial: Buffer<f32>,
    arrived: Buffer<u32>,
}

impl SplitScratch {
    /// Empty scratch memory.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            partial: device.zeros("partial sums", 0)?,
            arrived: device.zeros("counters", 0)?,
        })
    }

    /// Makes room for `size` and returns the addresses.
    pub(super) fn reserve(&mut self, size: ScratchSize) -> Result<ScratchAddresses> {
        if size.partial > self.partial.len() {
            self.partial = self.partial.device().zeros("partial sums", size.partial)?;
        }
        if size.arrived > self.arrived.len() {
            self.arrived = self.arrived.device().zeros("counters", size.arrived)?;
        }
        Ok(ScratchAddresses { partial: self.partial.address(), arrived: self.arrived.address() })
    }
}
