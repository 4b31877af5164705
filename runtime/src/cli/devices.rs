//! The devices of a machine, and what is said about the one that was chosen.

use stb_kernels::cuda;
use stb_runtime::{Engine, default_threads};

use super::terminal;

/// `--list-devices`: one line each; without a CUDA device why there is none.
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

/// Says why the CPU computes though a device was wanted if there is one.
pub(super) fn explain(model: &Engine) {
    if let Some(why) = &model.device_note {
        terminal::note(format_args!("{why}; the CPU computes"));
    }
}
