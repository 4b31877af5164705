//! A whole model on a CUDA device that is the emulator: the same results as on the CPU, from the
//! model's file down to the kernels and their order.

#[path = "../../kernels/tests/common/emulator.rs"]
#[allow(dead_code)]
mod emulator;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::Mutex;

use emulator::{Emulator, Launch, Piece};
use stb_convert::Recipe;
use stb_format::Encoding;
use stb_format::encoding::Nm;
use stb_kernels::cuda::simulated::{OFFSET_BITS, TAG};
use stb_kernels::cuda::{self, Device, DeviceInfo, Gemm, Input, Matrix, Module, PromptNumbers};
use stb_runtime::{KvKind, Model, OpenOptions, State};
use stb_tests::random::Rng;
use stb_tests::random_model::{random, shape, write};

type Memory = BTreeMap<u64, Vec<u8>>;

/// Kernels of all modules that were needed so far.
#[derive(Default)]
struct Machine {
    modules: Mutex<HashMap<Module, Emulator>>,
}

impl Machine {
    /// Runs launches in order, neighbours of one module in one process.
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
            run.extend(same.iter().map(|launch| {
                let piece = |word: &u64| match pointer(*word) {
                    Some((buffer, offset)) => Piece::Pointer { buffer, offset },
                    None => Piece::Bytes(word.to_le_bytes().to_vec()),
                };
                let [x, y, z] = launch.blocks.map(|n| n as usize);
                Launch::new(launch.kernel)
                    .grid(x, y, z)
                    .block(launch.threads as usize, 1, 1)
                    .shared(launch.shared as usize)
                    .pieces(launch.params.iter().map(piece).collect())
            }));
            let buffers: Vec<Vec<u8>> = memory.values().cloned().collect();
            let mut after = emulator.run(&buffers, &run, &[0]).unwrap();
            for (buffer, at, place) in places {
                after[buffer][at..at + 16].copy_from_slice(&place);
            }
            memory.values_mut().zip(after).for_each(|(memory, after)| *memory = after);
        }
    }
}

fn is_attention(module: &Module) -> bool {
    module.file == "attention.cu"
}

fn build(module: &Module) -> Emulator {
    let slots = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/tests/emulator/slots.cu");
    let (sources, kernels): (&[&str], &[&str]) = match module.file {
        "matvec.cu" => (
            &["matvec.cu"],
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
        "matvec_nm.cu" => (
            &["matvec_nm.cu"],
            &["exact_1", "exact_2", "exact_4", "scaled_1", "scaled_2", "scaled_4", "decode_rows"],
        ),
        "gemm_prepare.cu" => (&["gemm_prepare.cu"], &["gemm_prepare", "gemm_round", "gemm_split"]),
        "gemm_rows.cu" => (&["gemm_rows.cu"], &["gemm_rows"]),
        "gemm_nm.cu" => (&["gemm_nm.cu"], &["gemm_512x64", "gemm_256x64", "gemm_256x16"]),
        "gemm_nm_s8.cu" => (&["gemm_nm_s8.cu"], &["gemm_512x64", "gemm_256x64", "gemm_256x16"]),
        "ops.cu" => (&["ops.cu"], &["materialise", "argmax"]),
        _ => (
            &["attention.cu", slots],
            &["rotate", "attend_1", "attend_4", "attend_8", "set_slot", "clear_slots"],
        ),
    };
    Emulator::build(sources, kernels, module.defines).unwrap().expect("a C++ compiler")
}

fn device() -> Device {
    let machine = Machine::default();
    let info = DeviceInfo {
        ordinal: 0,
        name: "emulator".into(),
        capability: (9, 0),
        memory: 1 << 30,
        multiprocessors: 2,
        shared_memory: 99 << 10,
    };
    Device::simulated(
        info,
        Box::new(move |launches, memory| {
            machine.run(launches, memory);
            Ok(())
        }),
    )
}

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v * v).sum::<f32>();
    let errors = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let error = (errors / squares(&mut expected.iter().copied())).sqrt();
    assert!(error <= tolerance, "{what}: relative error {error}");
}

/// Prompts of several steps, tokens one by one (at first, recorded, and from the recording), several
/// sequences side by side, logits of all tokens, going back.
fn same_as_on_the_cpu(recipe: &str, options: OpenOptions, layers: Option<usize>, tolerance: f32) {
    // Says so where there is no compiler.
    if Emulator::build(&["ops.cu"], &["argmax"], &[]).unwrap().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", None).unwrap();
    write(&spec, &Recipe::load(recipe).unwrap(), File::create(&path).unwrap()).unwrap();
    let host = Model::open(&path, &options).unwrap();
    let model = Model::open(&path, &options).unwrap().use_device(&device(), layers).unwrap();
    let (mut a, mut b) = (State::new(&host, 100), State::new(&model, 100));
    let prompt: Vec<u32> = (0..19).map(|i| i * 7 % 64).collect();
    let check = |tokens: &[u32], a: &mut State, b: &mut State, what: &str| {
        let expected = host.forward(a, tokens).unwrap().to_vec();
        let found = model.forward(b, tokens).unwrap();
        close(found, &expected, tolerance, what);
        assert_eq!(a.len(), b.len(), "{what}");
    };
    check(&prompt, &mut a, &mut b, "prompt");
    for token in 0..3 {
        check(&[token], &mut a, &mut b, "one token");
    }
    a.truncate(5);
    b.truncate(5);
    check(&[9, 8], &mut a, &mut b, "after going back");

    let mut expected = Vec::new();
    let mut found = Vec::new();
    host.forward_all(&mut a, &prompt, |_, logits| expected.extend_from_slice(logits)).unwrap();
    model
        .forward_all(&mut b, &prompt, |first, logits| {
            assert_eq!(first * 64, found.len());
            found.extend_from_slice(logits);
        })
        .unwrap();
    close(&found, &expected, tolerance, "all logits");

    let (mut many_a, mut many_b) = ([a, State::new(&host, 9)], [b, State::new(&model, 9)]);
    for tokens in [[3, 4], [5, 6]] {
        let expected = host.forward_batch(&mut many_a, &tokens).unwrap().to_vec();
        let found = model.forward_batch(&mut many_b, &tokens).unwrap();
        close(found, &expected, tolerance, "side by side");
    }
    assert!(model.forward(&mut many_b[1], &[64]).is_err(), "a token outside the vocabulary");
    assert!(model.forward(&mut many_b[1], &[1; 8]).is_err(), "more than the context");
    assert_eq!(many_b[1].len(), 2);
}

#[test]
fn joint_codes_with_an_exact_cache() {
    same_as_on_the_cpu("nm-1of8", OpenOptions::exact(), None, 1e-4);
}

#[test]
fn the_published_structure_with_a_cache_of_16_bits() {
    let options = OpenOptions { exact: true, kv: KvKind::F16, ..OpenOptions::default() };
    same_as_on_the_cpu("stbllm-4of8", options, None, 2e-2);
}

/// CPU and device round activations differently, to 8 bits for a few tokens and to f16 for many. One layer, so that
/// errors do not multiply.
#[test]
fn rounded_activations_of_few_and_many_tokens() {
    if Emulator::build(&["ops.cu"], &["argmax"], &[]).unwrap().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", Some(1)).unwrap();
    write(&spec, &Recipe::load("int4").unwrap(), File::create(&path).unwrap()).unwrap();
    let exact = Model::open(&path, &OpenOptions::exact()).unwrap();
    let model = Model::open(&path, &OpenOptions::default()).unwrap();
    let model = model.use_device(&device(), None).unwrap();
    let many: Vec<u32> = (0..70).map(|i| i * 5 % 64).collect();
    for (prompt, tolerance) in [(&[3, 4][..], 3e-2), (&many, 2e-2)] {
        let expected = exact.forward(&mut State::new(&exact, 80), prompt).unwrap().to_vec();
        let mut state = State::new(&model, 80);
        let found = model.forward(&mut state, prompt).unwrap();
        close(found, &expected, tolerance, "rounded");
        assert!(found != expected);
    }
}

/// Matrices of one input that take it in other orders of columns, with their own factors, or not in 8 bits.
#[test]
fn prompts_in_8_bits() {
    if Emulator::build(&["ops.cu"], &["argmax"], &[]).unwrap().is_none() {
        return;
    }
    let device = device();
    let mut gemm = Gemm::new(&device).unwrap().with_numbers(PromptNumbers::Int8);
    let (rows, cols, tokens) = (40, 300, 20);
    let mut rng = Rng(3);
    let x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
    let input = device.upload("activations", &x).unwrap();
    let mut matrices = Vec::new();
    let mut expected = Vec::new();
    for (n, m, bits, factors) in [
        (1, 8, 4, false),
        (1, 8, 4, false),
        (1, 4, 4, false),
        (1, 8, 8, false),
        (2, 8, 4, true),
        (2, 8, 4, false),
    ] {
        let encoding = Encoding::Nm(Nm::new(n, m, bits, 32, factors).unwrap());
        let bytes = random(&[rows as u64, cols as u64], &encoding);
        let weights = encoding.view(rows as u64, cols as u64, &bytes).unwrap().decode();
        let product = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
        let rows_of = |x: &[f32]| weights.chunks(cols).map(|w| product(x, w)).collect::<Vec<_>>();
        expected.push(x.chunks(cols).flat_map(rows_of).collect::<Vec<f32>>());
        matrices.push(Matrix::upload(&device, &encoding, rows, cols, &bytes).unwrap());
    }
    let zeros = || device.zeros("results", tokens * rows).unwrap();
    let mut out: Vec<_> = matrices.iter().map(|_| zeros()).collect();
    let mut to: Vec<_> = out.iter_mut().collect();
    let matrices: Vec<_> = matrices.iter().collect();
    gemm.queue(&matrices, Input::Plain(&input), &mut to, false, tokens).unwrap();
    for (out, expected) in out.iter().zip(&expected) {
        let mut found = vec![0.0; tokens * rows];
        out.read(&mut found).unwrap();
        close(&found, expected, 0.01, "a product in 8 bits");
    }
}
