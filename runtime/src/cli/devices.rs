//! The devices of a machine, and what is said about the one that was chosen.

use stb_kernels::cuda;
use stb_runtime::{DeviceChoice, Model, default_threads};

use super::{LoadArgs, terminal};

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

/// Says why the CPU computes if a device was asked for with `auto`. Where nobody has asked and there is
/// no device at all, that needs no words.
pub(super) fn explain(model: &Model, args: &LoadArgs) {
    let Some(why) = &model.device_note else { return };
    let asked = args.device == Some(DeviceChoice::Auto) || args.gpu_layers.is_some();
    if asked || !why.starts_with("no CUDA device") {
        terminal::note(format_args!("{why}; the CPU computes"));
    }
}
