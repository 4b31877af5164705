//! What a conversion is asked to do, and who hears how far it is.

use std::path::Path;

use stb_format::Meta;
use stb_kernels::cuda::Device;
use stb_runtime::Checkpoint;

use crate::calibration::CalibrationText;
use crate::plan::Plan;
use crate::recipe::Recipe;

/// One conversion.
pub struct Job<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// What is done.
    pub recipe: &'a Recipe,
    /// What is done to which tensor.
    pub plan: Plan,
    /// The metadata, hashes of the sources still missing.
    pub meta: Meta,
    /// The calibration text.
    pub calibration: &'a CalibrationText,
    /// The file to write.
    pub target: &'a Path,
    /// Whether it may replace another.
    pub force: bool,
    /// A GPU that computes the large products; results differ from those of the CPU by rounding.
    pub device: Option<Device>,
}

/// Hears how far a conversion is.
pub trait Progress {
    /// `done` of `all` units of work; `what` is being done.
    fn step(&self, done: u64, all: u64, what: &str);
    /// A decoder layer is finished with this mean relative error.
    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64);
    /// Something that the user should know.
    fn note(&self, text: &str);
}
