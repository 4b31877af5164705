//! Compares GEMV and GEMM of all encodings on random and adversarial shapes with the exact decoder of the
//! format and sums in f64.

use anyhow::{Context, bail};
use rayon::prelude::*;
use serde_json::json;
use stb_format::Encoding;
use stb_format::encoding::{CoarseRows, Dense, IntGroup, MatrixView, MixedRows, Nm, Stbllm};
use stb_format::half::f16;
use stb_kernels::cuda::{
    ActivationInput, ActivationPrecision, Device, Gemm, GemmPlan, Gemv, Matrix, PrefillPrecision,
};
use stb_random::Rng;
use stb_tests::random_model::random;

use crate::report::Report;

/// Encodings with all kinds of parameters.
fn encodings() -> anyhow::Result<Vec<Encoding>> {
    let mut all = [Dense::F32, Dense::F16, Dense::Bf16].map(Encoding::Dense).to_vec();
    for bits in [1, 2, 3, 4, 8] {
        for group in [32, 128] {
            all.push(Encoding::IntGroup(IntGroup::new(bits, group).context("a group")?));
        }
    }
    for (n, block) in [(1, 32), (4, 128), (5, 96), (8, 64)] {
        all.push(Encoding::Stbllm(Stbllm::new(n, block).context("a block")?));
    }
    for (n, m) in [(1, 4), (1, 8), (2, 4), (2, 8)] {
        for (bits, block, cols) in [(0, 0, false), (4, 32, true), (4, 128, false), (8, 160, true)] {
            all.push(Encoding::Nm(Nm::new(n, m, bits, block, cols).context("codes")?));
        }
    }
    let fine = IntGroup::new(4, 64).context("a group")?;
    let nm = CoarseRows::Nm(Nm::new(2, 8, 4, 128, false).context("codes")?);
    let int = CoarseRows::IntGroup(IntGroup::new(2, 32).context("a group")?);
    for (count, coarse) in [(1, nm), (30, nm), (30, int)] {
        all.push(Encoding::MixedRows(MixedRows::new(count, fine, coarse).context("rows")?));
    }
    Ok(all)
}

/// The fewest rows that a matrix has.
fn least_rows(encoding: &Encoding) -> usize {
    match encoding {
        Encoding::MixedRows(spec) => spec.count() as usize,
        _ => 1,
    }
}

/// Whether a GEMM rounds activations to f16, at least for most rows.
fn rounds_to_f16(encoding: &Encoding) -> bool {
    match encoding {
        Encoding::MixedRows(spec) => rounds_to_f16(&spec.coarse().encoding()),
        encoding => matches!(encoding, Encoding::Nm(_)),
    }
}

/// Ragged in all dimensions; small and large.
const SHAPES: [(usize, usize); 9] = [
    (1, 1),
    (16, 64),
    (33, 172),
    (17, 31),
    (70, 700),
    (5, 1100),
    (530, 1337),
    (1024, 2048),
    (257, 11_008),
];

/// How a kernel rounds activations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rounding {
    /// Within the relative error of the kernel.
    Relative,
    /// To 8 bits with a scale per 32 columns.
    Q8Gemv,
    /// To 8 bits with a scale per 256 columns, times column factors.
    Q8Gemm,
}

/// The exact result for a token and a row, and the terms of its tolerance.
struct Expected {
    sum: f64,
    /// Σ|w·x|.
    magnitude: f64,
    /// Half a rounding step of activations times Σ|w|, for each kind of rounding.
    gemv_step: f64,
    gemm_step: f64,
}

/// A product and its exact results, [tokens, rows].
struct Case {
    what: String,
    expected: Vec<Expected>,
}

/// A matrix of an N:M encoding, split into column factors, [cols], and the weights without them, [rows, cols].
struct Factored {
    factors: Vec<f32>,
    weights: Vec<f32>,
}

/// Half a rounding step times Σ|w|, for `x` times `factors` rounded to 8 bits with a scale per `columns`.
fn step(w: &[f32], x: &[f32], factors: Option<&[f32]>, columns: usize) -> f64 {
    let mut step = 0.0;
    for (i, (w, x)) in w.chunks(columns).zip(x.chunks(columns)).enumerate() {
        let factors = factors.map(|f| &f[i * columns..]);
        let x = x.iter().enumerate().map(|(c, x)| (x * factors.map_or(1.0, |f| f[c])).abs());
        let largest = x.fold(0.0f32, f32::max);
        step += f64::from(largest) / 254.0 * w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
    }
    step
}

/// The column factors of a matrix; `None` for other encodings than N:M.
fn factored(
    view: &MatrixView<'_>,
    encoding: &Encoding,
    bytes: &[u8],
) -> anyhow::Result<Option<Factored>> {
    let MatrixView::Nm(m) = view else { return Ok(None) };
    let (rows, cols) = (view.rows(), view.cols());
    if m.col_factors.is_empty() {
        return Ok(Some(Factored { factors: vec![1.0; cols], weights: view.decode() }));
    }
    let factors = m.col_factors.iter().map(|f| f16::from_le_bytes(*f).to_f32()).collect();
    let at = m.col_factors.as_ptr().addr() - bytes.as_ptr().addr();
    let mut plain = bytes.to_vec();
    plain[at..at + 2 * cols].copy_from_slice(&f16::ONE.to_le_bytes().repeat(cols));
    let weights = encoding.view(rows as u64, cols as u64, &plain)?.decode();
    Ok(Some(Factored { factors, weights }))
}

impl Case {
    fn new(what: String, matrix: &CheckedMatrix, x: &[f32]) -> Self {
        let (rows, cols) = (matrix.packed.rows(), matrix.packed.cols());
        let expected = (0..x.len() / cols * rows)
            .into_par_iter()
            .map(|i| {
                let (r, x) = (i % rows, &x[i / rows * cols..][..cols]);
                let w = &matrix.weights[r * cols..][..cols];
                let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let gemm_step = matrix.factored.as_ref().map_or(0.0, |factored| {
                    let w = &factored.weights[r * cols..][..cols];
                    step(w, x, Some(&factored.factors), 256)
                });
                let magnitude = terms().map(f64::abs).sum();
                let gemv_step = step(w, x, None, 32);
                Expected { sum: terms().sum(), magnitude, gemv_step, gemm_step }
            })
            .collect();
        Self { what, expected }
    }

    /// The largest error of `y` divided by its tolerance: `relative` · Σ|w·x|, and the steps of rounded activations.
    fn worst(&self, y: &[f32], relative: f64, rounding: Rounding) -> f64 {
        let mut worst = 0.0f64;
        for (y, expected) in y.iter().zip(&self.expected) {
            let step = match rounding {
                Rounding::Relative => 0.0,
                Rounding::Q8Gemv => 1.0001 * expected.gemv_step,
                Rounding::Q8Gemm => 1.0001 * expected.gemm_step,
            };
            let tolerance = relative * expected.magnitude + step + 1e-30;
            let error = (f64::from(*y) - expected.sum).abs() / tolerance;
            // NaN counts as an infinite error.
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
        worst
    }
}

/// A matrix on the device and on the host.
struct CheckedMatrix {
    packed: Matrix,
    weights: Vec<f32>,
    factored: Option<Factored>,
}

impl CheckedMatrix {
    /// A random matrix.
    fn random(
        device: &Device,
        encoding: &Encoding,
        rows: usize,
        cols: usize,
    ) -> anyhow::Result<Self> {
        let bytes = random(&[rows as u64, cols as u64], encoding);
        let view = encoding.view(rows as u64, cols as u64, &bytes)?;
        Ok(Self {
            packed: Matrix::upload(device, encoding, rows, cols, &bytes)?,
            weights: view.decode(),
            factored: factored(&view, encoding, &bytes)?,
        })
    }
}

/// The kernels that are checked, and the results so far.
struct ProductCheck<'a> {
    report: &'a mut Report,
    device: &'a Device,
    gemv: Gemv,
    gemm: Gemm,
    gemm_int8: Gemm,
    results: Vec<serde_json::Value>,
}

impl ProductCheck<'_> {
    fn judge(&mut self, case: &Case, kernel: &str, worst: f64) {
        let right = worst <= 1.0;
        if !right {
            let text = format!("{}: the error is {worst:.3} times the tolerance", case.what);
            self.report.wrong(kernel, &text);
        }
        self.results.push(
            json!({"kernel": kernel, "case": case.what, "error_of_allowed": worst, "right": right}),
        );
    }

    /// Checks all kernels that can multiply `matrix` with `x`, [tokens, cols].
    fn check(&mut self, matrix: &CheckedMatrix, x: &[f32]) -> anyhow::Result<()> {
        let encoding = matrix.packed.encoding();
        let (rows, cols) = (matrix.packed.rows(), matrix.packed.cols());
        let tokens = x.len() / cols;
        let what = format!("{encoding} {rows}x{cols}, {tokens} tokens");
        let case = Case::new(what, matrix, x);
        let input = self.device.upload("activations", x)?;
        let input = ActivationInput::Plain(&input);
        // Elements that are not written stay NaN.
        let nan = vec![f32::NAN; tokens * rows];
        let mut out = self.device.upload("results", &nan)?;
        let mut y = vec![0.0; tokens * rows];
        let matrices = &[&matrix.packed];
        if tokens <= 16 {
            for (precision, name, rounding) in [
                (ActivationPrecision::F32, "gemv F32", Rounding::Relative),
                (ActivationPrecision::Q8, "gemv Q8", Rounding::Q8Gemv),
            ] {
                out.write(&nan)?;
                self.gemv
                    .queue(matrices, input, precision, &mut [&mut out], false, tokens)
                    .and_then(|()| out.read(&mut y))
                    .with_context(|| format!("{name}, {}", case.what))?;
                self.judge(&case, name, case.worst(&y, 1e-5, rounding));
            }
        }
        if GemmPlan::supports(encoding) {
            out.write(&nan)?;
            self.gemm
                .queue(matrices, input, &mut [&mut out], false, tokens)
                .and_then(|()| out.read(&mut y))
                .with_context(|| format!("gemm, {}", case.what))?;
            // Activations in f16, or activations and weights in two bf16.
            let places = if rounds_to_f16(encoding) { 11 } else { 14 };
            let relative = 0.5f64.powi(places) + 1e-5;
            self.judge(&case, "gemm", case.worst(&y, relative, Rounding::Relative));
        }
        if matches!(encoding, Encoding::Nm(spec) if spec.scale_bits() <= 4) {
            out.write(&nan)?;
            self.gemm_int8
                .queue(matrices, input, &mut [&mut out], false, tokens)
                .and_then(|()| out.read(&mut y))
                .with_context(|| format!("gemm int8, {}", case.what))?;
            self.judge(&case, "gemm int8", case.worst(&y, 1e-5, Rounding::Q8Gemm));
        }
        Ok(())
    }
}

/// Checks all encodings, shapes and kernels.
pub(crate) fn run(report: &mut Report, device: &Device, small: bool) -> anyhow::Result<()> {
    let mut rng = Rng(11);
    let mut check = ProductCheck {
        report,
        device,
        gemv: Gemv::new(device)?,
        gemm: Gemm::new(device)?,
        gemm_int8: Gemm::new(device)?.with_precision(PrefillPrecision::Int8),
        results: Vec::new(),
    };
    for encoding in encodings()? {
        let shapes = if small { &SHAPES[..5] } else { &SHAPES };
        for &(rows, cols) in shapes.iter().filter(|(rows, _)| *rows >= least_rows(&encoding)) {
            let matrix = CheckedMatrix::random(device, &encoding, rows, cols)?;
            let most = if rows * cols > 1_000_000 { 33 } else { 130 };
            for tokens in [1, 2, 3, 7, 16, 1 + rng.below(most), most] {
                let mut x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
                for _ in 0..cols / 50 {
                    let at = rng.below(x.len());
                    x[at] *= 300.0;
                }
                check.check(&matrix, &x)?;
            }
        }
        // The results so far are kept if a later kernel crashes.
        check.report.put("correctness", check.results.clone().into())?;
    }
    let ProductCheck { report, results, .. } = check;
    let right = results.iter().filter(|c| c["right"] == true).count();
    report.line(&format!("  {right} of {} products are within their tolerance", results.len()));
    if results.is_empty() {
        bail!("nothing was checked");
    }
    Ok(())
}
