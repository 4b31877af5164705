//! The squared norms of the inputs of the dense model's linear layers, from a few calibration sequences.

use std::ops::ControlFlow;

use rayon::prelude::*;
use stb_format::arch::{InputMap, LinearInput};
use stb_runtime::{Checkpoint, Engine, Observer, Result};

use crate::calibration::CalibrationText;
use crate::recipe::Calibration;

/// The number of calibration sequences that suffices for these sums.
pub const SEQUENCES: usize = 8;

/// Sums of squares of the inputs of the linear layers, for each decoder layer.
pub type Diagonals = Vec<InputMap<Vec<f32>>>;

/// Adds up the squares of the inputs.
struct Squares<'a>(&'a mut InputMap<Vec<f32>>);

impl Observer for Squares<'_> {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        let sums = &mut self.0[input];
        for x in x.chunks_exact(sums.len()) {
            for (s, x) in sums.iter_mut().zip(x) {
                *s += x * x;
            }
        }
        ControlFlow::Continue(())
    }
}

/// Runs `samples` calibration sequences through the dense model and sums up the squares of the inputs.
///
/// # Errors
/// [`stb_runtime::Error::Usage`] if the text is too short for one sequence.
pub fn diagonals(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    source: &CalibrationText,
    samples: usize,
) -> Result<Diagonals> {
    let engine = Engine::from_checkpoint(checkpoint)?;
    let options = Calibration { samples: samples.max(calibration.samples), ..calibration.clone() };
    let length = options.length.min(checkpoint.spec.context_length as usize);
    let mut hidden = Vec::new();
    for window in source.sample(&engine.model, &options, length, samples)? {
        let mut states = Vec::new();
        engine.embed(&window, &mut states)?;
        hidden.push(states);
    }
    let mut all = Vec::new();
    for layer in &engine.model.layers {
        let zeros = || InputMap::from_fn(|input| vec![0.0; layer.input_width(input)]);
        let parts: Vec<InputMap<Vec<f32>>> = hidden
            .par_iter_mut()
            .map(|states| {
                let mut sums = zeros();
                engine.run_layer(layer, states, &mut Squares(&mut sums));
                sums
            })
            .collect();
        let mut sums = zeros();
        for part in parts {
            for (input, part) in part.iter() {
                sums[input].iter_mut().zip(part).for_each(|(s, p)| *s += p);
            }
        }
        all.push(sums);
    }
    Ok(all)
}
