//! Compares the GEMM kernels, planned as for a device and run by the emulator, with the exact decoder of the
//! format and sums in f64.

mod common;

use common::emulator::{Emulator, bytes_of, floats};
use common::kernels::{build_with, module_named};
use common::plans::{address, launch};
use common::random::{encodings, payload};
use stb_format::Encoding;
use stb_format::encoding::{Dense, MatrixView, Nm, Trellis};
use stb_format::half::f16;
use stb_kernels::cuda::{
    DeviceLimits, GemmAddresses, GemmPlan, GemmProblem, MatrixParams, PrefillPrecision,
    ScratchAddresses, gemm_prepared, gemm_scales, plan_prepare,
};
use stb_random::Rng;

struct Case<'a> {
    encoding: &'a Encoding,
    rows: usize,
    cols: usize,
    tokens: usize,
    precision: PrefillPrecision,
    /// Multiprocessors to plan for: plans for few use the large kernels, plans for many split the columns.
    multiprocessors: u32,
    seeds: &'a [u64],
}

/// Columns that share a scale in 8 bits.
const Q8_COLS: usize = 256;

/// The activations of a token rounded to 8 bits, and half a rounding step of each.
fn round(x: &[f32], factors: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (mut rounded, mut steps) = (Vec::new(), Vec::new());
    for (x, factors) in x.chunks(Q8_COLS).zip(factors.chunks(Q8_COLS)) {
        let x: Vec<f32> = x.iter().zip(factors).map(|(x, f)| x * f).collect();
        let most = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let (inverse, scale) = (127.0 / most, most / 127.0);
        let code = |v: &f32| if most > 0.0 { (v * inverse).round_ties_even() } else { 0.0 };
        rounded.extend(x.iter().map(|v| f64::from(code(v)) * f64::from(scale)));
        steps.extend(x.iter().map(|_| f64::from(scale) / 2.0));
    }
    (rounded, steps)
}

/// Column factors, and the matrix without them.
fn without_factors(encoding: &Encoding, rows: usize, cols: usize, bytes: &[u8]) -> [Vec<f32>; 2] {
    let view = encoding.view(rows as u64, cols as u64, bytes).unwrap();
    let MatrixView::Nm(m) = view else { panic!("an N:M encoding") };
    if m.col_factors.is_empty() {
        return [vec![1.0; cols], view.decode()];
    }
    let factors = m.col_factors.iter().map(|f| f16::from_le_bytes(*f).to_f32()).collect();
    let at = m.col_factors.as_ptr().addr() - bytes.as_ptr().addr();
    let mut bytes = bytes.to_vec();
    bytes[at..at + 2 * cols].copy_from_slice(&[0x00, 0x3c].repeat(cols));
    [factors, encoding.view(rows as u64, cols as u64, &bytes).unwrap().decode()]
}

/// Checks that `y` is start + Σ w·x within `relative` times the sum of magnitudes, and the errors `steps` of x.
fn check(
    what: &str,
    y: f32,
    start: f64,
    w: &[f32],
    x: impl Iterator<Item = f64>,
    relative: f64,
    steps: &[f64],
) {
    let (mut sum, mut magnitude, mut rounding) = (start, start.abs(), 0.0);
    for ((w, x), step) in w.iter().zip(x).zip(steps) {
        let term = f64::from(*w) * x;
        sum += term;
        magnitude += term.abs();
        rounding += f64::from(w.abs()) * step;
    }
    let tolerance = magnitude * relative + 1.0001 * rounding + 1e-30;
    assert!((f64::from(y) - sum).abs() <= tolerance, "{what}: {y}, not {sum}");
}

impl Case<'_> {
    fn activations(&self, rng: &mut Rng) -> Vec<f32> {
        let Self { cols, tokens, .. } = *self;
        let mut x = rng.floats(tokens * cols);
        // Outliers like those of activations; a token of zeros.
        for _ in 0..cols / 50 {
            let at = rng.below(x.len());
            x[at] *= 30000.0;
        }
        if tokens > 2 {
            x[cols..2 * cols].fill(0.0);
        }
        if let Some(token) = self.poisoned() {
            let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.below(3)];
            x[token * cols + rng.below(cols)] = bad;
        }
        x
    }

    /// The token with an activation that is not finite, if the case has one.
    fn poisoned(&self) -> Option<usize> {
        (self.precision == PrefillPrecision::Int8 && self.tokens > 4).then(|| self.tokens - 2)
    }

    fn run(&self, rng: &mut Rng, emulator: &Emulator) {
        let Self { encoding, rows, cols, tokens, precision, multiprocessors, seeds } = *self;
        let bytes = payload(rng, encoding, rows, cols);
        let view = encoding.view(rows as u64, cols as u64, &bytes).unwrap();
        let x = self.activations(rng);
        let add = rng.below(2) == 1;
        let before = rng.floats(tokens * rows);

        let shared = if precision == PrefillPrecision::Int8 { 160 << 10 } else { 98 << 10 };
        let limits = DeviceLimits { multiprocessors, shared };
        let matrix = MatrixParams::new(&view, &bytes, address(0)).unwrap();
        let problem = GemmProblem { encoding, matrix, tokens, precision };
        let prepare = plan_prepare(problem, address(1), address(2), address(3)).unwrap();
        let at = GemmAddresses { x: address(2), scale: address(3), y: address(4) };
        let scratch = ScratchAddresses { partial: address(5), arrived: address(6) };
        let plan = GemmPlan::new(limits, problem, at, add, scratch).unwrap();
        let buffers = [
            bytes.clone(),
            bytes_of(&x),
            vec![0xff; gemm_prepared(cols, tokens) * 2],
            vec![0xff; gemm_scales(cols, tokens) * 4],
            bytes_of(&before),
            vec![0xff; plan.scratch.partial * 4],
            vec![0; plan.scratch.arrived * 4],
        ];
        let kernel = plan.launch.kernel;
        let what = format!(
            "{encoding} {rows}x{cols}, {tokens} tokens, {precision:?}, {kernel} {:?}, add {add}",
            plan.launch.blocks
        );
        let launches = [launch(&prepare), launch(&plan.launch)];
        let found = emulator.run(&buffers, &launches, seeds).expect(&what);
        assert!(found[6].iter().all(|b| *b == 0), "{what}: counters are left as they were");
        let before = if add { before } else { vec![0.0; tokens * rows] };
        match precision {
            PrefillPrecision::F16 => {
                self.exact(&what, &view.decode(), &x, &floats(&found[4]), &before)
            }
            PrefillPrecision::Int8 => self.rounded(&what, &bytes, &x, &floats(&found[4]), &before),
        }
    }

    /// Checks products with activations that are not rounded to 8 bits.
    fn exact(&self, what: &str, weights: &[f32], x: &[f32], y: &[f32], before: &[f32]) {
        let places = if matches!(self.encoding, Encoding::Nm(_)) { 11 } else { 14 };
        let relative = 0.5f64.powi(places) + 1e-5;
        let none = vec![0.0; self.cols];
        for (t, x) in x.chunks(self.cols).enumerate() {
            for (r, w) in weights.chunks(self.cols).enumerate() {
                let (at, x) = (t * self.rows + r, x.iter().map(|v| f64::from(*v)));
                let what = format!("{what}: token {t}, row {r}");
                check(&what, y[at], f64::from(before[at]), w, x, relative, &none);
            }
        }
    }

    /// Checks products with activations in 8 bits: against the rounded activations, to the last bits of f32, and against
    /// the original ones.
    fn rounded(&self, what: &str, bytes: &[u8], x: &[f32], y: &[f32], before: &[f32]) {
        let [factors, weights] = without_factors(self.encoding, self.rows, self.cols, bytes);
        let none = vec![0.0; self.cols];
        for (t, x) in x.chunks(self.cols).enumerate() {
            let (rounded, steps) = round(x, &factors);
            for (r, w) in weights.chunks(self.cols).enumerate() {
                let at = t * self.rows + r;
                let what = format!("{what}: token {t}, row {r}");
                if self.poisoned() == Some(t) {
                    assert!(y[at].is_nan(), "{what}: {} of a token with no numbers", y[at]);
                    continue;
                }
                let start = f64::from(before[at]);
                check(&what, y[at], start, w, rounded.iter().copied(), 2e-6, &none);
                let exact = x.iter().zip(&factors).map(|(x, f)| f64::from(*x) * f64::from(*f));
                check(&what, y[at], start, w, exact, 2e-6, &steps);
            }
        }
    }
}

/// The kernels of a module and those that prepare activations; `None` if there is no C++ compiler.
fn build(module: &str) -> Option<Emulator> {
    build_with(&["gemm_prepare.cu"], &module_named(module))
}

/// N:M encodings with all kinds of scales.
fn nm(n: usize, m: usize, precision: PrefillPrecision) {
    let int8 = precision == PrefillPrecision::Int8;
    let module = if int8 { "gemm s8" } else { "gemm" };
    let Some(emulator) = build(&format!("{module} {n}:{m}")) else { return };
    let mut rng = Rng(100 + (n * 10 + m) as u64);
    let mine = |e: &&Encoding| match e {
        // Weights with scale codes of more than 4 bits do not fit 8 bits.
        Encoding::Nm(s) => (s.n(), s.m()) == (n, m) && !(int8 && s.scale_bits() > 4),
        _ => false,
    };
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
            Case { encoding, rows, cols, tokens, precision, multiprocessors, seeds }
                .run(&mut rng, &emulator);
        }
    }
    // The large kernel, two blocks of it in each direction; many columns, with few and many splits.
    let encoding = encodings().into_iter().rfind(|e| mine(&e)).unwrap();
    let encoding = &encoding;
    for (rows, cols, tokens, multiprocessors) in
        [(530, 200, 70, 1), (520, 130, 66, 64), (18, 2600, 33, 3), (18, 1500, 7, 132)]
    {
        Case { encoding, rows, cols, tokens, precision, multiprocessors, seeds: &[3] }
            .run(&mut rng, &emulator);
    }
}

#[test]
fn nm_1_8() {
    nm(1, 8, PrefillPrecision::F16);
}

#[test]
fn nm_1_4() {
    nm(1, 4, PrefillPrecision::F16);
}

#[test]
fn nm_2_8() {
    nm(2, 8, PrefillPrecision::F16);
}

#[test]
fn nm_2_4() {
    nm(2, 4, PrefillPrecision::F16);
}

#[test]
fn nm_1_8_in_8_bits() {
    nm(1, 8, PrefillPrecision::Int8);
}

#[test]
fn nm_1_4_in_8_bits() {
    nm(1, 4, PrefillPrecision::Int8);
}

#[test]
fn nm_2_8_in_8_bits() {
    nm(2, 8, PrefillPrecision::Int8);
}

#[test]
fn nm_2_4_in_8_bits() {
    nm(2, 4, PrefillPrecision::Int8);
}

/// Scale codes of 8 bits make weights that do not fit 8 bits, so the product is in f16.
#[test]
fn large_weights_are_not_multiplied_in_8_bits() {
    let mut rng = Rng(7);
    for (bits, module) in [(0, "gemm s8 1:8"), (4, "gemm s8 1:8"), (8, "gemm 1:8")] {
        let spec = Nm::new(1, 8, bits, if bits == 0 { 0 } else { 64 }, false).unwrap();
        let encoding = &Encoding::Nm(spec);
        let bytes = payload(&mut rng, encoding, 16, 64);
        let view = encoding.view(16, 64, &bytes).unwrap();
        let matrix = MatrixParams::new(&view, &bytes, 0).unwrap();
        let problem =
            GemmProblem { encoding, matrix, tokens: 64, precision: PrefillPrecision::Int8 };
        let limits = DeviceLimits { multiprocessors: 1, shared: 98 << 10 };
        let plan = GemmPlan::new(
            limits,
            problem,
            GemmAddresses::default(),
            false,
            ScratchAddresses::default(),
        )
        .unwrap();
        assert_eq!(plan.launch.module.name(), module);
        let prepare = plan_prepare(problem, 0, 0, 0).unwrap();
        assert_eq!(prepare.kernel, if bits == 8 { "gemm_prepare_f16" } else { "gemm_prepare_q8" });
    }
}

/// Checks the other encodings, which share a kernel.
fn rows(name: &str, mine: impl Fn(&Encoding) -> bool) {
    let Some(emulator) = build(&format!("gemm {name}")) else { return };
    let mut rng = Rng(name.len() as u64);
    for (i, encoding) in encodings().iter().filter(|e| mine(e)).enumerate() {
        for (rows, cols, tokens) in [(1, 1, 1), (70, 300, 66), (17, 131, 9)] {
            let seeds: &[u64] = if rows == 17 && i == 0 { &[0, 1] } else { &[2] };
            let precision = PrefillPrecision::F16;
            let case =
                Case { encoding, rows, cols, tokens, precision, multiprocessors: 132, seeds };
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
fn trellis() {
    let some = [(0, 0), (4, 32), (8, 256)];
    let scales = |s: &Trellis| some.contains(&(s.scale_bits(), s.block()));
    let rate = |s: &Trellis| (s.step_bits(), s.step_weights());
    rows("trellis 3/2", |e| matches!(e, Encoding::Trellis(s) if rate(s) == (3, 2) && scales(s)));
    rows("trellis 2/1", |e| matches!(e, Encoding::Trellis(s) if rate(s) == (2, 1) && scales(s)));
}

#[test]
fn dense_matrices() {
    rows("f32", |e| *e == Encoding::Dense(Dense::F32));
    rows("f16", |e| *e == Encoding::Dense(Dense::F16));
    rows("bf16", |e| *e == Encoding::Dense(Dense::Bf16));
}
