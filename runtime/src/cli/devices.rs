//! Lists the devices of the machine, and reports a fallback to the CPU.

use stb_kernels::cuda;
use stb_runtime::{Engine, default_threads};

use super::terminal;

/// `--list-devices`: prints one line per device. If CUDA is not available, the reason is printed to
/// standard error.
pub(super) fn list() -> anyhow::Result<()> {
    let isas: Vec<_> = stb_kernels::Isa::available().map(stb_kernels::Isa::name).collect();
    terminal::line(format_args!("cpu     {}, {} threads", isas.join(", "), default_threads()))?;
    match cuda::devices() {
        Ok(devices) => {
            for device in devices {
                let (major, minor) = cuda::OLDEST;
                let too_old = format!(" (too old: needs {major}.{minor})");
                let note = if device.is_supported() { "" } else { &too_old };
                terminal::line(format_args!("{device}{note}"))?;
            }
        }
        Err(e) => terminal::note(e),
    }
    Ok(())
}

/// Prints why `--device auto` fell back to the CPU.
pub(super) fn explain(engine: &Engine) {
    if let Some(why) = &engine.device_note {
        terminal::note(format_args!("{why}; the CPU computes"));
    }
}
