//! Every kernel on random and adversarial shapes, against the exact decoder of the format and sums in f64.

use anyhow::{Context, bail};
use rayon::prelude::*;
use serde_json::json;
use stb_format::Encoding;
use stb_format::encoding::{Dense, IntGroup, MatrixView, Nm, Stbllm};
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
    Ok(all)
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

/// What activations are rounded to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rounding {
    /// What the relative error says.
    None,
    /// 8 bits by 32 columns.
    Few,
    /// 8 bits by 256 columns, times column factors.
    Many,
}

/// What a product has to be: for each token and row the sum, Σ|w·x|, and for 8 bits by few and many columns half a step of
/// activations times Σ|w|.
struct Case {
    what: String,
    exact: Vec<[f64; 4]>,
}

/// Half a step of `x` times `factors`, rounded to 8 bits by `columns`, times Σ|w|.
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

/// Of joint codes: column factors, and the weights without them.
fn without_factors(
    view: &MatrixView<'_>,
    encoding: &Encoding,
    bytes: &[u8],
) -> anyhow::Result<Option<(Vec<f32>, Vec<f32>)>> {
    let MatrixView::Nm(m) = view else { return Ok(None) };
    let (rows, cols) = (view.rows(), view.cols());
    if m.col_factors.is_empty() {
        return Ok(Some((vec![1.0; cols], view.decode())));
    }
    let factors = m.col_factors.iter().map(|f| f16::from_le_bytes(*f).to_f32()).collect();
    let at = m.col_factors.as_ptr().addr() - bytes.as_ptr().addr();
    let mut plain = bytes.to_vec();
    plain[at..at + 2 * cols].copy_from_slice(&f16::ONE.to_le_bytes().repeat(cols));
    Ok(Some((factors, encoding.view(rows as u64, cols as u64, &plain)?.decode())))
}

impl Case {
    /// `plain` are column factors and weights without them, if there is a kernel that applies them to activations.
    fn new(
        what: String,
        weights: &[f32],
        plain: Option<&(Vec<f32>, Vec<f32>)>,
        cols: usize,
        x: &[f32],
    ) -> Self {
        let rows = weights.len() / cols;
        let exact = (0..x.len() / cols * rows)
            .into_par_iter()
            .map(|i| {
                let (r, x) = (i % rows, &x[i / rows * cols..][..cols]);
                let w = &weights[r * cols..][..cols];
                let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let many = plain.map_or(0.0, |(factors, weights)| {
                    step(&weights[r * cols..][..cols], x, Some(factors), 256)
                });
                let magnitude = terms().map(f64::abs).sum();
                [terms().sum(), magnitude, step(w, x, None, 32), many]
            })
            .collect();
        Self { what, exact }
    }

    /// The largest error of `y` over what is allowed: `relative` · Σ|w·x|, and the steps of rounded activations.
    fn worst(&self, y: &[f32], relative: f64, rounding: Rounding) -> f64 {
        let mut worst = 0.0f64;
        for (y, [sum, magnitude, few, many]) in y.iter().zip(&self.exact) {
            let step = match rounding {
                Rounding::None => 0.0,
                Rounding::Few => 1.0001 * few,
                Rounding::Many => 1.0001 * many,
            };
            let error = (f64::from(*y) - sum).abs() / (relative * magnitude + step + 1e-30);
            // A NaN is the worst.
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
        worst
    }
}

fn judge(
    report: &mut Report,
    all: &mut Vec<serde_json::Value>,
    case: &Case,
    kernel: &str,
    worst: f64,
) {
    let right = worst <= 1.0;
    if !right {
        report.wrong(kernel, &format!("{}: {worst:.3} of what is allowed", case.what));
    }
    all.push(
        json!({"kernel": kernel, "case": case.what, "error_of_allowed": worst, "right": right}),
    );
}

/// Checks all kernels.
pub(crate) fn run(report: &mut Report, device: &Device, small: bool) -> anyhow::Result<()> {
    let mut rng = Rng(11);
    let mut all = Vec::new();
    let mut gemv = Gemv::new(device)?;
    let mut gemm = Gemm::new(device)?;
    let mut gemm_int8 = Gemm::new(device)?.with_precision(PrefillPrecision::Int8);
    for encoding in encodings()? {
        let shapes = if small { &SHAPES[..5] } else { &SHAPES };
        for &(rows, cols) in shapes {
            let bytes = random(&[rows as u64, cols as u64], &encoding);
            let view = encoding.view(rows as u64, cols as u64, &bytes)?;
            let most = if rows * cols > 1_000_000 { 33 } else { 130 };
            let counts = [1, 2, 3, 7, 16, 1 + rng.below(most), most];
            let weights = view.decode();
            let plain = without_factors(&view, &encoding, &bytes)?;
            let matrix = Matrix::upload(device, &encoding, rows, cols, &bytes)?;
            for tokens in counts {
                let mut x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
                for _ in 0..cols / 50 {
                    let at = rng.below(x.len());
                    x[at] *= 300.0;
                }
                let what = format!("{encoding} {rows}x{cols}, {tokens} tokens");
                let case = Case::new(what, &weights, plain.as_ref(), cols, &x);
                let input = device.upload("activations", &x)?;
                // What is not written stays NaN.
                let mut out = device.upload("results", &vec![f32::NAN; tokens * rows])?;
                let mut y = vec![0.0; tokens * rows];
                if tokens <= 16 {
                    for numbers in [ActivationPrecision::F32, ActivationPrecision::Q8] {
                        out.write(&vec![f32::NAN; tokens * rows])?;
                        let input = ActivationInput::Plain(&input);
                        gemv.queue(&[&matrix], input, numbers, &mut [&mut out], false, tokens)
                            .and_then(|()| out.read(&mut y))
                            .with_context(|| format!("gemv {numbers:?}, {}", case.what))?;
                        let rounding = match numbers {
                            ActivationPrecision::Q8 => Rounding::Few,
                            ActivationPrecision::F32 => Rounding::None,
                        };
                        let worst = case.worst(&y, 1e-5, rounding);
                        judge(report, &mut all, &case, &format!("gemv {numbers:?}"), worst);
                    }
                }
                if GemmPlan::supports(&encoding) {
                    out.write(&vec![f32::NAN; tokens * rows])?;
                    let input = ActivationInput::Plain(&input);
                    gemm.queue(&[&matrix], input, &mut [&mut out], false, tokens)
                        .and_then(|()| out.read(&mut y))
                        .with_context(|| format!("gemm, {}", case.what))?;
                    // Activations in f16, or both in two bf16.
                    let places = if matches!(encoding, Encoding::Nm(_)) { 11 } else { 14 };
                    let worst = case.worst(&y, 0.5f64.powi(places) + 1e-5, Rounding::None);
                    judge(report, &mut all, &case, "gemm", worst);
                }
                if matches!(&encoding, Encoding::Nm(spec) if spec.scale_bits() <= 4) {
                    out.write(&vec![f32::NAN; tokens * rows])?;
                    let input = ActivationInput::Plain(&input);
                    gemm_int8
                        .queue(&[&matrix], input, &mut [&mut out], false, tokens)
                        .and_then(|()| out.read(&mut y))
                        .with_context(|| format!("gemm int8, {}", case.what))?;
                    let worst = case.worst(&y, 1e-5, Rounding::Many);
                    judge(report, &mut all, &case, "gemm int8", worst);
                }
            }
        }
        // What was found so far is kept, whatever comes.
        report.put("correctness", all.clone().into())?;
    }
    let right = all.iter().filter(|c| c["right"] == true).count();
    report.line(&format!("  {right} of {} products are within their tolerance", all.len()));
    if all.is_empty() {
        bail!("nothing was checked");
    }
    Ok(())
}
