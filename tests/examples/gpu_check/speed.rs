//! Bandwidth, GEMV and GEMM. A sample is the time of recorded graphs, enough in a row for 20 ms, from the start
//! to the end of the synchronization. Results are the median and the spread of nine samples. A GEMM includes
//! the preparation of f32 activations and writes f32 results; the GEMM of cuBLAS is bf16 throughout.

use std::time::Instant;

use anyhow::Context;
use serde_json::{Value, json};
use stb_format::Encoding;
use stb_format::encoding::Nm;
use stb_kernels::cuda::{
    ActivationInput, ActivationPrecision, Blas, Buffer, Device, Gemm, GemmSize, Gemv, Graph,
    Matrix, PrefillPrecision,
};
use stb_random::Rng;
use stb_tests::random_model::random;

use crate::report::Report;

/// Bytes of the matrices used in turn, several times the size of the caches.
const CYCLE: usize = 400 << 20;
/// The shortest sample in seconds.
const SAMPLE: f64 = 0.02;
/// Rows and columns of matrices.
const SHAPES: [(usize, usize); 3] = [(4096, 4096), (4096, 11_008), (4096, 14_336)];

/// Seconds: the median and the smallest and largest of `n` runs.
pub(crate) fn time(n: usize, run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<[f64; 3]> {
    time_queued(n, run, || Ok(()))
}

/// [`time`] for work that `queue` queues and `wait` waits for. The work is repeated until the overhead of the
/// host is negligible, after a warm-up in which the device reaches its clock.
fn time_queued(
    n: usize,
    mut queue: impl FnMut() -> anyhow::Result<()>,
    mut wait: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<[f64; 3]> {
    let warm = Instant::now();
    let mut one = f64::INFINITY;
    for run in 0.. {
        let start = Instant::now();
        queue()?;
        wait()?;
        one = one.min(start.elapsed().as_secs_f64());
        if run > 0 && warm.elapsed().as_secs_f64() > 0.3 {
            break;
        }
    }
    let repeats = (SAMPLE / one).ceil().clamp(1.0, 1000.0);
    let mut all = Vec::new();
    for _ in 0..n {
        let start = Instant::now();
        for _ in 0..repeats as usize {
            queue()?;
        }
        wait()?;
        all.push(start.elapsed().as_secs_f64() / repeats);
    }
    all.sort_by(f64::total_cmp);
    Ok([all[n / 2], all[0], all[n - 1]])
}

pub(crate) fn time_graph(device: &Device, graph: &mut Graph) -> anyhow::Result<[f64; 3]> {
    time_queued(9, || Ok(graph.run()?), || Ok(device.synchronize()?))
}

fn encodings() -> anyhow::Result<Vec<(&'static str, Encoding)>> {
    let nm = |n, m| Nm::new(n, m, 4, 128, false).map(Encoding::Nm).context("codes");
    Ok(vec![
        ("nm 1:8", nm(1, 8)?),
        ("nm 1:4", nm(1, 4)?),
        ("nm 2:8", nm(2, 8)?),
        ("nm 2:4", nm(2, 4)?),
    ])
}

/// Measures the bytes per second that a copy on the device reads and writes.
pub(crate) fn copy(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let floats = 256 << 20;
    let from: Buffer<f32> = device.zeros("a copy", floats)?;
    let mut to: Buffer<f32> = device.zeros("a copy", floats)?;
    let copy = || Ok(to.copy_part(0, &from, 0, floats)?);
    let [median, low, high] = time_queued(9, copy, || Ok(device.synchronize()?))?;
    let rate = |s: f64| 2.0 * 4.0 * floats as f64 / s / 1e9;
    report.line(&format!(
        "  copy of 1 GiB: {:.0} GB/s read and written ({:.0} to {:.0})",
        rate(median),
        rate(high),
        rate(low)
    ));
    report.put(
        "copy",
        json!({"gb_per_s": rate(median), "lowest": rate(high), "highest": rate(low)}),
    )?;
    Ok(())
}

/// Measures GEMV, as a share of the bandwidth of a copy.
pub(crate) fn decode(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let copy = report.json.get("copy").and_then(|c| c["gb_per_s"].as_f64()).unwrap_or(f64::NAN);
    let mut all: Vec<Value> = Vec::new();
    for (name, encoding) in encodings()? {
        for (rows, cols) in SHAPES {
            let bytes = random(&[rows as u64, cols as u64], &encoding);
            let copies = CYCLE.div_ceil(bytes.len()).min(600);
            let matrices = (0..copies)
                .map(|_| Matrix::upload(device, &encoding, rows, cols, &bytes))
                .collect::<Result<Vec<_>, _>>()?;
            let mut rng = Rng(5);
            for tokens in [1, 4, 16] {
                let x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
                let x = device.upload("activations", &x)?;
                let mut out = device.zeros("results", tokens * rows)?;
                let mut gemv = Gemv::new(device)?;
                let mut queue = |matrix: &Matrix| {
                    let input = ActivationInput::Plain(&x);
                    gemv.queue(
                        &[matrix],
                        input,
                        ActivationPrecision::Q8,
                        &mut [&mut out],
                        false,
                        tokens,
                    )
                };
                queue(&matrices[0])?;
                let mut graph = device.record(|| matrices.iter().try_for_each(&mut queue))?;
                let [median, low, high] =
                    time_graph(device, &mut graph)?.map(|s| s / copies as f64);
                let rate = bytes.len() as f64 / median / 1e9;
                report.line(&format!(
                    "  {name} {rows}x{cols}, {tokens:>2} tokens: {:7.2} us ({:.2} to {:.2}), {rate:5.0} GB/s = {:4.1} % of the copy",
                    median * 1e6,
                    low * 1e6,
                    high * 1e6,
                    100.0 * rate / copy
                ));
                all.push(json!({
                    "encoding": name, "rows": rows, "cols": cols, "tokens": tokens,
                    "bits_per_weight": 8.0 * bytes.len() as f64 / (rows * cols) as f64,
                    "seconds": median, "fastest": low, "slowest": high,
                    "gb_per_s": rate, "of_copy": rate / copy,
                }));
            }
            report.put("decode", all.clone().into())?;
        }
    }
    Ok(())
}

/// Measures GEMM with activations in f16 and in 8 bits, counting operations as if the weights were dense, and the GEMM of
/// cuBLAS in bf16.
pub(crate) fn prefill(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let cublas = Blas::new(device);
    if let Err(e) = &cublas {
        report.line(&format!("  not compared: {e}"));
    }
    let mut all: Vec<Value> = Vec::new();
    let mut rng = Rng(6);
    for (rows, cols) in SHAPES {
        for tokens in [512, 2048, 8192] {
            let size = GemmSize { m: tokens, n: rows, k: cols };
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
            let mut dense = None;
            if let Ok(cublas) = &cublas {
                // Random bf16: the upper halves of the floats.
                let half = |v: &f32| (v.to_bits() >> 16) as u16;
                let half_x: Vec<u16> = x.iter().map(half).collect();
                let half_w: Vec<u16> = (0..rows * cols).map(|_| half(&rng.float())).collect();
                let (w, x) =
                    (device.upload("weights", &half_w)?, device.upload("activations", &half_x)?);
                let mut y = device.zeros("results", tokens * rows)?;
                let multiply = || {
                    for _ in 0..10 {
                        cublas.multiply_bf16(size, &x, &w, &mut y)?;
                    }
                    Ok(())
                };
                let times = time_queued(9, multiply, || Ok(device.synchronize()?))?;
                let times = times.map(|s| s / 10.0);
                dense = Some(times[0]);
                let timing =
                    GemmTiming { kernel: "cuBLAS bf16", size, seconds: times, dense: None };
                report.line(&timing.line());
                all.push(timing.entry());
            }
            let x = device.upload("activations", &x)?;
            let mut y = device.zeros("results", tokens * rows)?;
            for (name, encoding) in encodings()? {
                let bytes = random(&[rows as u64, cols as u64], &encoding);
                let matrix = Matrix::upload(device, &encoding, rows, cols, &bytes)?;
                for (suffix, numbers) in
                    [("", PrefillPrecision::F16), (" int8", PrefillPrecision::Int8)]
                {
                    let name = &format!("{name}{suffix}");
                    let mut gemm = Gemm::new(device)?.with_precision(numbers);
                    let mut queue = || {
                        gemm.queue(
                            &[&matrix],
                            ActivationInput::Plain(&x),
                            &mut [&mut y],
                            false,
                            tokens,
                        )
                    };
                    queue()?;
                    let mut graph = device.record(|| (0..10).try_for_each(|_| queue()))?;
                    let times = time_graph(device, &mut graph)?.map(|s| s / 10.0);
                    let timing = GemmTiming { kernel: name, size, seconds: times, dense };
                    report.line(&timing.line());
                    all.push(timing.entry());
                }
            }
            report.put("prefill", all.clone().into())?;
        }
    }
    Ok(())
}

/// The measurement of a GEMM.
struct GemmTiming<'a> {
    kernel: &'a str,
    size: GemmSize,
    /// Seconds: the median, the smallest and the largest.
    seconds: [f64; 3],
    /// The seconds of cuBLAS, if it was measured.
    dense: Option<f64>,
}

impl GemmTiming<'_> {
    /// Operations per second, counted as if the weights were dense.
    fn tflops(&self) -> f64 {
        let GemmSize { m, n, k } = self.size;
        2.0 * n as f64 * k as f64 * m as f64 / self.seconds[0] / 1e12
    }

    fn line(&self) -> String {
        let Self { kernel, size: GemmSize { m, n, k }, seconds, dense } = self;
        let [median, low, high] = seconds.map(|s| s * 1e6);
        let rate = self.tflops();
        let against = dense.map_or(String::new(), |d| format!(", {:.2} x cuBLAS", d / seconds[0]));
        format!(
            "  {kernel:<12} {n}x{k}, {m:>4} tokens: {median:8.1} us ({low:.1} to {high:.1}), \
             {rate:6.0} TFLOP/s{against}"
        )
    }

    fn entry(&self) -> Value {
        let Self { kernel, size: GemmSize { m, n, k }, seconds: [median, low, high], dense } = self;
        json!({
            "kernel": kernel, "rows": n, "cols": k, "tokens": m,
            "seconds": median, "fastest": low, "slowest": high,
            "dense_tflops": self.tflops(),
            "times_cublas": dense.map(|d| d / median),
        })
    }
}
