//! Opens models for evaluation.

use std::path::Path;

use stb_kernels::kv::KvKind;

use crate::engine::{Engine, OpenOptions, Verify};
use crate::error::Result;

/// Models below this number of parameters run with one thread per window or question.
const SMALL_MODEL: u64 = 50_000_000;

/// Opens a model for evaluation. Activations, keys and values are not rounded. Small models get one thread per window or
/// question; all threads compute one window or question of a larger model.
///
/// # Errors
/// As for [`Engine::open`].
pub fn open_to_measure(path: &Path, options: &OpenOptions) -> Result<Engine> {
    let one = OpenOptions { exact: true, kv: KvKind::F32, threads: Some(1), ..*options };
    let model = Engine::open(path, &one)?;
    // A device computes one sequence at a time, whatever the size of the model.
    if is_small(&model) || model.device_name().is_some() {
        return Ok(model);
    }
    Engine::open(path, &OpenOptions { threads: options.threads, verify: Verify::Off, ..one })
}

pub(super) fn is_small(model: &Engine) -> bool {
    model.parameters() < SMALL_MODEL
}
