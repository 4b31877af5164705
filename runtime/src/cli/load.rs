//! Opens models with the options of the command line.

use std::path::Path;
use std::time::{Duration, Instant};

use stb_format::Verdict;
use stb_runtime::{
    DeviceChoice, Engine, Error, KvKind, OpenOptions, Verify, default_threads, open_to_measure,
};

use super::args::{KvArg, LoadArgs, VerifyArg};
use super::{devices, terminal};

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
