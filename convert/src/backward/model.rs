//! The backward pass of the whole model: how much the output distribution depends on the output of each linear
//! layer.
//!
//! The loss is −log p(y) with y drawn from the model's own distribution p. The mean squares of its gradients
//! are the diagonal of the Fisher information: a small change δ of an output changes the distribution by
//! KL ≈ ½ Σ E[g²] δ².

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use stb_runtime::Engine;

use super::head::{ModelHead, embedded_gradient, uncap};
use super::layer::{LayerFisher, Pass};
use super::matrix::decode_layer;
use crate::hessian::Hessian;

/// Seed for sampling the tokens y.
const SEED: u64 = 0;

/// Statistics that weigh errors of the embeddings and the lm_head.
pub(crate) struct TableStatistics {
    /// Twice the mean product with themselves of the gradients of the rows of the embeddings that the tokens select,
    /// `[embedding, embedding]`.
    pub embedded: Hessian,
    /// The Hessian of the inputs of the lm_head: twice their mean product with themselves, `[embedding, embedding]`.
    pub head_inputs: Hessian,
    /// The weights of rows in all tokens.
    pub rows: RowWeights,
    /// The same in the first and in the second half of the tokens: one tells how well the other predicts which rows matter.
    pub halves: [RowWeights; 2],
}

/// How much the rows of the embeddings and the lm_head matter.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowWeights {
    /// Mean squares of the gradients of the outputs of the lm_head, `[vocab]`: the mean of p (1 − p) of each token.
    pub logits: Vec<f32>,
    /// Frequencies of the tokens as inputs, `[vocab]`: the mean of those counted, and of the probabilities of the model,
    /// which also know tokens that do not occur.
    pub shares: Vec<f32>,
}

impl RowWeights {
    /// The mean of `a` and `b`, where `share` of all tokens are those of `a`.
    fn mean(share: f32, a: &Self, b: &Self) -> Self {
        let mean = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| share * a + (1.0 - share) * b).collect()
        };
        Self { logits: mean(&a.logits, &b.logits), shares: mean(&a.shares, &b.shares) }
    }

    /// Takes half of each share from the frequencies of `tokens`.
    fn count(&mut self, tokens: &[u32]) {
        self.shares.iter_mut().for_each(|share| *share /= 2.0);
        for token in tokens {
            self.shares[*token as usize] += 0.5 / tokens.len() as f32;
        }
    }
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
    let (mut statistics, mut gradient) = head_statistics(engine, &last);
    for (index, weights) in engine.model.layers.iter().enumerate().rev() {
        let weights = decode_layer(weights);
        let (fisher, d_in) = pass.fisher(&weights, streams.pop().unwrap_or_default(), gradient);
        gradient = d_in;
        layer(index, &fisher)?;
    }
    let width = engine.model.embeddings.cols();
    statistics.embedded = mean_products(engine, &embedded_gradient(engine, gradient), width);
    let tokens: Vec<u32> = sequences.iter().flatten().copied().collect();
    let middle = tokens.len() / 2;
    let [first, second] = &mut statistics.halves;
    first.count(&tokens[..middle]);
    second.count(&tokens[middle..]);
    let share = middle as f32 / tokens.len().max(1) as f32;
    statistics.rows = RowWeights::mean(share, first, second);
    Ok(statistics)
}

/// Last norm and lm_head, forward and backward, for the residual stream `stream`, [tokens, hidden]. Returns the
/// statistics and the gradient of `stream`.
fn head_statistics(engine: &Engine, stream: &[f32]) -> (TableStatistics, Vec<f32>) {
    let head = ModelHead::of(engine);
    let (vocab, width) = (head.lm_head.rows(), head.lm_head.cols());
    let inputs = head.inputs(stream);
    let mut logits = head.logits(&inputs);
    let slopes = head.cap_slopes(&logits);
    let mut random = Pcg64Mcg::seed_from_u64(SEED);
    let tokens = inputs.len() / width;
    let draws: Vec<f64> = (0..tokens).map(|_| random.next_u64() as f64 / 2f64.powi(64)).collect();
    logits
        .par_chunks_exact_mut(vocab)
        .zip(draws)
        .for_each(|(logits, draw)| subtract_sampled_token(logits, draw));
    let middle = tokens / 2 * vocab;
    let slopes_of = |range: std::ops::Range<usize>| slopes.as_deref().map(|s| &s[range]);
    let halves = [0..middle, middle..logits.len()]
        .map(|range| token_statistics(&logits[range.clone()], slopes_of(range), vocab));
    uncap(&mut logits, slopes);
    let (d_stream, _) = head.inputs_backward(stream, head.logits_backward(&logits));
    let head_inputs = mean_products(engine, &inputs, width);
    let embedded = Hessian::new(0);
    (TableStatistics { embedded, head_inputs, rows: RowWeights::default(), halves }, d_stream)
}

/// Twice the mean product with themselves of the rows of `x`, [tokens, width].
fn mean_products(engine: &Engine, x: &[f32], width: usize) -> Hessian {
    let mut products = Hessian::new(width);
    products.add(engine.isa, x);
    products.finish_tokens(x.len() / width);
    products
}

/// The mean of p, and of p (1 − p) times the squared slope of the soft cap, of each token of the vocabulary. `gradients`
/// is p − 1 for the sampled token of a row and p for the others, [tokens, vocab]. Both means have less noise than those
/// of samples.
fn token_statistics(gradients: &[f32], slopes: Option<&[f32]>, vocab: usize) -> RowWeights {
    let tokens = (gradients.len() / vocab).max(1) as f32;
    let column = |c: usize| {
        let (mut share, mut square) = (0.0, 0.0);
        for at in (c..gradients.len()).step_by(vocab) {
            let gradient = gradients[at];
            share += if gradient < 0.0 { 1.0 + gradient } else { gradient };
            let slope = slopes.map_or(1.0, |slopes| slopes[at]);
            square += gradient.abs() * (1.0 - gradient.abs()) * slope * slope;
        }
        (share / tokens, square / tokens)
    };
    let (shares, logits) = (0..vocab).into_par_iter().map(column).unzip();
    RowWeights { logits, shares }
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
    use stb_runtime::{Checkpoint, LayerMatrix, Weight};

    use super::*;
    use crate::backward::layer::mean_squares;

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
                fisher.clone_from(all.outputs_of(LayerMatrix::Linear(linear)).unwrap());
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
                let normed = ModelHead::of(engine).inputs(&states);
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
