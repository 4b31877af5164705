//! Lists the devices of a machine, and explains a fallback to the CPU.

use stb_kernels::cuda;
use stb_runtime::{Engine, default_threads};

use super::terminal;

/// `--list-devices`: one line per device. Without a CUDA device, standard error says why there is none.
pub(super) fn list() -> anyhow::Result<()> {
    let isas: Vec<_> = stb_kernels::Isa::available().map(stb_kernels::Isa::name).collect();
    terminal::line(format_args!("cpu     {}, {} threads", isas.join(", "), default_threads()))?;
    match cuda::devices() {
        Ok(devices) => {
            for device in devices {
                let (major, minor) = cuda::OLDEST;
                let old = format!(" (too old: needs {major}.{minor})");
                let note = if device.is_supported() { "" } else { &old };
                terminal::line(format_args!("{device}{note}"))?;
            }
        }
        Err(e) => terminal::note(e),
    }
    Ok(())
}

/// Says why the CPU computes although `--device auto` was given.
pub(super) fn explain(model: &Engine) {
    if let Some(why) = &model.device_note {
        terminal::note(format_args!("{why}; the CPU computes"));
    }
}
