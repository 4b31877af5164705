//! Conversions by library calls, for tests and measurements.

use std::path::Path;

use stb_convert::Recipe;
use stb_convert::calibration::CalibrationText;
use stb_convert::pipeline::Progress;
use stb_convert::prepare::{Order, prepare};
use stb_convert::report::Report;
use stb_kernels::cuda::Device;
use stb_runtime::Checkpoint;

use crate::programs::note;

/// Prints notes, and no progress.
#[derive(Clone, Copy, Debug)]
pub struct Notes;

impl Progress for Notes {
    fn step(&self, _: u64, _: u64, _: &str) {}
    fn layer(&self, _: usize, _: usize, _: f64, _: &str, _: f64) {}
    fn note(&self, text: &str) {
        note(text);
    }
}

/// Converts the checkpoint `source` to `target` with a recipe (its name or its file) and `samples` calibration sequences of
/// `length` tokens from the file `text`. `device`, if there is one, computes the large products.
///
/// # Errors
/// As for [`prepare`] and [`stb_convert::prepare::Prepared::convert`].
pub fn converted(
    source: &Path,
    target: &Path,
    recipe: &str,
    text: &Path,
    samples: usize,
    length: usize,
    device: Option<Device>,
) -> anyhow::Result<Report> {
    let checkpoint = Checkpoint::open(source, true)?;
    let recipe = Recipe::load(recipe)?.changed(|file| {
        (file.calibration.samples, file.calibration.length) = (samples, length);
    })?;
    let calibration = CalibrationText::file(text)?;
    let order =
        Order { checkpoint: &checkpoint, calibration: &calibration, target, force: true, device };
    prepare(&checkpoint, &recipe, &calibration, false)?.convert(&order, &Notes)
}
