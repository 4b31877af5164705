//! The backward pass of the whole model: how much the output distribution depends on the output of each linear
//! layer.
//!
//! The loss is −log p(y) with y drawn from the model's own distribution p. The mean squares of its gradients
//! are the diagonal of the Fisher information: a small change δ of an output changes the distribution by
//! KL ≈ ½ Σ E[g²] δ².

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use stb_kernels::{Isa, Panels};
use stb_runtime::{Engine, Weight};

use super::layer::{LayerFisher, Pass, mean_squares};
use super::matrix::decode_layer;
use crate::products::product_of;

/// Rows of the lm_head that are decoded at a time.
const HEAD_ROWS: usize = 4096;
/// Seed for sampling the tokens y.
const SEED: u64 = 0;

/// Statistics that weigh errors of the embeddings and the lm_head.
pub(crate) struct TableStatistics {
    /// Mean squares of the gradients of the embedded tokens, `[hidden]`.
    pub embedded: Vec<f32>,
    /// Mean squares of the inputs of the lm_head, `[hidden]`.
    pub head_inputs: Vec<f32>,
    /// Mean squares of the gradients of the logits, `[vocab]`.
    pub logits: Vec<f32>,
}

/// Runs the forward and backward pass of the dense model on sequences of one length. Calls `layer` for each
/// decoder layer, from the last to the first.
pub(crate) fn backpropagate(
    engine: &Engine,
    sequences: &[Vec<u32>],
    mut layer: impl FnMut(usize, &LayerFisher) -> anyhow::Result<()>,
) -> anyhow::Result<TableStatistics> {
    let length = sequences.first().map_or(1, Vec::len);
    let pass = Pass { engine, length };
    let mut embedded = Vec::new();
    for tokens in sequences {
        let mut states = Vec::new();
        engine.embed(tokens, &mut states)?;
        embedded.extend(states);
    }
    let hidden = engine.model.hidden_size();
    // The input of each layer, and the output of the last.
    let mut streams = vec![embedded];
    for layer in &engine.model.layers {
        let mut stream = streams.last().cloned().unwrap_or_default();
        stream
            .par_chunks_exact_mut(length * hidden)
            .for_each(|sequence| engine.run_layer(layer, sequence, &mut ()));
        streams.push(stream);
    }
    let last = streams.pop().unwrap_or_default();
    let (mut statistics, mut gradient) = head(&pass, &last);
    for (index, weights) in engine.model.layers.iter().enumerate().rev() {
        let weights = decode_layer(weights);
        let (fisher, d_in) = pass.fisher(&weights, streams.pop().unwrap_or_default(), gradient);
        gradient = d_in;
        layer(index, &fisher)?;
    }
    statistics.embedded = mean_squares(&gradient, hidden);
    Ok(statistics)
}

/// The final norm and the lm_head, forward and backward, for the residual stream `stream`, [tokens, hidden].
/// Returns the statistics and the gradient of `stream`.
fn head(pass: &Pass<'_>, stream: &[f32]) -> (TableStatistics, Vec<f32>) {
    let (vocab, hidden) = (pass.engine.model.lm_head().rows(), pass.engine.model.hidden_size());
    let normed = pass.norm(stream, &pass.engine.model.norm);
    let mut logits = logits(pass.engine.isa, pass.engine.model.lm_head(), &normed);
    let mut random = Pcg64Mcg::seed_from_u64(SEED);
    let tokens = normed.len() / hidden;
    let draws: Vec<f64> = (0..tokens).map(|_| random.next_u64() as f64 / 2f64.powi(64)).collect();
    logits
        .par_chunks_exact_mut(vocab)
        .zip(draws)
        .for_each(|(logits, draw)| subtract_sampled_token(logits, draw));
    let d_normed = logits_backward(pass.engine.isa, pass.engine.model.lm_head(), &logits);
    let mut d_stream = vec![0.0; stream.len()];
    let mut d_norm = vec![0.0; hidden];
    pass.norm_backward(stream, &pass.engine.model.norm, &d_normed, &mut d_stream, &mut d_norm);
    let statistics = TableStatistics {
        embedded: Vec::new(),
        head_inputs: mean_squares(&normed, hidden),
        logits: mean_squares(&logits, vocab),
    };
    (statistics, d_stream)
}

/// The logits of the lm_head `weight` for `normed`, [tokens, hidden]: [tokens, vocab].
pub(crate) fn logits(isa: Isa, weight: &Weight, normed: &[f32]) -> Vec<f32> {
    let (vocab, hidden) = (weight.rows(), weight.cols());
    let mut logits = vec![0.0; normed.len() / hidden * vocab];
    let mut panels = Panels::default();
    for (from, rows) in row_chunks(weight) {
        panels.pack(&rows, hidden);
        let width = rows.len() / hidden;
        let part = product_of(isa, normed, hidden, &panels, width);
        for (logits, part) in logits.chunks_exact_mut(vocab).zip(part.chunks_exact(width)) {
            logits[from..from + width].copy_from_slice(part);
        }
    }
    logits
}

/// The gradient of the inputs of the lm_head `weight`, [tokens, hidden], given that of the logits,
/// [tokens, vocab].
pub(crate) fn logits_backward(isa: Isa, weight: &Weight, d_logits: &[f32]) -> Vec<f32> {
    let (vocab, hidden) = (weight.rows(), weight.cols());
    let mut d_normed = vec![0.0; d_logits.len() / vocab * hidden];
    let mut panels = Panels::default();
    for (from, rows) in row_chunks(weight) {
        let width = rows.len() / hidden;
        panels.pack_transposed(&rows, hidden, width, hidden);
        let part: Vec<f32> =
            d_logits.chunks_exact(vocab).flat_map(|g| &g[from..from + width]).copied().collect();
        let part = product_of(isa, &part, width, &panels, hidden);
        d_normed.iter_mut().zip(part).for_each(|(d, p)| *d += p);
    }
    d_normed
}

/// Decodes `weight` in chunks of rows: the index of the first row, and the values [rows, cols].
fn row_chunks(weight: &Weight) -> impl Iterator<Item = (usize, Vec<f32>)> {
    let (rows, cols) = (weight.rows(), weight.cols());
    (0..rows).step_by(HEAD_ROWS).map(move |from| {
        let mut values = vec![0.0; HEAD_ROWS.min(rows - from) * cols];
        values
            .par_chunks_exact_mut(cols)
            .enumerate()
            .for_each(|(i, row)| weight.view().decode_row(from + i, row));
        (from, values)
    })
}

/// Samples a token from the distribution of `logits` and replaces these by the gradient of −log p of that
/// token: the probabilities, less one at the token. `draw`, from 0 to 1, selects the token.
fn subtract_sampled_token(logits: &mut [f32], draw: f64) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter_mut().for_each(|l| *l = (*l - largest).exp());
    let sum: f64 = logits.iter().map(|l| f64::from(*l)).sum();
    let mut below = 0.0;
    let mut drawn = logits.len() - 1;
    for (i, l) in logits.iter().enumerate() {
        below += f64::from(*l);
        if below > draw * sum {
            drawn = i;
            break;
        }
    }
    logits.iter_mut().for_each(|l| *l = (f64::from(*l) / sum) as f32);
    logits[drawn] -= 1.0;
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use stb_format::arch::Linear;
    use stb_runtime::Checkpoint;

    use super::*;

    /// The KL divergence after noise on one linear layer: predicted and measured.
    #[test]
    fn fisher_diagonal_predicts_the_divergence() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
        let checkpoint = Checkpoint::open(&folder, true).unwrap();
        let mut engine = Engine::from_checkpoint(&checkpoint).unwrap();
        let text = "Once upon a time there was a little dog who liked to run in the big park. ";
        let tokens = engine.model.tokenizer().unwrap().encode_prompt(&text.repeat(12)).unwrap();
        let sequences = vec![tokens[..64].to_vec(), tokens[64..128].to_vec()];
        let (layer, linear) = (3, Linear::Down);
        let (mut fisher, mut inputs) = (Vec::new(), Vec::new());
        backpropagate(&engine, &sequences, |index, all| {
            if index == layer {
                fisher.clone_from(all.outputs.get(linear).unwrap());
                let cols = engine.model.layers[layer].linear(linear).cols();
                inputs = mean_squares(&all.inputs[linear.input()], cols);
            }
            Ok(())
        })
        .unwrap();

        let distributions = |engine: &Engine| -> Vec<Vec<f64>> {
            let mut all = Vec::new();
            for tokens in &sequences {
                let mut states = Vec::new();
                engine.embed(tokens, &mut states).unwrap();
                engine.model.layers.iter().for_each(|l| engine.run_layer(l, &mut states, &mut ()));
                let pass = Pass { engine, length: tokens.len() };
                let normed = pass.norm(&states, &engine.model.norm);
                let head = engine.model.lm_head().decode();
                for h in normed.chunks_exact(engine.model.hidden_size()) {
                    let dot = |w: &[f32]| -> f64 {
                        w.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum::<f64>()
                    };
                    let logits: Vec<f64> = head.chunks_exact(h.len()).map(dot).collect();
                    let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
                    all.push(logits.into_iter().map(|l| l - sum).collect());
                }
            }
            all
        };
        let before = distributions(&engine);
        let weight = engine.model.layers[layer].linear(linear);
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut values = weight.decode();
        let mut random = Pcg64Mcg::seed_from_u64(5);
        let mut expected = 0.0;
        for (row, gradient) in values.chunks_exact_mut(cols).zip(&fisher) {
            for (w, square) in row.iter_mut().zip(&inputs) {
                let change = 0.01 * (random.next_u64() as f64 / 2f64.powi(63) - 1.0);
                *w += change as f32;
                expected += 0.5 * f64::from(*gradient) * f64::from(*square) * change * change;
            }
        }
        let changed = Weight::from_floats(values, rows as u64, cols as u64).unwrap();
        *engine.model.layers[layer].linear_mut(linear) = changed;
        let after = distributions(&engine);
        let kl = |p: &Vec<f64>, q: &Vec<f64>| -> f64 {
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let found = before.iter().zip(&after).map(|(p, q)| kl(p, q)).sum::<f64>() / 128.0;
        // Gradients of 128 drawn tokens, and one draw of the noise.
        assert!((0.6..1.6).contains(&(found / expected)), "{found}, expected {expected}");
    }
}
