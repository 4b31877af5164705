//! Distillation of one quantized decoder layer: trains its scales and norms so that its output approximates the
//! output of the same layer in the dense model.

use stb_runtime::{Engine, Layer, LayerMatrix, Result, Weight};

use super::moving::MovingLayer;
use super::{BATCH, DistillOptions, Outcome};
use crate::backward::{DenseLayer, Pass, decode_layer};
use crate::interrupt::interrupted;
use crate::resume::States;

/// Trains scales and norms of the quantized `layer` so that its output for `inputs` approximates `targets`; both
/// are sequences of one length, [tokens, hidden] each. Replaces linear layers and norms of `layer` if the result
/// is better on these sequences; norms are not rounded yet. Returns the mean squared error of the output relative
/// to its mean square.
///
/// # Errors
/// None in practice: packed weights can be opened.
pub fn distill_layer(
    engine: &Engine,
    layer: &mut Layer,
    inputs: &States,
    targets: &States,
    options: DistillOptions,
) -> Result<Outcome> {
    let hidden = engine.model.hidden_size();
    let length = inputs.first().map_or(1, |states| states.len() / hidden).max(1);
    let pass = Pass { engine, length };
    let mut weights = decode_layer(layer);
    let batches =
        || inputs.chunks(BATCH).zip(targets.chunks(BATCH)).map(|(x, y)| (x.concat(), y.concat()));
    let energy: f64 = targets.iter().flatten().map(|v| f64::from(*v).powi(2)).sum();
    let error = |weights: &DenseLayer| -> f64 {
        batches().map(|(x, y)| pass.error(weights, x, &y)).sum::<f64>()
            / energy.max(f64::MIN_POSITIVE)
    };
    let before = error(&weights);

    let mut moving = MovingLayer::new(layer);
    let steps = options.epochs * inputs.len().div_ceil(BATCH);
    let mut step = 0;
    for _ in 0..options.epochs {
        for (x, y) in batches() {
            if interrupted() {
                return Ok(Outcome { before, after: before });
            }
            let mut gradient = moving.zeros(&weights);
            pass.gradient(&weights, x, &y, &mut gradient);
            moving.step(&gradient, &weights, options.rate_at(step, steps));
            moving.write(&mut weights);
            step += 1;
        }
    }
    let after = error(&weights);
    if after.is_nan() || after >= before {
        return Ok(Outcome { before, after: before });
    }
    let keys: Vec<LayerMatrix> = layer.matrices().map(|(key, _)| key).collect();
    for key in keys {
        if let Some((payload, old)) = moving.pack(key).zip(layer.matrix_mut(key)) {
            let (rows, cols) = (old.rows() as u64, old.cols() as u64);
            *old = Weight::from_payload(&payload, old.encoding().clone(), rows, cols)?;
        }
    }
    for (key, vector) in layer.vectors_mut() {
        if let Some(moved) = weights.vector(key) {
            vector.clone_from(moved);
        }
    }
    Ok(Outcome { before, after })
}
