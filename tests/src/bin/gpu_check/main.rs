//! Checks and measures the CUDA kernels on this machine's GPU, in one run: correctness of every kernel
//! against the exact decoder, the output of a model on the GPU and the CPU, bandwidth, products, whole
//! models, memory. Prints a table and writes JSON.
//!
//! A copy of the program needs nothing else but the driver, NVRTC, and cuBLAS to compare with.

mod attention;
mod correctness;
mod models;
mod speed;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use serde_json::{Map, Value, json};
use stb_kernels::cuda::{Device, Error, devices};

/// Checks and measures the CUDA kernels on this machine's GPU.
///
/// Exit codes: 0 all is right, 1 a result is wrong, 2 wrong usage, 5 there is no device that can.
#[derive(Parser)]
#[command(name = "gpu-check")]
struct Cli {
    /// The device
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// A .stb model: its greedy output on the GPU is compared with that on the CPU; may be repeated
    #[arg(long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// Where to write the figures
    #[arg(long, value_name = "FILE", default_value = "gpu-check.json")]
    json: PathBuf,
    /// Only check, do not measure
    #[arg(long, conflicts_with = "only_measure")]
    only_check: bool,
    /// Only measure, do not check
    #[arg(long)]
    only_measure: bool,
    /// Recipes of the whole models that are measured
    #[arg(long, value_name = "NAME", default_values = ["nm-1of8", "nm-2of8", "nm-2of4"])]
    recipe: Vec<String>,
    /// Shape of the whole models that are measured
    #[arg(long, value_name = "SHAPE", default_value = "llama-7b")]
    shape: String,
}

/// What is printed and written.
#[derive(Default)]
struct Report {
    json: Map<String, Value>,
    failures: usize,
}

impl Report {
    fn line(&self, text: &str) {
        // A reader that has left is no reason to stop: the file is written anyway.
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    fn put(&mut self, key: &str, value: Value) {
        self.json.insert(key.to_owned(), value);
    }

    /// A part that failed altogether: said, counted, and the others go on.
    fn part(&mut self, name: &str, run: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        self.line(&format!("\n{name}"));
        if let Err(e) = run(self) {
            self.line(&format!("  FAILED: {e:#}"));
            self.failures += 1;
            self.put(&format!("{name}: error"), format!("{e:#}").into());
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let device = match devices().and_then(|_| Device::open(cli.device)) {
        Ok(device) => device,
        Err(e @ (Error::Unavailable { .. } | Error::Unsupported { .. })) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {e}");
            return ExitCode::from(5);
        }
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {e}");
            return ExitCode::from(1);
        }
    };
    match check(&cli, &device) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {failures} checks failed");
            ExitCode::from(1)
        }
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {e:#}");
            ExitCode::from(1)
        }
    }
}

/// All parts; how many failed.
fn check(cli: &Cli, device: &Device) -> anyhow::Result<usize> {
    let mut report = Report::default();
    let info = device.info();
    report.line(&format!(
        "{}, compute capability {}.{}, {} multiprocessors, {} MB",
        info.name,
        info.capability.0,
        info.capability.1,
        info.multiprocessors,
        info.memory / 1_000_000
    ));
    report.put(
        "device",
        json!({
            "name": info.name,
            "capability": format!("{}.{}", info.capability.0, info.capability.1),
            "multiprocessors": info.multiprocessors,
            "memory": info.memory,
            "version": env!("CARGO_PKG_VERSION"),
        }),
    );
    if !cli.only_measure {
        report.part("correctness", |r| correctness::run(r, device));
        report.part("correctness of attention", |r| attention::check(r, device));
        for file in &cli.model {
            let name = format!("output of {}", file.display());
            report.part(&name, |r| models::compare(r, file, cli.device));
        }
    }
    if !cli.only_check {
        report.part("bandwidth", |r| speed::copy(r, device));
        report.part("decode", |r| speed::decode(r, device));
        report.part("prefill", |r| speed::prefill(r, device));
        report.part("attention of prompts", |r| attention::measure(r, device));
        report.part("models", |r| models::measure(r, device, &cli.shape, &cli.recipe));
        report.part("memory", models::memory);
    }
    report.put("failures", report.failures.into());
    let text = serde_json::to_string_pretty(&Value::Object(report.json.clone()))?;
    std::fs::write(&cli.json, text + "\n").with_context(|| cli.json.display().to_string())?;
    report.line(&format!("\nwritten: {}", cli.json.display()));
    Ok(report.failures)
}
