//! A simulated device for tests: its memory is the host's, and a callback runs the launches.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::error::Result;
use super::launch::Launch;
use super::sync::lock;

/// The first bits of an address in simulated memory; the number of the allocation and an offset of
/// `OFFSET_BITS` follow. No other field of a kernel's parameter starts with these bits.
pub const TAG: u64 = 0x7a5a << 48;
/// Bits of an offset.
pub const OFFSET_BITS: u32 = 28;

/// Runs launches one after another on memory, which is given by address.
///
/// # Errors
/// The error that the user of the device sees.
pub type SimulatedRun = dyn Fn(&[Launch], &mut BTreeMap<u64, Vec<u8>>) -> Result<()> + Send + Sync;

/// The memory of a simulated device, and the launches that are queued.
pub(super) struct SimulatedMemory {
    state: Mutex<SimulatedState>,
    run: Box<SimulatedRun>,
}

#[derive(Default)]
struct SimulatedState {
    memory: BTreeMap<u64, Vec<u8>>,
    allocations: u64,
    queue: Vec<Launch>,
    is_recording: bool,
}

impl SimulatedMemory {
    pub(super) fn new(run: Box<SimulatedRun>) -> Self {
        Self { state: Mutex::default(), run }
    }

    /// Bytes that are allocated.
    pub(super) fn used(&self) -> u64 {
        lock(&self.state).memory.values().map(|m| m.len() as u64).sum()
    }

    pub(super) fn allocate(&self, bytes: usize) -> u64 {
        assert!(bytes < 1 << OFFSET_BITS, "simulated memory is for small models");
        let state = &mut *lock(&self.state);
        let address = TAG | state.allocations << OFFSET_BITS;
        state.allocations += 1;
        state.memory.insert(address, vec![0; bytes]);
        address
    }

    pub(super) fn release(&self, address: u64) {
        // Queued work comes first, as on a device.
        let _ = self.synchronize();
        lock(&self.state).memory.remove(&address);
    }

    pub(super) fn launch(&self, launch: &Launch) {
        lock(&self.state).queue.push(launch.clone());
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        let state = &mut *lock(&self.state);
        if state.is_recording || state.queue.is_empty() {
            return Ok(());
        }
        (self.run)(&std::mem::take(&mut state.queue), &mut state.memory)
    }

    pub(super) fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<Vec<Launch>> {
        self.synchronize()?;
        lock(&self.state).is_recording = true;
        let queued = queue();
        let state = &mut *lock(&self.state);
        state.is_recording = false;
        let recorded = std::mem::take(&mut state.queue);
        queued.map(|()| recorded)
    }

    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.synchronize()?;
        self.with_memory(address, |memory| memory[..data.len()].copy_from_slice(data));
        Ok(())
    }

    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        self.with_memory(address, |memory| to.copy_from_slice(&memory[..to.len()]));
        Ok(())
    }

    /// Calls `f` with the memory from an address on.
    fn with_memory(&self, address: u64, f: impl FnOnce(&mut [u8])) {
        let offset = address & ((1 << OFFSET_BITS) - 1);
        let state = &mut *lock(&self.state);
        let memory = state.memory.get_mut(&(address - offset)).expect("live memory");
        f(&mut memory[offset as usize..]);
    }
}
