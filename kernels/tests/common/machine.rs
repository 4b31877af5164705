//! A simulated CUDA device whose launches the emulator runs, for tests of whole programs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use stb_kernels::cuda::simulated::{OFFSET_BITS, TAG};
use stb_kernels::cuda::{self, Device, DeviceInfo, Module};

use super::emulator::{Emulator, Launch};
use super::kernels::{build, is_attention, module_named};
use super::plans::launch_at;

/// The memory of a device, by address.
pub type DeviceMemory = BTreeMap<u64, Vec<u8>>;

/// Builds modules when they are needed and runs launches.
#[derive(Default)]
struct Machine {
    modules: Mutex<HashMap<Module, Emulator>>,
    /// Seeds of the orders of threads and blocks, all of which must give the same result.
    seeds: &'static [u64],
}

impl Machine {
    /// Runs launches in order. Neighboring launches of one module share a process.
    fn run(&self, launches: &[cuda::Launch], memory: &mut DeviceMemory) {
        for same in launches.chunk_by(|a, b| a.module == b.module) {
            let mut modules = self.modules.lock().unwrap();
            let module = same[0].module;
            let emulator =
                modules.entry(module).or_insert_with(|| build(&module).expect("a C++ compiler"));
            let addresses: Vec<u64> = memory.keys().copied().collect();
            let pointer = |word: u64| {
                if word >> 48 != TAG >> 48 {
                    return None;
                }
                let offset = word & ((1 << OFFSET_BITS) - 1);
                let buffer = addresses.binary_search(&(word - offset)).expect("live memory");
                Some((buffer, offset as usize))
            };
            // Slots hold addresses in memory; each has 16 bytes.
            let mut run = Vec::new();
            let mut slots = Vec::new();
            for (buffer, bytes) in memory.values().enumerate().filter(|_| is_attention(&module)) {
                for (i, slot) in bytes.as_chunks::<16>().0.iter().enumerate() {
                    let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap());
                    if bytes.len() <= 1 << 14
                        && let Some((cache, offset)) = pointer(word(0))
                    {
                        let set = Launch::new("set_slot").pointer(buffer, 16 * i);
                        let set = set.pointer(cache, offset).u32(word(8) as u32);
                        run.push(set.u32((word(8) >> 32) as u32));
                        slots.push((buffer, 16 * i, *slot));
                    }
                }
            }
            run.extend(same.iter().map(|launch| launch_at(launch, pointer)));
            let buffers: Vec<Vec<u8>> = memory.values().cloned().collect();
            let mut after = emulator.run(&buffers, &run, self.seeds).unwrap();
            for (buffer, at, slot) in slots {
                after[buffer][at..at + 16].copy_from_slice(&slot);
            }
            memory.values_mut().zip(after).for_each(|(memory, after)| *memory = after);
        }
    }
}

/// The device; `None`, with a line that says why, if there is no C++ compiler.
pub fn device() -> Option<Device> {
    device_in_orders(&[0])
}

/// [`device`] with seeds: every launch runs once for each seed, which decides the order of threads and blocks.
pub fn device_in_orders(seeds: &'static [u64]) -> Option<Device> {
    build(&module_named("activations"))?;
    let machine = Machine { seeds, ..Machine::default() };
    Some(simulated(move |launches, memory| machine.run(launches, memory)))
}

/// A device that calls `run` for queued launches.
pub fn simulated(
    run: impl Fn(&[cuda::Launch], &mut DeviceMemory) + Send + Sync + 'static,
) -> Device {
    let info = DeviceInfo {
        ordinal: 0,
        name: "emulator".into(),
        capability: (9, 0),
        memory: 1 << 30,
        multiprocessors: 2,
        shared_memory: 99 << 10,
    };
    let run = move |launches: &[cuda::Launch], memory: &mut DeviceMemory| {
        run(launches, memory);
        Ok(())
    };
    Device::simulated(info, Box::new(run))
}
