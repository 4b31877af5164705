//! A CUDA device that is the emulator: runs what programs queue on it, from a model's file down to the kernels and
//! their order.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use stb_kernels::cuda::simulated::{OFFSET_BITS, TAG};
use stb_kernels::cuda::{self, Device, DeviceInfo, Module};

use super::emulator::{Emulator, Launch};
use super::plans::launch_at;

/// Memory of a device by address.
pub type Memory = BTreeMap<u64, Vec<u8>>;

/// Kernels of all modules that were needed so far.
#[derive(Default)]
struct Machine {
    modules: Mutex<HashMap<Module, Emulator>>,
    /// Orders of threads and blocks that have to give the same.
    seeds: &'static [u64],
}

impl Machine {
    /// Runs launches in order, neighbors of one module in one process.
    fn run(&self, launches: &[cuda::Launch], memory: &mut Memory) {
        for same in launches.chunk_by(|a, b| a.module == b.module) {
            let mut modules = self.modules.lock().unwrap();
            let module = same[0].module;
            let emulator = modules.entry(module).or_insert_with(|| build(&module));
            let addresses: Vec<u64> = memory.keys().copied().collect();
            let pointer = |word: u64| {
                if word >> 48 != TAG >> 48 {
                    return None;
                }
                let offset = word & ((1 << OFFSET_BITS) - 1);
                let buffer = addresses.binary_search(&(word - offset)).expect("live memory");
                Some((buffer, offset as usize))
            };
            // Addresses in memory: the places of tokens, 16 bytes each.
            let mut run = Vec::new();
            let mut places = Vec::new();
            for (buffer, bytes) in memory.values().enumerate().filter(|_| is_attention(&module)) {
                for (i, place) in bytes.as_chunks::<16>().0.iter().enumerate() {
                    let word =
                        |at: usize| u64::from_le_bytes(place[at..at + 8].try_into().unwrap());
                    if bytes.len() <= 1 << 14
                        && let Some((cache, offset)) = pointer(word(0))
                    {
                        let set = Launch::new("set_slot").pointer(buffer, 16 * i);
                        let set = set.pointer(cache, offset).u32(word(8) as u32);
                        run.push(set.u32((word(8) >> 32) as u32));
                        places.push((buffer, 16 * i, *place));
                    }
                }
            }
            run.extend(same.iter().map(|launch| launch_at(launch, pointer)));
            let buffers: Vec<Vec<u8>> = memory.values().cloned().collect();
            let mut after = emulator.run(&buffers, &run, self.seeds).unwrap();
            for (buffer, at, place) in places {
                after[buffer][at..at + 16].copy_from_slice(&place);
            }
            memory.values_mut().zip(after).for_each(|(memory, after)| *memory = after);
        }
    }
}

fn is_attention(module: &Module) -> bool {
    matches!(module.file, "attention.cu" | "attention_many.cu")
}

fn build(module: &Module) -> Emulator {
    let slots = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/tests/emulator/slots.cu");
    let (sources, kernels): (&[&str], &[&str]) = match module.file {
        "gemv.cu" => (
            &["gemv.cu"],
            &[
                "exact_1",
                "exact_2",
                "exact_4",
                "rounded_1",
                "rounded_2",
                "rounded_4",
                "decode_rows",
            ],
        ),
        "gemv_nm.cu" => (
            &["gemv_nm.cu"],
            &["exact_1", "exact_2", "exact_4", "scaled_1", "scaled_2", "scaled_4", "decode_rows"],
        ),
        "gemm_prepare.cu" => (&["gemm_prepare.cu"], &["gemm_prepare", "gemm_round", "gemm_split"]),
        "gemm_rows.cu" => (&["gemm_rows.cu"], &["gemm_rows"]),
        "gemm_nm.cu" => (&["gemm_nm.cu"], &["gemm_512x64", "gemm_256x64", "gemm_256x16"]),
        "gemm_nm_s8.cu" => (&["gemm_nm_s8.cu"], &["gemm_512x64", "gemm_256x64", "gemm_256x16"]),
        "ops.cu" => (&["ops.cu"], &["materialize"]),
        "candidates.cu" => (&["candidates.cu"], &["candidates"]),
        "moments.cu" => {
            (&["moments.cu"], &["widen", "narrow", "finish", "copy_part", "block_dots"])
        }
        "attention_many.cu" => (
            &["attention_many.cu", slots],
            &[
                "attend_many_64",
                "attend_many_96",
                "attend_many_128",
                "attend_many_256",
                "set_slot",
                "clear_slots",
            ],
        ),
        _ => (
            &["attention.cu", slots],
            &["rotate", "attend_1", "attend_4", "attend_8", "set_slot", "clear_slots"],
        ),
    };
    Emulator::build(sources, kernels, module.defines).unwrap().expect("a C++ compiler")
}

/// The device, or `None`, with a word why, where there is no compiler for it.
pub fn device() -> Option<Device> {
    device_in_orders(&[0])
}

/// The same; every launch runs once for each seed, in orders of threads and blocks of its own.
pub fn device_in_orders(seeds: &'static [u64]) -> Option<Device> {
    Emulator::build(&["ops.cu"], &["materialize"], &[]).unwrap()?;
    let machine = Machine { seeds, ..Machine::default() };
    Some(simulated(move |launches, memory| machine.run(launches, memory)))
}

/// A device that does `run` for what is queued.
pub fn simulated(run: impl Fn(&[cuda::Launch], &mut Memory) + Send + Sync + 'static) -> Device {
    let info = DeviceInfo {
        ordinal: 0,
        name: "emulator".into(),
        capability: (9, 0),
        memory: 1 << 30,
        multiprocessors: 2,
        shared_memory: 99 << 10,
    };
    let run = move |launches: &[cuda::Launch], memory: &mut Memory| {
        run(launches, memory);
        Ok(())
    };
    Device::simulated(info, Box::new(run))
}
