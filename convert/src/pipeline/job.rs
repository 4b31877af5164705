//! The description of a conversion, and its progress reports.

use std::path::Path;

use stb_format::Meta;
use stb_kernels::cuda::Device;
use stb_runtime::Checkpoint;

use crate::calibration::{CalibrationText, HeldOut};
use crate::plan::Plan;
use crate::recipe::Recipe;

/// One conversion.
pub struct Job<'a> {
    /// The dense model.
    pub checkpoint: &'a Checkpoint,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The method for each tensor.
    pub plan: Plan,
    /// The metadata, without the hashes of the source files and with room for the figures of the check.
    pub meta: Meta,
    /// The calibration text.
    pub calibration: &'a CalibrationText,
    /// The windows on which the file is measured; `None` for a file that is not checked.
    pub held_out: Option<&'a HeldOut>,
    /// The file to write.
    pub target: &'a Path,
    /// Whether an existing file may be replaced.
    pub force: bool,
    /// A GPU that computes the large products; results differ from those of the CPU by rounding.
    pub device: Option<Device>,
}

/// Receives the progress of a conversion.
pub trait Progress {
    /// `done` of `all` units of work are done; `what` describes the next.
    fn step(&self, done: u64, all: u64, what: &str);
    /// A decoder layer is finished with this mean relative error.
    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64);
    /// A note for the user.
    fn note(&self, text: &str);
}
