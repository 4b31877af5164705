//! The options for loading a model, and opening one with them.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use stb_format::Verdict;
use stb_runtime::{
    DeviceChoice, Engine, Error, KvKind, OpenOptions, Verify, default_threads, open_to_measure,
};

use super::{devices, terminal};

/// Options for loading a model.
#[derive(Args, Clone)]
pub(super) struct LoadArgs {
    /// Threads; default: one per physical core that this process may use
    #[arg(short, long, value_name = "N", env = "STB_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Read the file into memory instead of mapping it
    #[arg(long, env = "STB_NO_MMAP")]
    pub no_mmap: bool,
    /// Lock the mapped file in memory, so that it is never paged out
    #[arg(long, env = "STB_MLOCK", conflicts_with = "no_mmap")]
    pub mlock: bool,
    /// What to check before use: tensor checksums (of files above 1 GiB once, until they change),
    /// everything, or structure and metadata only
    #[arg(long, value_name = "WHAT", env = "STB_VERIFY", default_value = "auto")]
    pub verify: VerifyArg,
    /// Do not quantize activations to 8 bits; slower
    #[arg(long, env = "STB_EXACT")]
    pub exact: bool,
    /// Type of the KV cache [default: f16; f32 with --exact]
    #[arg(long, value_name = "TYPE", env = "STB_KV")]
    pub kv: Option<KvArg>,
    /// Where to compute: cpu, cuda, cuda:N, or auto for a CUDA device if there is one [default: cpu,
    /// until the kernels have been proven on devices]
    #[arg(long, value_name = "DEVICE", env = "STB_DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Decoder layers on the device, counted from the last; the CPU computes the rest. Also -ngl N.
    /// Implies --device auto unless --device is given [default: all]
    #[arg(long, alias = "n-gpu-layers", value_name = "N", env = "STB_NGL")]
    pub gpu_layers: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum KvArg {
    F32,
    F16,
    Q8,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum VerifyArg {
    Auto,
    Full,
    Off,
}

/// Runs `f` in a Rayon pool of `threads` threads. Evaluation computes whole windows in parallel.
pub(super) fn in_pool(
    threads: Option<u16>,
    f: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let threads = threads.map_or_else(default_threads, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(f)
}

/// Opens the model for evaluation.
pub(super) fn open_exact(file: &Path, args: &LoadArgs) -> Result<Engine, Error> {
    if matches!(args.kv, Some(KvArg::F16 | KvArg::Q8)) {
        let text = "evaluation is exact and uses an f32 KV cache: omit --kv (STB_KV)";
        return Err(Error::usage(text));
    }
    let threads = args.threads.map_or_else(default_threads, usize::from);
    let options = OpenOptions { threads: Some(threads), ..open_options(args) };
    let engine = open_to_measure(file, &options)?;
    explain(&engine);
    Ok(engine)
}

/// Opens the model and returns the time it took.
pub(super) fn open(file: &Path, args: &LoadArgs) -> Result<(Engine, Duration), Error> {
    let started = Instant::now();
    let engine = Engine::open(file, &open_options(args))?;
    explain(&engine);
    Ok((engine, started.elapsed()))
}

/// Prints what the user should know about an engine: a fallback to the CPU, and a file of low quality.
pub(super) fn explain(engine: &Engine) {
    devices::explain(engine);
    warn(engine);
}

/// Warns of a file that its converter found broken, or did not check.
fn warn(engine: &Engine) {
    let Some(quality) = engine.model.quality() else { return };
    let file = engine.model.source.display();
    match (quality.verdict, &quality.figures) {
        (Verdict::Broken, Some(figures)) => terminal::note(format_args!(
            "{file} is broken: its KL divergence from the original model is {:.2} nats per token; convert it to more bits",
            figures.kl.value
        )),
        (Verdict::Broken, None) => terminal::note(format_args!(
            "{file} is broken: its predictions are not finite; convert it to more bits"
        )),
        (Verdict::Unchecked, _) => terminal::note(format_args!(
            "{file} has not been checked: it was converted with --no-check"
        )),
        _ => {}
    }
}

/// The options of the command line.
pub(super) fn open_options(args: &LoadArgs) -> OpenOptions {
    let verify = match args.verify {
        VerifyArg::Auto => Verify::Auto,
        VerifyArg::Full => Verify::Full,
        VerifyArg::Off => Verify::Off,
    };
    let kv = match args.kv {
        Some(KvArg::F32) => KvKind::F32,
        Some(KvArg::F16) => KvKind::F16,
        Some(KvArg::Q8) => KvKind::Q8,
        None if args.exact => KvKind::F32,
        None => KvKind::F16,
    };
    OpenOptions {
        map: !args.no_mmap,
        verify,
        exact: args.exact,
        kv,
        threads: args.threads.map(usize::from),
        lock: args.mlock,
        // --gpu-layers implies --device auto.
        device: args.device.unwrap_or(match args.gpu_layers {
            Some(_) => DeviceChoice::Auto,
            None => DeviceChoice::Cpu,
        }),
        device_layers: args.gpu_layers,
    }
}
