//! Opens models for evaluation.

use std::path::Path;

use stb_kernels::kv::KvKind;

use crate::engine::{Engine, OpenOptions, Verify};
use crate::error::Result;

/// Models with fewer parameters run with one thread per window or question.
const SMALL_MODEL: u64 = 50_000_000;

/// Opens a model for evaluation, with f32 activations and KV cache; see [`open_for_windows`].
///
/// # Errors
/// The errors of [`Engine::open`].
pub fn open_to_measure(path: &Path, options: &OpenOptions) -> Result<Engine> {
    open_for_windows(path, &OpenOptions { exact: true, kv: KvKind::F32, ..*options })
}

/// Opens a model that computes windows or questions. Small models compute one of them per thread; larger models use
/// all threads for each.
///
/// # Errors
/// The errors of [`Engine::open`].
pub fn open_for_windows(path: &Path, options: &OpenOptions) -> Result<Engine> {
    let one = OpenOptions { threads: Some(1), ..*options };
    let engine = Engine::open(path, &one)?;
    // A device computes one sequence at a time, whatever the size of the model.
    if is_small(&engine) || engine.device_name().is_some() {
        return Ok(engine);
    }
    Engine::open(path, &OpenOptions { threads: options.threads, verify: Verify::Off, ..one })
}

pub(super) fn is_small(engine: &Engine) -> bool {
    engine.model.parameters() < SMALL_MODEL
}
