//! Every kernel on random and adversarial shapes, against the exact decoder of the format and sums in f64.

use anyhow::{Context, bail};
use serde_json::json;
use stb_format::Encoding;
use stb_format::encoding::{Dense, IntGroup, Nm, Stbllm};
use stb_kernels::cuda::{Device, Gemm, GemmPlan, Input, MatVec, Matrix, Numbers};
use stb_tests::random::Rng;
use stb_tests::random_model::random;

use crate::Report;

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

/// What a product has to be: for each token and row the sum, Σ|w·x|, and half a step of activations rounded
/// to 8 bits by 32 columns times Σ|w|.
struct Case {
    what: String,
    exact: Vec<[f64; 3]>,
}

impl Case {
    fn new(what: String, weights: &[f32], cols: usize, x: &[f32]) -> Self {
        let mut exact = Vec::new();
        for x in x.chunks_exact(cols) {
            for w in weights.chunks_exact(cols) {
                let (mut sum, mut magnitude, mut step) = (0.0, 0.0, 0.0);
                for (w, x) in w.chunks(32).zip(x.chunks(32)) {
                    let (mut largest, mut size) = (0.0f64, 0.0);
                    for (w, x) in w.iter().zip(x) {
                        let (w, x) = (f64::from(*w), f64::from(*x));
                        sum += w * x;
                        magnitude += (w * x).abs();
                        size += w.abs();
                        largest = largest.max(x.abs());
                    }
                    step += largest / 254.0 * size;
                }
                exact.push([sum, magnitude, step]);
            }
        }
        Self { what, exact }
    }

    /// The largest error of `y` over what is allowed: `relative` · Σ|w·x|, and the steps of `rounded`
    /// activations.
    fn worst(&self, y: &[f32], relative: f64, rounded: bool) -> f64 {
        let mut worst = 0.0f64;
        for (y, [sum, magnitude, step]) in y.iter().zip(&self.exact) {
            let rounding = if rounded { 1.0001 * step } else { 0.0 };
            let error = (f64::from(*y) - sum).abs() / (relative * magnitude + rounding + 1e-30);
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
        report.failures += 1;
        report.line(&format!("  WRONG: {kernel}, {}: {worst:.3} of what is allowed", case.what));
    }
    all.push(
        json!({"kernel": kernel, "case": case.what, "error_of_allowed": worst, "right": right}),
    );
}

/// Checks all kernels.
pub(crate) fn run(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let mut rng = Rng(11);
    let mut all = Vec::new();
    let mut matvec = MatVec::new(device)?;
    let mut gemm = Gemm::new(device)?;
    for encoding in encodings()? {
        for (rows, cols) in SHAPES {
            let bytes = random(&[rows as u64, cols as u64], &encoding);
            let view = encoding.view(rows as u64, cols as u64, &bytes)?;
            let most = if rows * cols > 1_000_000 { 33 } else { 130 };
            let counts = [1, 2, 3, 7, 16, 1 + rng.below(most), most];
            let weights = view.decode();
            let matrix = Matrix::upload(device, &encoding, rows, cols, &bytes)?;
            for tokens in counts {
                let mut x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
                for _ in 0..cols / 50 {
                    let at = rng.below(x.len());
                    x[at] *= 300.0;
                }
                let what = format!("{encoding} {rows}x{cols}, {tokens} tokens");
                let case = Case::new(what, &weights, cols, &x);
                let input = device.upload("activations", &x)?;
                // What is not written stays NaN.
                let mut out = device.upload("results", &vec![f32::NAN; tokens * rows])?;
                let mut y = vec![0.0; tokens * rows];
                if tokens <= 16 {
                    for numbers in [Numbers::Exact, Numbers::Rounded] {
                        out.write(&vec![f32::NAN; tokens * rows])?;
                        let input = Input::Plain(&input);
                        matvec.queue(&[&matrix], input, numbers, &mut [&mut out], false, tokens)?;
                        out.read(&mut y)?;
                        let rounded = numbers == Numbers::Rounded;
                        let worst = case.worst(&y, 1e-5, rounded);
                        judge(report, &mut all, &case, &format!("matvec {numbers:?}"), worst);
                    }
                }
                if GemmPlan::supports(&encoding) {
                    out.write(&vec![f32::NAN; tokens * rows])?;
                    gemm.queue(&[&matrix], Input::Plain(&input), &mut [&mut out], false, tokens)?;
                    out.read(&mut y)?;
                    // Activations in f16, or both in two bf16.
                    let places = if matches!(encoding, Encoding::Nm(_)) { 11 } else { 14 };
                    let worst = case.worst(&y, 0.5f64.powi(places) + 1e-5, false);
                    judge(report, &mut all, &case, "gemm", worst);
                }
            }
        }
    }
    let right = all.iter().filter(|c| c["right"] == true).count();
    report.line(&format!("  {right} of {} products are within their tolerance", all.len()));
    let empty = all.is_empty();
    report.put("correctness", all.into());
    if empty {
        bail!("nothing was checked");
    }
    Ok(())
}
