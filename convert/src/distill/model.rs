//! Distillation of the whole quantized model: trains scales and norms so that its output distribution approximates
//! that of the dense model.
//!
//! The loss is KL(dense ‖ quantized) of the next token, averaged over all tokens. The backward pass keeps only the
//! input of each layer and recomputes its activations, so that it needs the memory of a single layer.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::arch::{NormSite, Role, TensorSpec};
use stb_runtime::{Engine, Layer, LayerMatrix, Result, Weight};

use super::moving::{MovingLayer, MovingNorm, MovingScales};
use super::{BATCH, DistillOptions, Outcome};
use crate::backward::{DenseLayer, DenseMatrix, ModelHead, Pass, embedded_gradient, uncap};
use crate::interrupt::check_interrupt;
use crate::products::add_cross_products;

/// Decoder layers of a model that takes steps of the full learning rate; deeper models take smaller ones.
const RATE_LAYERS: f64 = 4.0;

/// A decoder layer and its trained parameters.
struct DistilledLayer<'a> {
    layer: &'a Layer,
    moving: MovingLayer,
}

impl<'a> DistilledLayer<'a> {
    fn new(layer: &'a Layer) -> Self {
        Self { layer, moving: MovingLayer::new(layer) }
    }

    /// The weights with the present parameters, rounded as they would be stored.
    fn weights(&mut self) -> DenseLayer {
        self.moving.weights(self.layer)
    }

    /// One training step, given the gradient of the output for the inputs `x`. Returns the gradient of `x`.
    fn step(&mut self, pass: &Pass<'_>, x: Vec<f32>, d_out: Vec<f32>, rate: f64) -> Vec<f32> {
        let weights = self.weights();
        let mut gradient = self.moving.zeros(&weights);
        let d_in = pass.input_gradient(&weights, x, d_out, &mut gradient);
        self.moving.step(&gradient, &weights, rate);
        d_in
    }
}

/// The embeddings or the lm_head, whose scales are trained if they are quantized.
struct MovingTable {
    moving: Option<MovingScales>,
    /// The weight with the present scales, as it would be stored.
    weight: Weight,
}

impl MovingTable {
    fn new(weight: &Weight) -> Self {
        Self { moving: MovingScales::new(weight), weight: weight.clone() }
    }

    /// A zero gradient; `None` if there are no scales to train.
    fn gradient(&self) -> Option<DenseMatrix> {
        self.moving.as_ref().map(MovingScales::zeros)
    }

    fn step(&mut self, gradient: Option<&DenseMatrix>, rate: f64) -> Result<()> {
        if let Some((moving, gradient)) = self.moving.as_mut().zip(gradient) {
            moving.step(gradient, rate);
            let (rows, cols) = (self.weight.rows() as u64, self.weight.cols() as u64);
            let encoding = self.weight.encoding().clone();
            self.weight = Weight::from_payload(&moving.pack(), encoding, rows, cols)?;
        }
        Ok(())
    }
}

/// A quantized model that has been distilled.
pub(crate) struct Distilled<'a> {
    embeddings: MovingTable,
    layers: Vec<DistilledLayer<'a>>,
    norm: MovingNorm,
    lm_head: Option<MovingTable>,
    /// The KL divergence from the dense model on held-out sequences, in nats per token.
    pub held_out: Outcome,
    /// The same on the first training sequences, as many as there are held-out ones.
    pub training: Outcome,
}

impl Distilled<'_> {
    /// The stored bytes of a tensor; `None` if distillation has not changed it. `encoding` is its encoding in the
    /// file.
    pub(crate) fn payload(&mut self, tensor: &TensorSpec, encoding: &Encoding) -> Option<Vec<u8>> {
        if self.held_out.after >= self.held_out.before {
            return None;
        }
        let dense = |values: Vec<f32>| match encoding {
            Encoding::Dense(kind) => Some(kind.encode(&values)),
            _ => None,
        };
        match (tensor.role, tensor.layer) {
            (Role::TokenEmbedding, _) => Some(self.embeddings.moving.as_mut()?.pack()),
            (Role::LmHead, _) => Some(self.lm_head.as_mut()?.moving.as_mut()?.pack()),
            (Role::Norm(NormSite::Final), _) => dense(self.norm.weight()),
            (Role::Norm(site), Some(layer)) => dense(self.layers.get(layer)?.moving.norm(site)?),
            (role, Some(layer)) => {
                self.layers.get_mut(layer)?.moving.pack(LayerMatrix::of_role(role)?)
            }
            _ => None,
        }
    }
}

/// The sequences of a distillation; those of one batch have one length.
pub(crate) struct Sequences<'a> {
    /// Each is used once.
    pub training: &'a [Vec<u32>],
    /// They decide whether the result is kept.
    pub held_out: &'a [Vec<u32>],
}

/// Distills the quantized model of `engine` from that of `dense`; [`largest_rate`] derives the learning rate from
/// `options.rate`. Calls `progress` with steps done, all steps, and the loss of the last step.
///
/// # Errors
/// [`crate::interrupt::Interrupted`]; [`stb_runtime::Error`] for tokens outside the vocabulary.
pub(crate) fn distill_model<'a>(
    dense: &Engine,
    engine: &'a Engine,
    sequences: &Sequences<'_>,
    options: DistillOptions,
    progress: &dyn Fn(usize, usize, f64),
) -> anyhow::Result<Distilled<'a>> {
    let Sequences { training, held_out } = *sequences;
    let pass = Pass { engine, length: 1 };
    let mut distillation = Distillation {
        pass,
        dense,
        embeddings: MovingTable::new(&engine.model.embeddings),
        layers: engine.model.layers.iter().map(DistilledLayer::new).collect(),
        norm: MovingNorm::new(engine.model.spec.norm_kind, &engine.model.norm),
        lm_head: engine.model.own_lm_head.as_ref().map(MovingTable::new),
    };
    let samples = &training[..held_out.len().min(training.len())];
    let before = [distillation.loss(held_out)?, distillation.loss(samples)?];
    let rate = largest_rate(options.rate, before[0], engine.model.layers.len());
    let options = DistillOptions { rate, ..options };
    let all = training.len().div_ceil(BATCH);
    for (step, batch) in training.chunks(BATCH).enumerate() {
        check_interrupt()?;
        let loss = distillation.step(batch, Some(options.rate_at(step, all)))?;
        progress(step + 1, all, loss);
    }
    let after = [distillation.loss(held_out)?, distillation.loss(samples)?];
    let [held_out, training] = match after[0] < before[0] {
        true => std::array::from_fn(|i| Outcome { before: before[i], after: after[i] }),
        false => before.map(|before| Outcome { before, after: before }),
    };
    let Distillation { embeddings, layers, norm, lm_head, .. } = distillation;
    Ok(Distilled { embeddings, layers, norm, lm_head, held_out, training })
}

/// The learning rate of the first steps for a model of `layers` decoder layers whose divergence from the dense model is
/// `loss`, in nats per token. `rate` is for models of at most [`RATE_LAYERS`] layers and a loss of at least one nat.
///
/// The loss grows with the square of a step that is too large, so the rate for a coarse model would harm a model that is
/// already close. All layers take a step at once to lower the same loss, and their changes of the output add up, so a
/// deeper model takes smaller steps.
fn largest_rate(rate: f64, loss: f64, layers: usize) -> f64 {
    rate * loss.sqrt().min(1.0) * (RATE_LAYERS / layers as f64).min(1.0)
}

/// The dense model's logits for a batch of sequences, [tokens, vocab].
fn dense_logits(dense: &Engine, batch: &[Vec<u32>]) -> anyhow::Result<Vec<f32>> {
    let mut states = vec![Vec::new(); batch.len()];
    for (tokens, states) in batch.iter().zip(&mut states) {
        dense.embed(tokens, states)?;
    }
    states.par_iter_mut().for_each(|stream| {
        dense.model.layers.iter().for_each(|layer| dense.run_layer(layer, stream, &mut ()));
    });
    let head = ModelHead::of(dense);
    Ok(head.logits(&head.inputs(&states.concat())))
}

/// The state of a distillation.
struct Distillation<'a, 'b> {
    pass: Pass<'a>,
    dense: &'b Engine,
    embeddings: MovingTable,
    layers: Vec<DistilledLayer<'a>>,
    norm: MovingNorm,
    /// `None` if the embeddings are the lm_head.
    lm_head: Option<MovingTable>,
}

impl Distillation<'_, '_> {
    /// The mean loss over all sequences.
    fn loss(&mut self, sequences: &[Vec<u32>]) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for batch in sequences.chunks(BATCH) {
            check_interrupt()?;
            sum += self.step(batch, None)? * batch.len() as f64;
        }
        Ok(sum / sequences.len().max(1) as f64)
    }

    /// The mean loss of a batch; takes a training step if there is a learning rate.
    fn step(&mut self, batch: &[Vec<u32>], rate: Option<f64>) -> anyhow::Result<f64> {
        self.pass.length = batch.first().map_or(1, Vec::len);
        let (inputs, stream) = self.forward(batch, rate.is_some())?;
        let Self { pass, dense, embeddings, layers, norm, lm_head } = self;
        let isa = pass.engine.isa;
        let weight = norm.weight();
        let table = lm_head.as_ref().unwrap_or(embeddings);
        let head = ModelHead { engine: pass.engine, norm: &weight, lm_head: &table.weight };
        let head_inputs = head.inputs(&stream);
        let mut d_logits = head.logits(&head_inputs);
        let slopes = rate.and_then(|_| head.cap_slopes(&d_logits));
        let (vocab, width) = (head.lm_head.rows(), head.lm_head.cols());
        let targets = dense_logits(dense, batch)?;
        let losses: Vec<f64> = d_logits
            .par_chunks_exact_mut(vocab)
            .zip(targets.par_chunks_exact(vocab))
            .map(|(ours, theirs)| divergence(ours, theirs))
            .collect();
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let Some(rate) = rate else { return Ok(loss) };
        uncap(&mut d_logits, slopes);
        let d_inputs = head.logits_backward(&d_logits);
        let mut d_table = embeddings.gradient();
        let mut d_head = lm_head.as_ref().and_then(MovingTable::gradient);
        let d_weight = if lm_head.is_some() { &mut d_head } else { &mut d_table };
        if let Some(d_weight) = d_weight {
            add_cross_products(isa, &d_logits, vocab, &head_inputs, width, &mut d_weight.values);
        }
        drop((d_logits, targets));
        let (mut d_stream, d_norm) = head.inputs_backward(&stream, d_inputs);
        norm.step(&d_norm, &weight, rate);
        for (layer, x) in layers.iter_mut().zip(inputs).rev() {
            d_stream = layer.step(pass, x, d_stream, rate);
        }
        if let Some(d_table) = &mut d_table {
            let d_rows = embedded_gradient(pass.engine, d_stream);
            for (token, d) in batch.iter().flatten().zip(d_rows.chunks_exact(d_table.cols)) {
                let from = *token as usize * d_table.cols;
                let row = &mut d_table.values[from..from + d_table.cols];
                row.iter_mut().zip(d).for_each(|(row, d)| *row += d);
            }
        }
        embeddings.step(d_table.as_ref(), rate)?;
        if let Some(lm_head) = lm_head {
            lm_head.step(d_head.as_ref(), rate)?;
        }
        Ok(loss)
    }

    /// Runs a batch through the layers. Returns the input of each layer, if `keep` is set, and the output of the last,
    /// [tokens, hidden].
    fn forward(
        &mut self,
        batch: &[Vec<u32>],
        keep: bool,
    ) -> anyhow::Result<(Vec<Vec<f32>>, Vec<f32>)> {
        let Self { pass, embeddings, layers, .. } = self;
        let mut stream = Vec::new();
        for tokens in batch {
            let mut states = Vec::new();
            let positions = 0..tokens.len();
            pass.engine.embed_with(&embeddings.weight, tokens, positions, &mut states)?;
            stream.extend(states);
        }
        let mut inputs = Vec::new();
        for layer in layers {
            let out = pass.output(&layer.weights(), stream.clone());
            if keep {
                inputs.push(std::mem::replace(&mut stream, out));
            } else {
                stream = out;
            }
        }
        Ok((inputs, stream))
    }
}

/// KL(theirs ‖ ours) of the distributions of two vectors of logits. Replaces `ours` by the gradient with respect to
/// it, q − p.
fn divergence(ours: &mut [f32], theirs: &[f32]) -> f64 {
    let sum = |logits: &[f32]| -> f64 {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
        f64::from(largest) + sum.ln()
    };
    let (all_ours, all_theirs) = (sum(ours), sum(theirs));
    let mut divergence = 0.0;
    for (q, p) in ours.iter_mut().zip(theirs) {
        let (log_q, log_p) = (f64::from(*q) - all_ours, f64::from(*p) - all_theirs);
        let share = log_p.exp();
        if share > 0.0 {
            divergence += share * (log_p - log_q);
        }
        *q = (log_q.exp() - share) as f32;
    }
    divergence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_and_deep_models_take_smaller_steps() {
        assert_eq!(largest_rate(0.03, 2.5, 4), 0.03);
        assert_eq!(largest_rate(0.03, 1.0, 2), 0.03);
        assert_eq!(largest_rate(0.03, 0.25, 4), 0.015);
        assert!((largest_rate(0.03, 1.2, 30) - 0.004).abs() < 1e-12);
    }

    #[test]
    fn the_divergence_and_its_gradient() {
        let theirs = [0.3f32, -1.2, 2.0, 0.1];
        let ours = [1.0f32, 0.5, -0.5, 0.2];
        let mut gradient = ours;
        let here = divergence(&mut gradient, &theirs);
        assert!(divergence(&mut theirs.clone(), &theirs).abs() < 1e-9 && here > 0.1);
        for i in 0..ours.len() {
            let step = 1e-3f32;
            let at = |sign: f32| {
                let mut moved = ours;
                moved[i] += sign * step;
                divergence(&mut moved, &theirs)
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * f64::from(step));
            assert!((slope - f64::from(gradient[i])).abs() < 1e-3, "{i}: {slope} {gradient:?}");
        }
    }
}
