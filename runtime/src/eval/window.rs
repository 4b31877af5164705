//! Losses of a model on one window of tokens, and its comparison with another model there.

use rayon::prelude::*;

use super::distribution::Distribution;
use super::estimate::Estimate;
use super::open::is_small;
use crate::engine::Engine;
use crate::error::Result;
use crate::state::State;

/// Logits that are computed together take at most this many bytes, if they are those of more than 32 tokens.
pub const PIECE_BYTES: u64 = 64 << 20;

/// Means over the predicted tokens of one window: all but the first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WindowLosses {
    /// Loss of the model, in nats.
    pub nll: f64,
    /// Loss of the reference, in nats.
    pub reference_nll: f64,
    /// KL(reference ‖ model), in nats.
    pub kl: f64,
    /// Share of tokens for which both models have the same most likely prediction.
    pub agree: f64,
}

impl WindowLosses {
    fn add(&mut self, other: Self) {
        self.nll += other.nll;
        self.reference_nll += other.reference_nll;
        self.kl += other.kl;
        self.agree += other.agree;
    }

    fn divide(self, count: f64) -> Self {
        Self {
            nll: self.nll / count,
            reference_nll: self.reference_nll / count,
            kl: self.kl / count,
            agree: self.agree / count,
        }
    }

    /// The perplexity of the model on `windows`.
    #[must_use]
    pub fn perplexity(windows: &[Self]) -> Estimate {
        exponential(Estimate::of(windows.iter().map(|w| w.nll)))
    }
}

/// The comparison of a model with a reference on the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// The perplexity of the reference.
    pub reference_perplexity: Estimate,
    /// Mean over predicted tokens of KL(reference ‖ model), in nats.
    pub kl: Estimate,
    /// Fraction of predicted tokens for which both models have the same most likely token.
    pub top1: Estimate,
    /// Loss of the model minus loss of the reference, in nats per token. Its standard error is far
    /// below the error of either loss, because both models see the same windows.
    pub nll_difference: Estimate,
}

impl Divergence {
    /// The means over `windows`.
    #[must_use]
    pub fn of(windows: &[WindowLosses]) -> Self {
        let estimate = |f: fn(&WindowLosses) -> f64| Estimate::of(windows.iter().map(f));
        Self {
            reference_perplexity: exponential(estimate(|w| w.reference_nll)),
            kl: estimate(|w| w.kl),
            top1: estimate(|w| w.agree),
            nll_difference: estimate(|w| w.nll - w.reference_nll),
        }
    }
}

/// exp of an estimate. The standard error is propagated to first order.
pub(super) fn exponential(loss: Estimate) -> Estimate {
    let value = loss.value.exp();
    Estimate { value, standard_error: value * loss.standard_error }
}

/// The logits of a reference model on one window, piece by piece.
pub trait WindowLogits {
    /// The logits after each of the next `tokens` tokens of `window`, [tokens, vocab].
    ///
    /// # Errors
    /// Those of the model.
    fn next(&mut self, window: &[u32], tokens: usize) -> Result<&[f32]>;
}

/// Compares `engine` with a reference on each of `windows`; `begin` starts the reference on the window of that index.
/// Small models compute one window per thread.
///
/// # Errors
/// [`crate::Error::Invalid`] if logits are not finite; those of [`WindowLogits::next`] and [`Engine::forward_all`].
pub fn compare_windows<L: WindowLogits>(
    engine: &Engine,
    windows: &[Vec<u32>],
    begin: impl Fn(usize) -> L + Sync,
) -> Result<Vec<WindowLosses>> {
    let small = is_small(engine);
    let compare =
        |(i, window): (usize, &Vec<u32>)| window_divergence(engine, &mut begin(i), window, small);
    match small {
        true => windows.par_iter().enumerate().map(compare).collect(),
        false => windows.iter().enumerate().map(compare).collect(),
    }
}

/// The mean loss of the tokens of a window after the first.
pub(super) fn window_loss(engine: &Engine, window: &[u32], serial: bool) -> Result<WindowLosses> {
    let mut state = State::new(engine, window.len());
    let vocab = engine.model.embeddings.rows();
    let mut sum = Ok(WindowLosses::default());
    engine.forward_all(&mut state, window, |first, logits| {
        let row = |i: usize| match window.get(first + i + 1) {
            None => Ok(WindowLosses::default()),
            Some(target) => {
                let found = Distribution::new(&logits[i * vocab..(i + 1) * vocab])?;
                Ok(WindowLosses { nll: -found.log_probability(*target), ..WindowLosses::default() })
            }
        };
        accumulate(&mut sum, logits.len() / vocab, serial, row);
    })?;
    Ok(sum?.divide((window.len() - 1) as f64))
}

/// The mean losses and the comparison on one window. It is computed in pieces, so that the logits of
/// the reference for the whole window need not be in memory.
pub(super) fn window_divergence(
    engine: &Engine,
    reference: &mut impl WindowLogits,
    window: &[u32],
    serial: bool,
) -> Result<WindowLosses> {
    let vocab = engine.model.embeddings.rows();
    let mut state = State::new(engine, window.len());
    let mut sum = Ok(WindowLosses::default());
    let mut start = 0;
    for piece in pieces(window, vocab) {
        let expected = reference.next(window, piece.len())?;
        engine.forward_all(&mut state, piece, |first, logits| {
            let row = |i: usize| match window.get(start + first + i + 1) {
                None => Ok(WindowLosses::default()),
                Some(target) => {
                    let row = (first + i) * vocab..(first + i + 1) * vocab;
                    let expected = Distribution::new(&expected[row])?;
                    compare(&expected, &logits[i * vocab..(i + 1) * vocab], *target)
                }
            };
            accumulate(&mut sum, logits.len() / vocab, serial, row);
        })?;
        start += piece.len();
    }
    Ok(sum?.divide((window.len() - 1) as f64))
}

fn compare(expected: &Distribution<'_>, logits: &[f32], target: u32) -> Result<WindowLosses> {
    let found = Distribution::new(logits)?;
    Ok(WindowLosses {
        nll: -found.log_probability(target),
        reference_nll: -expected.log_probability(target),
        kl: expected.divergence(&found),
        agree: f64::from(u8::from(expected.best() == found.best())),
    })
}

/// Adds the results of `row` for `0..rows` to `sum` in order, or stores the first error.
fn accumulate(
    sum: &mut Result<WindowLosses>,
    rows: usize,
    serial: bool,
    row: impl Fn(usize) -> Result<WindowLosses> + Send + Sync,
) {
    let Ok(so_far) = sum else { return };
    let rows: Result<Vec<WindowLosses>> = match serial {
        true => (0..rows).map(row).collect(),
        false => (0..rows).into_par_iter().map(row).collect(),
    };
    match rows {
        Ok(rows) => rows.into_iter().for_each(|row| so_far.add(row)),
        Err(e) => *sum = Err(e),
    }
}

/// Splits a window into nearly equal pieces. Each has up to 32 tokens, or more if their logits take at
/// most [`PIECE_BYTES`]. No piece is a single token, because single tokens use other kernels.
fn pieces(window: &[u32], vocab: usize) -> impl Iterator<Item = &[u32]> {
    let most = (PIECE_BYTES as usize / (4 * vocab)).max(32);
    let count = window.len().div_ceil(most);
    let cut = move |i: usize| window.len() * i / count;
    (0..count).map(move |i| &window[cut(i)..cut(i + 1)])
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn pieces_make_up_the_window() {
        for (length, vocab) in [(2, 100), (256, 105), (2048, 128_256), (33, 1 << 24), (65, 1 << 24)]
        {
            let window: Vec<u32> = (0..length).collect();
            let parts: Vec<&[u32]> = pieces(&window, vocab).collect();
            assert_eq!(parts.concat(), window);
            let most = (1 << 24) / vocab;
            assert!(parts.iter().all(|p| p.len() >= 2 && p.len() <= most.max(32)), "{length}");
        }
    }
}
