//! The CUDA kernels of a decoded token, planned as for a device and run by the emulator, against the exact
//! decoder of the format and sums in f64.

mod common;

use common::emulator::{Emulator, Launch, Piece, bytes_of, floats};
use common::random::{Rng, encodings, payload};
use stb_format::Encoding;
use stb_kernels::cuda::{
    self, Attention, Input, Limits, MatVecPlan, MatrixParams, Module, Numbers,
};
use stb_kernels::kv::KvKind;

/// Addresses of buffers in plans: a tag that no other field of a parameter has, the number of the
/// buffer, the offset.
const TAG: u64 = 0x7a5a << 48;

fn address(buffer: usize) -> u64 {
    TAG | (buffer as u64) << 40
}

/// A plan with its addresses as pointers into buffers.
fn launch(plan: &cuda::Launch) -> Launch {
    let piece = |word: &u64| match word & 0xffff << 48 {
        TAG => Piece::Pointer {
            buffer: (word >> 40 & 255) as usize,
            offset: (word & ((1 << 40) - 1)) as usize,
        },
        _ => Piece::Bytes(word.to_le_bytes().to_vec()),
    };
    let [x, y, z] = plan.blocks.map(|n| n as usize);
    Launch::new(plan.kernel)
        .grid(x, y, z)
        .block(plan.threads as usize, 1, 1)
        .shared(plan.shared as usize)
        .pieces(plan.params.iter().map(piece).collect())
}

/// The kernels of a module; `None` where there is no C++ compiler.
fn build(module: &Module) -> Option<Emulator> {
    let kernels: &[&str] = match module.file {
        "matvec.cu" => {
            &["exact_1", "exact_2", "exact_4", "rounded_1", "rounded_2", "rounded_4", "decode_rows"]
        }
        "matvec_nm.cu" => {
            &["exact_1", "exact_2", "exact_4", "scaled_1", "scaled_2", "scaled_4", "decode_rows"]
        }
        "attention.cu" => {
            let slots = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emulator/slots.cu");
            let kernels = ["rotate", "attend_1", "attend_4", "attend_8", "set_slot", "clear_slots"];
            return Emulator::build(&[module.file, slots], &kernels, module.defines).unwrap();
        }
        _ => &["materialise", "argmax"],
    };
    Emulator::build(&[module.file], kernels, module.defines).unwrap()
}

/// A small device, so that small matrices are split in all ways; and a large one.
const LIMITS: [Limits; 2] = [
    Limits { multiprocessors: 1, shared: 98 << 10 },
    Limits { multiprocessors: 132, shared: 226 << 10 },
];

/// Ragged rows, columns, groups, units, tiles and chunks; more columns than a slab.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (16, 64), (33, 172), (80, 352), (17, 31), (70, 700), (5, 1100), (21, 2300)];

struct Case<'a> {
    encoding: &'a Encoding,
    rows: &'a [usize],
    cols: usize,
    tokens: usize,
    numbers: Numbers,
    limits: Limits,
}

impl Case<'_> {
    /// One launch for all matrices with a random kind of input, checked number by number.
    fn run(&self, rng: &mut Rng, emulator: &Emulator, seeds: &[u64]) {
        let Self { encoding, rows, cols, tokens, numbers, limits } = *self;
        let what = format!("{encoding} {rows:?}x{cols}, {tokens} tokens, {numbers:?}, {limits:?}");
        let payloads: Vec<_> = rows.iter().map(|r| payload(rng, encoding, *r, cols)).collect();
        let mut x = rng.floats(tokens * cols);
        // Outliers, as activations have them.
        for _ in 0..cols / 50 {
            let at = rng.below(x.len());
            x[at] *= 300.0;
        }
        let (eps, kind, add) = (1e-5, rng.below(3), rng.below(2) == 1);
        let with = rng.floats(if kind == 2 { tokens * cols } else { cols });
        let input: Vec<f64> = (0..tokens * cols)
            .map(|i| {
                let of = |i: usize| f64::from(x[i]);
                let token = i / cols * cols;
                match kind {
                    0 => of(i),
                    1 => {
                        let squares: f64 = (token..token + cols).map(|i| of(i) * of(i)).sum();
                        let scale = 1.0 / (squares / cols as f64 + f64::from(eps)).sqrt();
                        of(i) * scale * f64::from(with[i % cols])
                    }
                    _ => of(i) / (1.0 + (-of(i)).exp()) * f64::from(with[i]),
                }
            })
            .collect();

        // Buffers: inputs, partial sums, counters, then payload and result of each matrix.
        let source = match kind {
            0 => Input::Plain(address(0)),
            1 => Input::Norm { x: address(0), weight: address(1), eps },
            _ => Input::Silu { gate: address(0), up: address(1) },
        };
        let matrices: Vec<(MatrixParams, u64)> = payloads
            .iter()
            .zip(rows)
            .enumerate()
            .map(|(i, (bytes, rows))| {
                let view = encoding.view(*rows as u64, cols as u64, bytes).unwrap();
                let at = address(4 + 2 * i);
                (MatrixParams::new(&view, bytes, at).unwrap(), address(5 + 2 * i))
            })
            .collect();
        let work = [address(2), address(3)];
        let plan = MatVecPlan::new(limits, encoding, &matrices, source, numbers, add, tokens, work)
            .unwrap();
        let mut buffers = vec![
            bytes_of(&x),
            bytes_of(&with),
            vec![0xff; plan.partial * 4],
            vec![0; plan.arrived * 4],
        ];
        let before = rng.floats(tokens * rows.iter().max().unwrap());
        for (bytes, rows) in payloads.iter().zip(rows) {
            buffers.push(bytes.clone());
            buffers.push(bytes_of(&before[..tokens * rows]));
        }
        let found = emulator.run(&buffers, &[launch(&plan.launch)], seeds).expect(&what);
        assert!(found[3].iter().all(|b| *b == 0), "{what}: counters are left as they were");
        for (i, (bytes, rows)) in payloads.iter().zip(rows).enumerate() {
            let weights = encoding.view(*rows as u64, cols as u64, bytes).unwrap().decode();
            let y = floats(&found[5 + 2 * i]);
            for (t, r) in (0..tokens).flat_map(|t| (0..*rows).map(move |r| (t, r))) {
                let (w, x) = (&weights[r * cols..][..cols], &input[t * cols..][..cols]);
                let mut sum = if add { f64::from(before[t * rows + r]) } else { 0.0 };
                let (mut magnitude, mut rounding) = (sum.abs(), 0.0);
                for (w, x) in w.chunks(32).zip(x.chunks(32)) {
                    let largest = x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                    for (w, x) in w.iter().zip(x) {
                        sum += f64::from(*w) * x;
                        magnitude += (f64::from(*w) * x).abs();
                        rounding += largest / 254.0 * f64::from(w.abs());
                    }
                }
                let rounding = if numbers == Numbers::Rounded { rounding } else { 0.0 };
                let tolerance = 1e-5 * magnitude + 1.0001 * rounding + 1e-30;
                let y = y[t * rows + r];
                let error = (f64::from(y) - sum).abs();
                assert!(error <= tolerance, "{what}: token {t}, row {r}: {y} instead of {sum}");
            }
        }
    }
}

/// All encodings that the module of this name computes, in all kinds of calls.
fn products(module: &str) {
    let module = Module::ALL.iter().find(|m| m.name == module).unwrap();
    let Some(emulator) = build(module) else { return };
    let mut rng = Rng(7);
    let mine = |e: &&Encoding| MatVecPlan::module(e).unwrap() == *module;
    for encoding in encodings().iter().filter(mine) {
        for (i, (rows, cols)) in SHAPES.into_iter().enumerate() {
            for numbers in [Numbers::Exact, Numbers::Rounded] {
                let tokens = [1, 2, 3, 4, 5][rng.below(5)];
                let rows = [rows, 1 + rng.below(40), 16];
                let rows = &rows[..1 + rng.below(3)];
                let limits = LIMITS[rng.below(2)];
                let case = Case { encoding, rows, cols, tokens, numbers, limits };
                case.run(&mut rng, &emulator, if i % 3 == 0 { &[0, 1] } else { &[2] });
            }
            decode_rows(&mut rng, &emulator, encoding, rows, cols);
        }
    }
}

/// Rows as numbers: exactly those of the format.
fn decode_rows(rng: &mut Rng, emulator: &Emulator, encoding: &Encoding, rows: usize, cols: usize) {
    let bytes = payload(rng, encoding, rows, cols);
    let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
    let params = MatrixParams::new(&view, &bytes, address(0)).unwrap();
    // An id outside the matrix leaves its row alone.
    let ids: Vec<u32> = (0..4).map(|_| rng.below(rows) as u32).chain([rows as u32]).collect();
    let plan = cuda::plan_decode(encoding, params, address(1), ids.len(), address(2)).unwrap();
    let id_bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let buffers = [bytes.clone(), id_bytes, bytes_of(&vec![9.0; ids.len() * cols])];
    let found = floats(&emulator.run(&buffers, &[launch(&plan)], &[3]).unwrap()[2]);
    let weights = view.decode();
    for (i, id) in ids.iter().enumerate() {
        for c in 0..cols {
            let expected = weights.get(*id as usize * cols + c).copied().unwrap_or(9.0);
            let found = found[i * cols + c];
            assert!(
                found == expected,
                "{encoding} {rows}x{cols} row {id} column {c}: {found} {expected}"
            );
        }
    }
}

macro_rules! products {
    ($($test:ident $module:literal)*) => { $(
        #[test]
        fn $test() {
            products($module);
        }
    )* };
}

products! {
    joint_codes_1_8 "nm 1:8"
    joint_codes_1_4 "nm 1:4"
    joint_codes_2_8 "nm 2:8"
    joint_codes_2_4 "nm 2:4"
    dense_f32 "f32"
    dense_f16 "f16"
    dense_bf16 "bf16"
    integers_of_1_bit "int1"
    integers_of_2_bits "int2"
    integers_of_3_bits "int3"
    integers_of_4_bits "int4"
    integers_of_8_bits "int8"
    stbllm "stbllm"
}

/// Bits like the encoder makes none and a reader has to survive: no rule holds but the lengths.
#[test]
fn hostile_payloads_stay_inside_their_buffers() {
    let mut rng = Rng(11);
    for name in ["stbllm", "nm 2:8", "int3"] {
        let module = Module::ALL.iter().find(|m| m.name == name).unwrap();
        let Some(emulator) = build(module) else { return };
        let all = encodings();
        let encoding = all.iter().find(|e| MatVecPlan::module(e).unwrap() == *module).unwrap();
        for (rows, cols) in [(33, 172), (5, 1100)] {
            let length = payload(&mut rng, encoding, rows, cols).len();
            let bytes: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            let matrix = MatrixParams::new(&view, &bytes, address(4)).unwrap();
            for numbers in [Numbers::Exact, Numbers::Rounded] {
                let (input, work) = (Input::Plain(address(0)), [address(2), address(3)]);
                let matrices = [(matrix, address(1))];
                let plan =
                    MatVecPlan::new(LIMITS[0], encoding, &matrices, input, numbers, false, 1, work);
                let plan = plan.unwrap();
                let x = bytes_of(&rng.floats(cols));
                let work = [vec![0; plan.partial * 4], vec![0; plan.arrived * 4]];
                let [partial, arrived] = work;
                let buffers = [x, vec![0; rows * 4], partial, arrived, bytes.clone()];
                emulator.run(&buffers, &[launch(&plan.launch)], &[0]).unwrap();
            }
        }
    }
}

/// Tokens of several sequences in one step: (tokens before it, tokens in it) of each.
struct Step<'a> {
    a: Attention,
    sequences: &'a [(usize, usize)],
}

/// Keys, values and queries of all tokens of a sequence, [tokens, heads · width].
type Tokens = [Vec<f32>; 3];

impl Step<'_> {
    const LAYER: usize = 1;

    fn check(&self, rng: &mut Rng, emulator: &Emulator, tolerance: f64) {
        let Self { a, sequences } = *self;
        let Attention { heads, kv_heads, width, .. } = a;
        let widths = [heads, kv_heads, kv_heads].map(|n| n * width);
        let frequencies: Vec<f32> = (0..width / 2).map(|i| 0.7f32.powi(i as i32)).collect();
        let all: Vec<Tokens> = sequences
            .iter()
            .map(|(before, now)| widths.map(|n| rng.floats((before + now) * n)))
            .collect();
        // Buffers: q, k, v, out, frequencies, places, partial, counters; then the caches.
        let longest = sequences.iter().map(|(before, now)| before + now).max().unwrap();
        let capacity = longest + 3;
        let mut buffers = vec![Vec::new(); 8];
        buffers[4] = bytes_of(&frequencies);
        buffers.extend(sequences.iter().map(|_| vec![0; a.cache_bytes(capacity)]));
        let mut launches = Vec::new();
        let mut first = 0;
        for is_now in [false, true] {
            let count = |s: &(usize, usize)| if is_now { s.1 } else { s.0 };
            let tokens: usize = sequences.iter().map(count).sum();
            for (s, (of, sequence)) in all.iter().zip(sequences).enumerate() {
                let from = if is_now { sequence.0 } else { 0 };
                for position in from..from + count(sequence) {
                    for i in 0..3 {
                        let token = &of[i][position * widths[i]..][..widths[i]];
                        buffers[i].extend(bytes_of(token));
                    }
                    let place = buffers[5].len();
                    buffers[5].extend([0; 16]);
                    let set = Launch::new("set_slot").pointer(5, place).buffer(8 + s);
                    launches.push(set.u32(capacity as u32).u32(position as u32));
                }
            }
            if tokens == 0 {
                continue;
            }
            let at = |buffer, bytes: usize| address(buffer) + (first * bytes) as u64;
            let ends = [at(0, widths[0] * 4), at(1, widths[1] * 4), at(2, widths[2] * 4)];
            let slots = at(5, 16);
            let rotate = a.plan_rotate(ends, address(4), slots, Self::LAYER, tokens).unwrap();
            launches.push(launch(&rotate));
            if is_now {
                let work = a.work(tokens, longest);
                buffers[3] = vec![0xff; tokens * widths[0] * 4];
                buffers[6] = vec![0xff; work[0] * 4];
                buffers[7] = vec![0; work[1] * 4];
                let work = [address(6), address(7)];
                let ends = [ends[0], address(3)];
                let plan = a.plan_attend(ends, slots, work, Self::LAYER, tokens, longest);
                launches.push(launch(&plan.unwrap()));
            }
            first += tokens;
        }
        let clear = Launch::new("clear_slots").block(1024, 1, 1).buffer(5).u32(first as u32);
        launches.push(clear);
        let what = format!("{a:?} {sequences:?}");
        let found = emulator.run(&buffers, &launches, &[0, 5]).expect(&what);
        assert!(found[7].iter().all(|b| *b == 0), "{what}: counters are left as they were");
        let out = floats(&found[3]);
        let mut token = 0;
        for (of, (before, now)) in all.iter().zip(sequences) {
            for position in *before..before + now {
                for head in 0..heads {
                    let expected = self.naive(of, &frequencies, position, head);
                    let found = &out[(token * heads + head) * width..][..width];
                    for (found, expected) in found.iter().zip(expected) {
                        let error = (f64::from(*found) - expected).abs();
                        assert!(error < tolerance, "{what} {position}: {found} {expected}");
                    }
                }
                token += 1;
            }
        }
    }

    /// The definition, in f64.
    fn naive(&self, of: &Tokens, frequencies: &[f32], position: usize, head: usize) -> Vec<f64> {
        let Attention { heads, kv_heads, width, interleaved, .. } = self.a;
        let row = |i: usize, n: usize, at: usize, head: usize| -> Vec<f64> {
            of[i][(at * n + head) * width..][..width].iter().map(|v| f64::from(*v)).collect()
        };
        let rotated = |x: Vec<f64>, at: usize| -> Vec<f64> {
            let mut out = x.clone();
            for (pair, frequency) in frequencies.iter().enumerate() {
                let (low, high) = match interleaved {
                    true => (2 * pair, 2 * pair + 1),
                    false => (pair, pair + width / 2),
                };
                let (s, c) = f64::from(at as f32 * frequency).sin_cos();
                out[low] = x[low] * c - x[high] * s;
                out[high] = x[high] * c + x[low] * s;
            }
            out
        };
        let kv_head = head / (heads / kv_heads);
        let q = rotated(row(0, heads, position, head), position);
        let weights: Vec<f64> = (0..=position)
            .map(|at| {
                let k = rotated(row(1, kv_heads, at, kv_head), at);
                let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                (dot / (width as f64).sqrt()).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; width];
        for (at, weight) in weights.iter().enumerate() {
            let v = row(2, kv_heads, at, kv_head);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight / total * v);
        }
        out
    }
}

/// Groups of 1 to 9 heads, both pairings, ragged widths, one split and several, steps of one token, of
/// several sequences and of parts of a prompt.
fn attention(kind: KvKind, tolerance: f64) {
    let mut rng = Rng(3);
    let shapes = [
        (4, 1, 24, true),
        (9, 1, 128, true),
        (2, 2, 64, false),
        (6, 2, 6, false),
        (1, 1, 2, false),
    ];
    // Each shape is a program of its own: all for one kind, some for the others.
    let shapes = if kind == KvKind::F16 { &shapes[..] } else { &shapes[1..3] };
    for &(heads, kv_heads, width, interleaved) in shapes {
        let a = Attention { heads, kv_heads, width, layers: 2, kind, interleaved };
        let Some(emulator) = build(&a.module()) else { return };
        for sequences in [&[(0, 1)][..], &[(255, 1), (3, 1)], &[(256, 3)], &[(0, 5), (520, 2)]] {
            Step { a, sequences }.check(&mut rng, &emulator, tolerance);
        }
    }
}

#[test]
fn attention_over_f32() {
    attention(KvKind::F32, 2e-6);
}

#[test]
fn attention_over_f16() {
    attention(KvKind::F16, 1e-3);
}

#[test]
fn attention_over_8_bits() {
    attention(KvKind::Q8, 2e-2);
}

#[test]
fn operations() {
    let Some(emulator) = build(&Module::ALL[0]) else { return };
    let mut rng = Rng(9);
    for (cols, tokens) in [(1, 1), (700, 3), (256, 2)] {
        let (x, with) = (rng.floats(tokens * cols), rng.floats(tokens * cols));
        let inputs = [
            Input::Norm { x: address(0), weight: address(1), eps: 1e-5 },
            Input::Silu { gate: address(0), up: address(1) },
        ];
        for input in inputs {
            let plan = cuda::plan_materialise(input, address(2), cols, tokens).unwrap();
            let buffers = [bytes_of(&x), bytes_of(&with), vec![0; tokens * cols * 4]];
            let found = floats(&emulator.run(&buffers, &[launch(&plan)], &[0, 1]).unwrap()[2]);
            for (i, found) in found.iter().enumerate() {
                let token = &x[i / cols * cols..][..cols];
                let squares: f32 = token.iter().map(|v| v * v).sum();
                let expected = match input {
                    Input::Silu { .. } => x[i] / (1.0 + (-x[i]).exp()) * with[i],
                    _ => x[i] / (squares / cols as f32 + 1e-5).sqrt() * with[i % cols],
                };
                assert!(
                    (found - expected).abs() <= 1e-5 * expected.abs() + 1e-7,
                    "{found} {expected}"
                );
            }
        }
        // Equal numbers: the first; numbers that are none: never.
        let mut x = x;
        x[cols / 2] = 5.0;
        x[cols - 1] = 5.0;
        if cols > 2 {
            x[1] = f32::NAN;
        }
        let plan = cuda::plan_argmax(address(0), address(1), cols, tokens).unwrap();
        let buffers = [bytes_of(&x), vec![0xff; tokens * 4]];
        let found = &emulator.run(&buffers, &[launch(&plan)], &[0, 1]).unwrap()[1];
        for (found, x) in found.as_chunks::<4>().0.iter().zip(x.chunks(cols)) {
            let mut best = 0;
            for (i, v) in x.iter().enumerate() {
                best = if *v > x[best] { i } else { best };
            }
            assert_eq!(u32::from_le_bytes(*found) as usize, best);
        }
    }
}
