//! How large the inputs of the dense model's linear layers are, from a few calibration sequences.

use std::ops::ControlFlow;

use rayon::prelude::*;
use stb_runtime::{Checkpoint, LinearInput, Model, Observer, Result};

use crate::calibration::CalibrationText;
use crate::recipe::Calibration;

/// Calibration sequences that suffice for these sums.
pub const SEQUENCES: usize = 8;

/// Sums of squares of the inputs of each decoder layer, in the order of
/// [`LinearInput::ALL`].
pub type Diagonals = Vec<[Vec<f32>; 4]>;

struct Squares<'a>(&'a mut [Vec<f32>; 4]);

impl Observer for Squares<'_> {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        let sums = &mut self.0[input.index()];
        for x in x.chunks_exact(sums.len()) {
            for (s, x) in sums.iter_mut().zip(x) {
                *s += x * x;
            }
        }
        ControlFlow::Continue(())
    }
}

/// Runs `samples` calibration sequences through the dense model.
///
/// # Errors
/// [`stb_runtime::Error::Usage`] if the text is too short for one sequence.
pub fn diagonals(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    source: &CalibrationText,
    samples: usize,
) -> Result<Diagonals> {
    let model = Model::from_checkpoint(checkpoint)?;
    let options = Calibration { samples, ..calibration.clone() };
    let length = options.length.min(checkpoint.spec.context_length as usize);
    let mut hidden = Vec::new();
    for window in source.windows(&model.tokenizer()?, &options, length)? {
        let mut states = Vec::new();
        model.embed(&window, &mut states)?;
        hidden.push(states);
    }
    let mut all = Vec::new();
    for layer in &model.layers {
        let sizes = [layer.q.cols(), layer.o.cols(), layer.gate.cols(), layer.down.cols()];
        let parts: Vec<[Vec<f32>; 4]> = hidden
            .par_iter_mut()
            .map(|states| {
                let mut sums = sizes.map(|n| vec![0.0; n]);
                model.run_layer(layer, states, &mut Squares(&mut sums));
                sums
            })
            .collect();
        let mut sums = sizes.map(|n| vec![0.0; n]);
        for part in parts {
            for (sum, part) in sums.iter_mut().zip(part) {
                sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
            }
        }
        all.push(sums);
    }
    Ok(all)
}
