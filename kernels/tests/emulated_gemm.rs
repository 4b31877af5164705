//! The CUDA kernels for many tokens, planned as for a device and run by the emulator, against the exact
//! decoder of the format and sums in f64.

mod common;

use common::emulator::{Emulator, bytes_of, floats};
use common::plans::{address, launch};
use common::random::{Rng, encodings, payload};
use stb_format::Encoding;
use stb_format::encoding::Dense;
use stb_kernels::cuda::{GemmPlan, Limits, MatrixParams, Module, gemm_prepared, plan_prepare};

struct Case<'a> {
    encoding: &'a Encoding,
    rows: usize,
    cols: usize,
    tokens: usize,
    /// Multiprocessors to plan for: few take the large kernels, many split the columns.
    multiprocessors: u32,
    seeds: &'a [u64],
}

impl Case<'_> {
    fn run(&self, rng: &mut Rng, emulator: &Emulator) {
        let Self { encoding, rows, cols, tokens, multiprocessors, seeds } = *self;
        let bytes = payload(rng, encoding, rows, cols);
        let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
        let weights = view.decode();
        let mut x = rng.floats(tokens * cols);
        // Outliers, as activations have them; a token of zeros.
        for _ in 0..cols / 50 {
            let at = rng.below(x.len());
            x[at] *= 30000.0;
        }
        if tokens > 2 {
            x[cols..2 * cols].fill(0.0);
        }
        let add = rng.below(2) == 1;
        let before = rng.floats(tokens * rows);

        let limits = Limits { multiprocessors, shared: 98 << 10 };
        let params = MatrixParams::new(&view, &bytes, address(0)).unwrap();
        let prepare = plan_prepare(encoding, params, address(1), address(2), address(3), tokens);
        let prepare = prepare.unwrap();
        let addresses = [address(2), address(3), address(4)];
        let work = [address(5), address(6)];
        let plan = GemmPlan::new(limits, encoding, params, addresses, add, tokens, work).unwrap();
        let buffers = [
            bytes.clone(),
            bytes_of(&x),
            vec![0xff; gemm_prepared(cols, tokens) * 2],
            vec![0xff; tokens * 4],
            bytes_of(&before),
            vec![0xff; plan.partial * 4],
            vec![0; plan.arrived * 4],
        ];
        let kernel = plan.launch.kernel;
        let what = format!(
            "{encoding} {rows}x{cols}, {tokens} tokens, {kernel} {:?}, add {add}",
            plan.launch.blocks
        );
        let launches = [launch(&prepare), launch(&plan.launch)];
        let found = emulator.run(&buffers, &launches, seeds).expect(&what);
        assert!(found[6].iter().all(|b| *b == 0), "{what}: counters are left as they were");
        let y = floats(&found[4]);
        for t in 0..tokens {
            for r in 0..rows {
                let start = if add { f64::from(before[t * rows + r]) } else { 0.0 };
                let (mut sum, mut magnitude) = (start, start.abs());
                for c in 0..cols {
                    let term = f64::from(weights[r * cols + c]) * f64::from(x[t * cols + c]);
                    sum += term;
                    magnitude += term.abs();
                }
                let y = f64::from(y[t * rows + r]);
                let places = if matches!(encoding, Encoding::Nm(_)) { 11 } else { 14 };
                let tolerance = magnitude * (0.5f64.powi(places) + 1e-5) + 1e-30;
                assert!((y - sum).abs() <= tolerance, "{what}: token {t}, row {r}: {y}, not {sum}");
            }
        }
    }
}

/// The kernels of a module; `None` where there is no C++ compiler.
fn build(module: &str) -> Option<Emulator> {
    let module = Module::ALL.iter().find(|m| m.name == module).unwrap();
    let kernels: &[&str] = match module.file {
        "gemm_nm.cu" => &["gemm_prepare", "gemm_512x64", "gemm_256x64", "gemm_256x16"],
        _ => &["gemm_split", "gemm_rows"],
    };
    Emulator::build(&["gemm_prepare.cu", module.file], kernels, module.defines).unwrap()
}

/// Joint codes N:M with all kinds of scales.
fn joint_codes(n: usize, m: usize) {
    let Some(emulator) = build(&format!("gemm {n}:{m}")) else { return };
    let mut rng = Rng(100 + (n * 10 + m) as u64);
    let mine = |e: &&Encoding| matches!(e, Encoding::Nm(s) if (s.n(), s.m()) == (n, m));
    for encoding in encodings().iter().filter(mine) {
        // Ragged rows, columns, groups, quads, chunks, steps and tokens.
        for (rows, cols, tokens) in [
            (1, 1, 1),
            (16, 64, 17),
            (33, 172, 5),
            (70, 352, 40),
            (17, 31, 9),
            (300, 700, 16),
            (5, 1100, 3),
        ] {
            let multiprocessors = [1, 132][rng.below(2)];
            let seeds: &[u64] = if rows < 20 { &[0, 1] } else { &[2] };
            Case { encoding, rows, cols, tokens, multiprocessors, seeds }.run(&mut rng, &emulator);
        }
    }
    // The large kernel, two blocks of it in each direction.
    let encoding = encodings().into_iter().rfind(|e| mine(&e)).unwrap();
    let encoding = &encoding;
    for (rows, cols, tokens, multiprocessors) in [(530, 200, 70, 1), (520, 130, 66, 64)] {
        Case { encoding, rows, cols, tokens, multiprocessors, seeds: &[3] }
            .run(&mut rng, &emulator);
    }
}

#[test]
fn joint_codes_1_8() {
    joint_codes(1, 8);
}

#[test]
fn joint_codes_1_4() {
    joint_codes(1, 4);
}

#[test]
fn joint_codes_2_8() {
    joint_codes(2, 8);
}

#[test]
fn joint_codes_2_4() {
    joint_codes(2, 4);
}

/// All other encodings, which share a kernel.
fn rows(name: &str, mine: impl Fn(&Encoding) -> bool) {
    let Some(emulator) = build(&format!("gemm {name}")) else { return };
    let mut rng = Rng(name.len() as u64);
    for (i, encoding) in encodings().iter().filter(|e| mine(e)).enumerate() {
        for (rows, cols, tokens) in [(1, 1, 1), (70, 300, 66), (17, 131, 9)] {
            let seeds: &[u64] = if rows == 17 && i == 0 { &[0, 1] } else { &[2] };
            let case = Case { encoding, rows, cols, tokens, multiprocessors: 132, seeds };
            case.run(&mut rng, &emulator);
        }
    }
}

fn integers(bits: u8) {
    rows(&format!("int{bits}"), |e| matches!(e, Encoding::IntGroup(s) if s.bits() == bits));
}

#[test]
fn integers_of_1_bit() {
    integers(1);
}

#[test]
fn integers_of_2_bits() {
    integers(2);
}

#[test]
fn integers_of_3_bits() {
    integers(3);
}

#[test]
fn integers_of_4_bits() {
    integers(4);
}

#[test]
fn integers_of_8_bits() {
    integers(8);
}

#[test]
fn stbllm() {
    let some = [(1, 32), (4, 128), (7, 96)];
    rows("stbllm", |e| matches!(e, Encoding::Stbllm(s) if some.contains(&(s.n(), s.block()))));
}

#[test]
fn dense_matrices() {
    rows("f32", |e| *e == Encoding::Dense(Dense::F32));
    rows("f16", |e| *e == Encoding::Dense(Dense::F16));
    rows("bf16", |e| *e == Encoding::Dense(Dense::Bf16));
}
