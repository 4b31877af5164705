//! Perplexity, and the distance to a reference model on the same tokens.
//!
//! Protocol: the text is tokenized once ([`TextLayout`]) and cut into windows of equal length that do not
//! overlap. An incomplete last window is dropped. No begin token is put before a window. The loss of a
//! window is the mean over its tokens after the first; perplexity is exp of the mean over windows.
//! Standard errors are over windows, since the tokens of a window depend on each other.

use rayon::prelude::*;

use super::distribution::Distribution;
use super::estimate::Estimate;
use super::open::is_small;
use super::reference::Reference;
use super::text::TextLayout;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::state::State;
use crate::tokenizer::Tokenizer;

/// How a text is cut and read.
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// Tokens per window; windows do not overlap, an incomplete last one is dropped.
    pub context: usize,
    /// The most windows to use; `None` for all.
    pub windows: Option<usize>,
    /// What the text consists of.
    pub layout: TextLayout,
}

/// A perplexity, and how it was measured.
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// exp of the mean over windows of the mean loss of their predicted tokens. The error is that
    /// of the mean loss times the perplexity.
    pub perplexity: Estimate,
    /// The mean loss in nats per token.
    pub nll: Estimate,
    /// Tokens of the whole text.
    pub tokens: usize,
    /// Windows used.
    pub windows: usize,
    /// Tokens per window.
    pub context: usize,
    /// The distance to the reference, if there is one.
    pub divergence: Option<Divergence>,
}

/// How far a model is from a reference on the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// The perplexity of the reference.
    pub reference_perplexity: Estimate,
    /// Mean over predicted tokens of KL(reference ‖ model), in nats.
    pub kl: Estimate,
    /// Share of predicted tokens for which both models have the same most likely token.
    pub top1: Estimate,
    /// Loss of the model minus loss of the reference, in nats per token. Its error is far below
    /// that of either, because both see the same windows.
    pub nll_difference: Estimate,
}

/// Means over the predicted tokens of one window.
#[derive(Clone, Copy, Default)]
struct WindowLosses {
    nll: f64,
    reference_nll: f64,
    kl: f64,
    agree: f64,
}

impl WindowLosses {
    fn add(&mut self, other: Self) {
        self.nll += other.nll;
        self.reference_nll += other.reference_nll;
        self.kl += other.kl;
        self.agree += other.agree;
    }

    fn divide(self, by: f64) -> Self {
        Self {
            nll: self.nll / by,
            reference_nll: self.reference_nll / by,
            kl: self.kl / by,
            agree: self.agree / by,
        }
    }
}

/// Measures the perplexity of `model` on `text` and its distance to `reference`. `progress` is
/// called with windows done and all.
///
/// At most the logits of one piece of a window are in memory, besides what the reference keeps.
///
/// # Errors
/// [`Error::Usage`] if the text is shorter than one window; [`Error::Invalid`] if the models do not
/// have the same tokens, or compute logits that are not finite.
pub fn perplexity(
    model: &Engine,
    reference: Option<Reference<'_>>,
    tokenizer: &Tokenizer,
    text: &str,
    options: &PerplexityOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Perplexity> {
    let context = options.context;
    if context < 2 {
        return Err(Error::usage("a window needs at least 2 tokens"));
    }
    let tokens = options.layout.tokenize(tokenizer, text)?;
    let count = (tokens.len() / context).min(options.windows.unwrap_or(usize::MAX));
    if count == 0 {
        return Err(Error::usage(format!(
            "the text has {} tokens, one window needs {context}: give a longer text or a smaller \
             --ctx",
            tokens.len()
        )));
    }
    if let Some(reference) = reference {
        same_tokens(model, reference.model, text, options, &tokens)?;
    }
    let windows: Vec<&[u32]> = tokens.chunks_exact(context).take(count).collect();
    let done = std::sync::atomic::AtomicUsize::new(0);
    let small = is_small(model) && reference.is_none_or(|r| is_small(r.model));
    let measure = |window: &&[u32]| {
        let found = match reference {
            None => window_loss(model, window, small),
            Some(reference) => window_divergence(model, reference, window, small),
        };
        progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, count);
        found
    };
    let found: Vec<WindowLosses> = if small {
        windows.par_iter().map(measure).collect::<Result<_>>()?
    } else {
        windows.iter().map(measure).collect::<Result<_>>()?
    };
    let estimate = |f: fn(&WindowLosses) -> f64| Estimate::of(found.iter().map(f));
    let nll = estimate(|w| w.nll);
    let divergence = reference.map(|_| Divergence {
        reference_perplexity: exponential(estimate(|w| w.reference_nll)),
        kl: estimate(|w| w.kl),
        top1: estimate(|w| w.agree),
        nll_difference: estimate(|w| w.nll - w.reference_nll),
    });
    Ok(Perplexity {
        perplexity: exponential(nll),
        nll,
        tokens: tokens.len(),
        windows: count,
        context,
        divergence,
    })
}

/// exp, with the error to first order.
fn exponential(loss: Estimate) -> Estimate {
    let value = loss.value.exp();
    Estimate { value, standard_error: value * loss.standard_error }
}

/// Checks that both models have the same tokens for the text, since they are compared token by token.
fn same_tokens(
    model: &Engine,
    reference: &Engine,
    text: &str,
    options: &PerplexityOptions,
    tokens: &[u32],
) -> Result<()> {
    let (own, other) = (model.embeddings.rows(), reference.embeddings.rows());
    if own != other {
        return Err(Error::invalid(format!(
            "{} has {own} tokens and the reference {} has {other}: they cannot be compared",
            model.source.display(),
            reference.source.display()
        )));
    }
    if options.layout.tokenize(&reference.tokenizer()?, text)? != tokens {
        return Err(Error::invalid(format!(
            "the reference {} has another tokenizer than {}: they cannot be compared",
            reference.source.display(),
            model.source.display()
        )));
    }
    Ok(())
}

/// The mean loss of the tokens after the first.
fn window_loss(model: &Engine, window: &[u32], serial: bool) -> Result<WindowLosses> {
    let mut state = State::new(model, window.len());
    let vocab = model.embeddings.rows();
    let mut sum = Ok(WindowLosses::default());
    model.forward_all(&mut state, window, |first, logits| {
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

/// The losses of both models and their distance, piece by piece, so that the logits of the
/// reference for a whole window need not be in memory.
fn window_divergence(
    model: &Engine,
    reference: Reference<'_>,
    window: &[u32],
    serial: bool,
) -> Result<WindowLosses> {
    let vocab = model.embeddings.rows();
    let mut state = State::new(model, window.len());
    let mut reference = reference.begin(window);
    let mut sum = Ok(WindowLosses::default());
    let mut start = 0;
    for piece in pieces(window, vocab) {
        let expected = reference.next(window, piece.len())?;
        model.forward_all(&mut state, piece, |first, logits| {
            let row = |i: usize| match window.get(start + first + i + 1) {
                None => Ok(WindowLosses::default()),
                Some(target) => {
                    let place = (first + i) * vocab..(first + i + 1) * vocab;
                    let expected = Distribution::new(&expected[place])?;
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

/// Adds `rows` results to `sum` in their order, or keeps the first error.
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

/// Equal pieces of a window whose logits take at most 64 MiB, but at least 32 tokens each. No piece is a
/// single token: single tokens take another path through the model.
fn pieces(window: &[u32], vocab: usize) -> impl Iterator<Item = &[u32]> {
    const BYTES: usize = 64 << 20;
    let most = (BYTES / (4 * vocab)).max(32);
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
