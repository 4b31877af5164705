//! Tuning of a decoder layer as a whole, once its weights have been quantized: until the layer's
//! output comes closer to what the dense model has there.

use stb_runtime::{Layer, Model, Result, Weight};

use super::scales::{Logarithms, Tunable};
use super::{BATCH, DistillOptions, Outcome};
use crate::backward::{LayerWeights, Pass};
use crate::interrupt::interrupted;
use crate::resume::States;

/// Tunes `layer`, quantized, so that from `inputs` it comes close to `targets`, sequences of one length
/// each. What can be stored of it is put into `layer`, if it is better on these sequences; norms are
/// not rounded yet. The outcome is the mean squared error of the output relative to its mean square.
///
/// # Errors
/// None in practice: what has been packed can be opened.
pub fn tune(
    model: &Model,
    layer: &mut Layer,
    inputs: &States,
    targets: &States,
    options: DistillOptions,
) -> Result<Outcome> {
    let hidden = model.norm.len();
    let length = inputs.first().map_or(1, |states| states.len() / hidden).max(1);
    let pass = Pass { model, length };
    let mut weights = LayerWeights::new(layer);
    let norms = weights.norms.clone();
    let batches =
        || inputs.chunks(BATCH).zip(targets.chunks(BATCH)).map(|(x, y)| (x.concat(), y.concat()));
    let energy: f64 = targets.iter().flatten().map(|v| f64::from(*v).powi(2)).sum();
    let error = |weights: &LayerWeights| -> f64 {
        batches().map(|(x, y)| pass.error(weights, x, &y)).sum::<f64>()
            / energy.max(f64::MIN_POSITIVE)
    };
    let before = error(&weights);

    let mut tunable: Vec<Tunable> = (0..Layer::PARTS.len())
        .filter_map(|part| Tunable::new(part, layer.matrices()[part]))
        .collect();
    let mut moving = norms.clone().map(Logarithms::new);
    let steps = options.epochs * inputs.len().div_ceil(BATCH);
    let mut step = 0;
    for _ in 0..options.epochs {
        for (x, y) in batches() {
            if interrupted() {
                return Ok(Outcome { before, after: before });
            }
            let mut gradient = LayerWeights {
                norms: norms.each_ref().map(|n| vec![0.0; n.len()]),
                ..Default::default()
            };
            for t in &tunable {
                gradient.linear[t.part] = t.zeros();
            }
            pass.gradient(&weights, x, &y, &mut gradient);
            let rate = options.rate_at(step, steps);
            step += 1;
            for t in &mut tunable {
                t.step(&gradient.linear[t.part], rate);
                t.weights(&mut weights.linear[t.part]);
            }
            for (i, moving) in moving.iter_mut().enumerate() {
                moving.step(&gradient.norms[i], &weights.norms[i], rate);
                weights.norms[i] = moving.values();
            }
        }
    }
    let after = error(&weights);
    if after.is_nan() || after >= before {
        return Ok(Outcome { before, after: before });
    }
    for mut t in tunable {
        if let Some(old) = layer.matrix_mut(Layer::PARTS[t.part]) {
            let (rows, cols) = (old.rows() as u64, old.cols() as u64);
            *old = Weight::from_payload(&t.pack(), old.encoding().clone(), rows, cols)?;
        }
    }
    let [attention, mlp] = weights.norms;
    (layer.attention_norm, layer.mlp_norm) = (attention, mlp);
    Ok(Outcome { before, after })
}
