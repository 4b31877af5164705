//! Checks and measures the CUDA kernels on this machine's GPU in one run: every kernel against the exact
//! decoder, the output of a model on the GPU and the CPU, bandwidth, products, whole models, conversion and
//! memory. Prints a table and writes JSON.
//!
//! Each part is a process of its own, so that a failure, crash or hang does not affect the other parts. The
//! JSON is complete after each part.
//!
//! A copy of the program needs only the driver and NVRTC, and cuBLAS and cuSOLVER for comparisons and
//! conversions.

mod attention;
mod conversion;
mod correctness;
mod models;
mod report;
mod speed;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use serde_json::json;
use stb_kernels::cuda::{Device, Error, devices};

use report::Report;

/// Checks and measures the CUDA kernels on this machine's GPU.
///
/// Exit codes: 0 all results are correct, 1 a result is wrong, 2 wrong usage, 5 no supported device.
#[derive(Parser)]
#[command(name = "gpu-check")]
struct Cli {
    /// The device
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// A .stb model: its output on the GPU is compared with that on the CPU; may be repeated. Default: a
    /// small random one
    #[arg(long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// Where to write the figures
    #[arg(long, value_name = "FILE", default_value = "gpu-check.json")]
    json: PathBuf,
    /// Only these parts
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    part: Vec<GpuCheck>,
    /// Only check, do not measure
    #[arg(long, conflicts_with_all = ["only_measure", "part"])]
    only_check: bool,
    /// Only measure, do not check
    #[arg(long, conflicts_with = "part")]
    only_measure: bool,
    /// Small shapes only, for a run under compute-sanitizer
    #[arg(long)]
    small: bool,
    /// Seconds that a part may take
    #[arg(long, value_name = "N", default_value_t = 280)]
    limit: u64,
    /// Recipes of the whole models that are measured
    #[arg(long, value_name = "NAME", default_values = ["nm-1of8", "nm-2of8", "nm-2of4"])]
    recipe: Vec<String>,
    /// Shape of the whole models that are measured
    #[arg(long, value_name = "SHAPE", default_value = "llama-7b")]
    shape: String,
    /// Recipes of the conversion that is measured
    #[arg(long, value_name = "NAME", default_values = ["nm-2of8", "stbllm-4of8"])]
    conversion: Vec<String>,
    /// Calibration sequences of the conversion
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Tokens of a calibration sequence
    #[arg(long, value_name = "N", default_value_t = 2048)]
    length: usize,
    /// Run this part in this process
    #[arg(long, hide = true)]
    here: Option<GpuCheck>,
}

/// A part of the run: a check or a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GpuCheck {
    /// Products, compared with the exact decoder
    Products,
    /// Attention, compared with its definition
    Attention,
    /// Output of the models
    Output,
    /// A small conversion, compared with the CPU
    Conversion,
    /// Bandwidth of a copy
    Bandwidth,
    /// Products with one to 16 tokens
    Decode,
    /// Products with many tokens, compared with cuBLAS
    Prefill,
    /// Attention of prompts
    Prompts,
    /// Whole models
    Models,
    /// Conversion of a layer of a large model
    Layer,
    /// Memory of whole models, computed; only with --part memory
    Memory,
}

impl GpuCheck {
    fn is_check(self) -> bool {
        matches!(self, Self::Products | Self::Attention | Self::Output | Self::Conversion)
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn run(self, cli: &Cli, report: &mut Report) -> anyhow::Result<()> {
        if self == Self::Memory {
            return models::memory(report);
        }
        let device = &Device::open(cli.device)?;
        match self {
            Self::Products => correctness::run(report, device, cli.small),
            Self::Attention => attention::check(report, device, cli.small),
            Self::Output if cli.model.is_empty() => {
                let folder = tempfile::tempdir()?;
                models::compare(report, &models::small(folder.path())?, cli.device)
            }
            Self::Output => {
                cli.model.iter().try_for_each(|file| models::compare(report, file, cli.device))
            }
            Self::Conversion => conversion::compare(report, device),
            Self::Bandwidth => speed::copy(report, device),
            Self::Decode => speed::decode(report, device),
            Self::Prefill => speed::prefill(report, device),
            Self::Prompts => attention::measure(report, device),
            Self::Models => models::measure(report, device, &cli.shape, &cli.recipe),
            Self::Layer => {
                let (shape, recipes) = (&cli.shape, &cli.conversion);
                conversion::measure(report, device, shape, recipes, cli.samples, cli.length)
            }
            Self::Memory => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(part) = cli.here {
        return here(&cli, part);
    }
    let checked = devices().map_err(anyhow::Error::from).and_then(|all| check(&cli, &all));
    match checked {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {failures} checks failed");
            ExitCode::from(1)
        }
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {e:#}");
            let is_missing = matches!(
                e.downcast_ref::<Error>(),
                Some(Error::Unavailable { .. } | Error::Unsupported { .. })
            );
            ExitCode::from(if is_missing { 5 } else { 1 })
        }
    }
}

/// Runs one part in this process and adds its results to the JSON.
fn here(cli: &Cli, part: GpuCheck) -> ExitCode {
    let done = Report::open(&cli.json).and_then(|mut report| {
        if let Err(e) = part.run(cli, &mut report) {
            report.line(&format!("  FAILED: {e:#}"));
            report.failures += 1;
            report.put(&format!("{}: error", part.name()), format!("{e:#}").into())?;
        }
        report.save()?;
        Ok(report.failures)
    });
    match done {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "gpu-check: {e:#}");
            ExitCode::from(1)
        }
    }
}

/// Runs all parts. Returns the number of failed checks.
fn check(cli: &Cli, all: &[stb_kernels::cuda::DeviceInfo]) -> anyhow::Result<usize> {
    let count = all.len();
    let unusable = |why: String| anyhow::Error::from(Error::Unsupported { why });
    let none = || unusable(format!("there is no device {}, only {count}", cli.device));
    let info = all.get(cli.device).ok_or_else(none)?;
    if !info.is_supported() {
        return Err(unusable(format!("{info} is too old")));
    }
    let mut report = Report::new(&cli.json);
    report.line(&format!("{info}, {} MB", info.memory / 1_000_000));
    report.put(
        "device",
        json!({
            "name": info.name,
            "capability": format!("{}.{}", info.capability.0, info.capability.1),
            "multiprocessors": info.multiprocessors,
            "memory": info.memory,
            "version": env!("CARGO_PKG_VERSION"),
        }),
    )?;
    let parts = GpuCheck::value_variants().iter().copied().filter(|part| match &cli.part[..] {
        // The memory part is computed and the same on every machine.
        [] if *part == GpuCheck::Memory => false,
        [] if cli.only_check => part.is_check(),
        [] if cli.only_measure => !part.is_check(),
        [] => true,
        some => some.contains(part),
    });
    let mut failures = 0;
    for part in parts {
        report.line(&format!("\n{}", part.name()));
        let started = Instant::now();
        let ended = run_part(part, Duration::from_secs(cli.limit))?;
        report = Report::open(&cli.json)?;
        failures += std::mem::take(&mut report.failures);
        let wrong = match ended {
            PartEnd::Done(status) if status.code().is_some_and(|code| code < 2) => None,
            PartEnd::Done(status) => Some(format!("ended with {status}")),
            PartEnd::Killed => Some(format!("took more than {} s (--limit)", cli.limit)),
        };
        if let Some(wrong) = wrong {
            failures += 1;
            report.line(&format!("  FAILED: {wrong}"));
            report.put(&format!("{}: error", part.name()), wrong.into())?;
        }
        let seconds = started.elapsed().as_secs_f64();
        report.put(&format!("{}: seconds", part.name()), seconds.into())?;
    }
    report.put("failures", failures.into())?;
    report.line(&format!("\nwritten: {}", cli.json.display()));
    Ok(failures)
}

/// How the process of a part ended.
enum PartEnd {
    Done(ExitStatus),
    Killed,
}

/// Runs a part in a process of its own, with the arguments of this one.
fn run_part(part: GpuCheck, limit: Duration) -> anyhow::Result<PartEnd> {
    let program = std::env::current_exe().context("the program's own path")?;
    let mut child: Child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .args(["--here", &part.name()])
        .spawn()
        .context("a process for a part")?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(PartEnd::Done(status));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(PartEnd::Killed);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
