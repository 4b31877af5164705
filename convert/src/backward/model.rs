//! The whole model backward: how much what it says depends on the output of each linear layer.
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

/// Rows of the head that are unpacked at a time.
const HEAD_ROWS: usize = 4096;
/// Seed of the draws.
const SEED: u64 = 0;

/// What the embeddings and the head meet.
pub(crate) struct Ends {
    /// Mean squares of the gradients of the embedded tokens, `[hidden]`.
    pub embedded: Vec<f32>,
    /// Mean squares of the inputs of the head, `[hidden]`.
    pub head_inputs: Vec<f32>,
    /// Mean squares of the gradients of the logits, `[vocab]`.
    pub logits: Vec<f32>,
}

/// Runs sequences of one length through the dense model and back; `layer` sees the decoder layers from
/// the last to the first.
pub(crate) fn through(
    engine: &Engine,
    sequences: &[Vec<u32>],
    mut layer: impl FnMut(usize, &LayerFisher) -> anyhow::Result<()>,
) -> anyhow::Result<Ends> {
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
    let (mut ends, mut gradient) = head(&pass, &last);
    for (index, of) in engine.model.layers.iter().enumerate().rev() {
        let weights = decode_layer(of);
        let (fisher, before) = pass.fisher(&weights, streams.pop().unwrap_or_default(), gradient);
        gradient = before;
        layer(index, &fisher)?;
    }
    ends.embedded = mean_squares(&gradient, hidden);
    Ok(ends)
}

/// The last norm and the head for `stream`, [tokens, hidden], and the gradient of that.
fn head(pass: &Pass<'_>, stream: &[f32]) -> (Ends, Vec<f32>) {
    let (vocab, hidden) = (pass.engine.lm_head().rows(), pass.engine.model.hidden_size());
    let normed = pass.norm(stream, &pass.engine.model.norm);
    let mut logits = logits(pass.engine.isa, pass.engine.lm_head(), &normed);
    let mut random = Pcg64Mcg::seed_from_u64(SEED);
    let tokens = normed.len() / hidden;
    let draws: Vec<f64> = (0..tokens).map(|_| random.next_u64() as f64 / 2f64.powi(64)).collect();
    logits
        .par_chunks_exact_mut(vocab)
        .zip(draws)
        .for_each(|(logits, draw)| less_a_draw(logits, draw));
    let d_normed = logits_back(pass.engine.isa, pass.engine.lm_head(), &logits);
    let mut d_stream = vec![0.0; stream.len()];
    let mut d_norm = vec![0.0; hidden];
    pass.norm_back(stream, &pass.engine.model.norm, &d_normed, &mut d_stream, &mut d_norm);
    let ends = Ends {
        embedded: Vec::new(),
        head_inputs: mean_squares(&normed, hidden),
        logits: mean_squares(&logits, vocab),
    };
    (ends, d_stream)
}

/// What the head `weight` makes of `normed`, [tokens, hidden]: [tokens, vocab].
pub(crate) fn logits(isa: Isa, weight: &Weight, normed: &[f32]) -> Vec<f32> {
    let (vocab, hidden) = (weight.rows(), weight.cols());
    let mut logits = vec![0.0; normed.len() / hidden * vocab];
    let mut panels = Panels::default();
    for (from, rows) in chunks(weight) {
        panels.pack(&rows, hidden);
        let width = rows.len() / hidden;
        let part = product_of(isa, normed, hidden, &panels, width);
        for (logits, part) in logits.chunks_exact_mut(vocab).zip(part.chunks_exact(width)) {
            logits[from..from + width].copy_from_slice(part);
        }
    }
    logits
}

/// From the gradient with respect to logits, [tokens, vocab], to that of the inputs of the head `weight`,
/// [tokens, hidden].
pub(crate) fn logits_back(isa: Isa, weight: &Weight, d_logits: &[f32]) -> Vec<f32> {
    let (vocab, hidden) = (weight.rows(), weight.cols());
    let mut d_normed = vec![0.0; d_logits.len() / vocab * hidden];
    let mut panels = Panels::default();
    for (from, rows) in chunks(weight) {
        let width = rows.len() / hidden;
        panels.pack_transposed(&rows, hidden, width, hidden);
        let part: Vec<f32> =
            d_logits.chunks_exact(vocab).flat_map(|g| &g[from..from + width]).copied().collect();
        let part = product_of(isa, &part, width, &panels, hidden);
        d_normed.iter_mut().zip(part).for_each(|(d, p)| *d += p);
    }
    d_normed
}

/// Some rows at a time: the first, and [rows, cols].
fn chunks(weight: &Weight) -> impl Iterator<Item = (usize, Vec<f32>)> {
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

/// Logits to probabilities, less one for the token whose share of the distribution holds `draw`, from 0
/// to 1: the gradient of −log p of that token.
fn less_a_draw(logits: &mut [f32], draw: f64) {
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

    /// KL of small changes of one linear layer's output, as expected and as it is.
    #[test]
    fn slopes_foretell_what_noise_does() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
        let checkpoint = Checkpoint::open(&folder, true).unwrap();
        let mut engine = Engine::from_checkpoint(&checkpoint).unwrap();
        let text = "Once upon a time there was a little dog who liked to run in the big park. ";
        let tokens = engine.tokenizer().unwrap().encode_prompt(&text.repeat(12)).unwrap();
        let sequences = vec![tokens[..64].to_vec(), tokens[64..128].to_vec()];
        let (of, linear) = (3, Linear::Down);
        let (mut slopes, mut inputs) = (Vec::new(), Vec::new());
        through(&engine, &sequences, |index, all| {
            if index == of {
                slopes.clone_from(all.outputs.get(linear).unwrap());
                let cols = engine.model.layers[of].linear(linear).cols();
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
                let head = engine.lm_head().decode();
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
        let weight = engine.model.layers[of].linear(linear);
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut values = weight.decode();
        let mut random = Pcg64Mcg::seed_from_u64(5);
        let mut expected = 0.0;
        for (row, slope) in values.chunks_exact_mut(cols).zip(&slopes) {
            for (w, square) in row.iter_mut().zip(&inputs) {
                let change = 0.01 * (random.next_u64() as f64 / 2f64.powi(63) - 1.0);
                *w += change as f32;
                expected += 0.5 * f64::from(*slope) * f64::from(*square) * change * change;
            }
        }
        let changed = Weight::from_floats(values, rows as u64, cols as u64).unwrap();
        *engine.model.layers[of].linear_mut(linear) = changed;
        let after = distributions(&engine);
        let kl = |p: &Vec<f64>, q: &Vec<f64>| -> f64 {
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let found = before.iter().zip(&after).map(|(p, q)| kl(p, q)).sum::<f64>() / 128.0;
        // Gradients of 128 drawn tokens, and one draw of the noise.
        assert!((0.6..1.6).contains(&(found / expected)), "{found}, expected {expected}");
    }
}
