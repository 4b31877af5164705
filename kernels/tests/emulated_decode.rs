//! Compares the GEMV kernels, planned as for a device and run by the emulator, with the exact decoder of the
//! format and sums in f64.

mod common;

use common::emulator::{Emulator, bytes_of, floats};
use common::exact::{ExactProduct, exact_product};
use common::kernels::{build, module_named};
use common::plans::{address, launch};
use common::random::{encodings, payload};
use stb_format::Encoding;
use stb_kernels::cuda::{
    self, ActivationInput, ActivationPrecision, DeviceLimits, GemvPlan, GemvProblem, MatrixParams,
    ScratchAddresses,
};
use stb_random::Rng;

/// The scratch memory of all plans.
const SCRATCH: ScratchAddresses = ScratchAddresses { partial: address(2), arrived: address(3) };

/// A small device, so that small matrices are split in all ways; and a large one.
const LIMITS: [DeviceLimits; 2] = [
    DeviceLimits { multiprocessors: 1, shared: 98 << 10 },
    DeviceLimits { multiprocessors: 132, shared: 226 << 10 },
];

/// Ragged rows, columns, groups, units, tiles and chunks; more columns than a slab.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (16, 64), (33, 172), (80, 352), (17, 31), (70, 700), (5, 1100), (21, 2300)];

struct Case<'a> {
    encoding: &'a Encoding,
    rows: &'a [usize],
    cols: usize,
    tokens: usize,
    precision: ActivationPrecision,
    limits: DeviceLimits,
}

impl Case<'_> {
    /// Checks every result of one launch for all matrices, with a random kind of input.
    fn run(&self, rng: &mut Rng, emulator: &Emulator, seeds: &[u64]) {
        let Self { encoding, rows, cols, tokens, precision, limits } = *self;
        let what =
            format!("{encoding} {rows:?}x{cols}, {tokens} tokens, {precision:?}, {limits:?}");
        let payloads: Vec<_> = rows.iter().map(|r| payload(rng, encoding, *r, cols)).collect();
        let mut x = rng.floats(tokens * cols);
        // Outliers like those of activations.
        for _ in 0..cols / 50 {
            let at = rng.below(x.len());
            x[at] *= 300.0;
        }
        let (eps, kind, add) = (1e-5, rng.below(3), rng.below(2) == 1);
        let with = rng.floats(if kind == 2 { tokens * cols } else { cols });
        let inputs: Vec<f64> = (0..tokens * cols)
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
            0 => ActivationInput::Plain(address(0)),
            1 => ActivationInput::RmsNorm { x: address(0), weight: address(1), eps },
            _ => ActivationInput::SwiGlu { gate: address(0), up: address(1) },
        };
        let matrix = |(i, (bytes, rows)): (usize, (&Vec<u8>, &usize))| {
            let view = encoding.view(*rows as u64, cols as u64, bytes).unwrap();
            MatrixParams::new(&view, bytes, address(4 + 2 * i)).unwrap()
        };
        let matrices: Vec<_> = payloads.iter().zip(rows).enumerate().map(matrix).collect();
        let out: Vec<u64> = (0..rows.len()).map(|i| address(5 + 2 * i)).collect();
        let (matrices, out, input) = (&matrices, &out, source);
        let problem = GemvProblem { encoding, matrices, out, input, precision, add, tokens };
        let plan = GemvPlan::new(limits, &problem, SCRATCH).unwrap();
        let mut buffers = vec![
            bytes_of(&x),
            bytes_of(&with),
            vec![0xff; plan.scratch.partial * 4],
            vec![0; plan.scratch.arrived * 4],
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
                let (w, x) = (&weights[r * cols..][..cols], &inputs[t * cols..][..cols]);
                let start = if add { f64::from(before[t * rows + r]) } else { 0.0 };
                let ExactProduct { sum, magnitude, rounding } = exact_product(start, w, x);
                let rounding = if precision == ActivationPrecision::Q8 { rounding } else { 0.0 };
                let tolerance = 1e-5 * magnitude + 1.0001 * rounding + 1e-30;
                let y = y[t * rows + r];
                let error = (f64::from(y) - sum).abs();
                assert!(error <= tolerance, "{what}: token {t}, row {r}: {y} instead of {sum}");
            }
        }
    }
}

/// Checks all encodings of the module of this name, in all kinds of calls.
fn products(module: &str) {
    let module = module_named(module);
    let Some(emulator) = build(&module) else { return };
    let mut rng = Rng(7);
    let mine = |e: &&Encoding| GemvPlan::module(e).is_ok_and(|m| m == module);
    for encoding in encodings().iter().filter(mine) {
        for (i, (rows, cols)) in SHAPES.into_iter().enumerate() {
            for precision in [ActivationPrecision::F32, ActivationPrecision::Q8] {
                let tokens = [1, 2, 3, 4, 5][rng.below(5)];
                let rows = [rows, 1 + rng.below(40), 16];
                let rows = &rows[..1 + rng.below(3)];
                let limits = LIMITS[rng.below(2)];
                let case = Case { encoding, rows, cols, tokens, precision, limits };
                case.run(&mut rng, &emulator, if i % 3 == 0 { &[0, 1] } else { &[2] });
            }
            decode_rows(&mut rng, &emulator, encoding, rows, cols);
        }
    }
}

/// Checks that the conversion to f32 gives exactly the weights that the format defines.
fn decode_rows(rng: &mut Rng, emulator: &Emulator, encoding: &Encoding, rows: usize, cols: usize) {
    let bytes = payload(rng, encoding, rows, cols);
    let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
    let params = MatrixParams::new(&view, &bytes, address(0)).unwrap();
    // An id outside the matrix leaves its row unchanged.
    let ids: Vec<u32> = (0..4).map(|_| rng.below(rows) as u32).chain([rows as u32]).collect();
    let plan = cuda::plan_dequantize(encoding, params, address(1), ids.len(), address(2)).unwrap();
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
    nm_1_8 "nm 1:8"
    nm_1_4 "nm 1:4"
    nm_2_8 "nm 2:8"
    nm_2_4 "nm 2:4"
    dense_f32 "f32"
    dense_f16 "f16"
    dense_bf16 "bf16"
    integers_of_1_bit "int1"
    integers_of_2_bits "int2"
    integers_of_3_bits "int3"
    integers_of_4_bits "int4"
    integers_of_8_bits "int8"
    stbllm "stbllm"
    trellis_of_half_a_bit "trellis 1/2"
    trellis_of_2_bits "trellis 2/1"
    trellis_of_2_and_a_half_bits "trellis 5/2"
    trellis_of_3_bits "trellis 3/1"
}

/// Payloads that no encoder writes, of random bits with the right length, must not cause accesses out of bounds.
#[test]
fn hostile_payloads_stay_inside_their_buffers() {
    let mut rng = Rng(11);
    for name in ["stbllm", "nm 2:8", "int3", "trellis 5/2"] {
        let module = module_named(name);
        let Some(emulator) = build(&module) else { return };
        let all = encodings();
        let encoding = all.iter().find(|e| GemvPlan::module(e).is_ok_and(|m| m == module)).unwrap();
        for (rows, cols) in [(33, 172), (5, 1100)] {
            let length = payload(&mut rng, encoding, rows, cols).len();
            let bytes: Vec<u8> = (0..length).map(|_| rng.bits() as u8).collect();
            let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
            let matrix = MatrixParams::new(&view, &bytes, address(4)).unwrap();
            for precision in [ActivationPrecision::F32, ActivationPrecision::Q8] {
                let (matrices, out) = (&[matrix], &[address(1)]);
                let input = ActivationInput::Plain(address(0));
                let (add, tokens) = (false, 1);
                let problem =
                    GemvProblem { encoding, matrices, out, input, precision, add, tokens };
                let plan = GemvPlan::new(LIMITS[0], &problem, SCRATCH).unwrap();
                let x = bytes_of(&rng.floats(cols));
                let [partial, arrived] =
                    [plan.scratch.partial, plan.scratch.arrived].map(|n| vec![0; 4 * n]);
                let buffers = [x, vec![0; rows * 4], partial, arrived, bytes.clone()];
                emulator.run(&buffers, &[launch(&plan.launch)], &[0]).unwrap();
            }
        }
    }
}

#[test]
fn operations() {
    let Some(emulator) = build(&module_named("activations")) else { return };
    let mut rng = Rng(9);
    for (cols, tokens) in [(1, 1), (700, 3), (256, 2)] {
        let (x, with) = (rng.floats(tokens * cols), rng.floats(tokens * cols));
        let inputs = [
            ActivationInput::RmsNorm { x: address(0), weight: address(1), eps: 1e-5 },
            ActivationInput::SwiGlu { gate: address(0), up: address(1) },
        ];
        for input in inputs {
            let plan = cuda::plan_activations(input, address(2), cols, tokens).unwrap();
            let buffers = [bytes_of(&x), bytes_of(&with), vec![0; tokens * cols * 4]];
            let found = floats(&emulator.run(&buffers, &[launch(&plan)], &[0, 1]).unwrap()[2]);
            for (i, found) in found.iter().enumerate() {
                let token = &x[i / cols * cols..][..cols];
                let squares: f32 = token.iter().map(|v| v * v).sum();
                let expected = match input {
                    ActivationInput::SwiGlu { .. } => x[i] / (1.0 + (-x[i]).exp()) * with[i],
                    _ => x[i] / (squares / cols as f32 + 1e-5).sqrt() * with[i % cols],
                };
                assert!(
                    (found - expected).abs() <= 1e-5 * expected.abs() + 1e-7,
                    "{found} {expected}"
                );
            }
        }
    }
}
