//! Perplexity, and KL divergence from a reference model on the same tokens.
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

/// Options of [`perplexity`].
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// Tokens per window.
    pub context: usize,
    /// The largest number of windows to use; `None` for all.
    pub windows: Option<usize>,
    /// The layout of the text.
    pub layout: TextLayout,
}

/// The result of [`perplexity`].
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// exp of `nll`. Its standard error is that of `nll` times the perplexity.
    pub perplexity: Estimate,
    /// The mean over windows of their mean loss, in nats per token.
    pub nll: Estimate,
    /// The number of tokens of the whole text.
    pub tokens: usize,
    /// The number of windows used.
    pub windows: usize,
    /// Tokens per window.
    pub context: usize,
    /// The comparison with the reference, if there is one.
    pub divergence: Option<Divergence>,
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

    fn divide(self, count: f64) -> Self {
        Self {
            nll: self.nll / count,
            reference_nll: self.reference_nll / count,
            kl: self.kl / count,
            agree: self.agree / count,
        }
    }
}

/// Measures the perplexity of a model on `text` and compares it with `reference`.
/// `progress(done, total)` is called after each window.
///
/// Windows are computed in pieces, so that only the logits of one piece are in memory, besides those
/// that [`Reference::kept`] holds.
///
/// # Errors
/// [`Error::Usage`] if the text is shorter than one window or a window than 2 tokens;
/// [`Error::Invalid`] if the vocabularies or tokenizers differ, or logits are not finite;
/// [`Error::Device`] if the device fails.
pub fn perplexity(
    engine: &Engine,
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
        same_tokens(engine, reference.engine, text, options, &tokens)?;
    }
    let windows: Vec<&[u32]> = tokens.chunks_exact(context).take(count).collect();
    let done = std::sync::atomic::AtomicUsize::new(0);
    let small = is_small(engine) && reference.is_none_or(|r| is_small(r.engine));
    let measure = |window: &&[u32]| {
        let found = match reference {
            None => window_loss(engine, window, small),
            Some(reference) => window_divergence(engine, reference, window, small),
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

/// exp of an estimate. The standard error is propagated to first order.
fn exponential(loss: Estimate) -> Estimate {
    let value = loss.value.exp();
    Estimate { value, standard_error: value * loss.standard_error }
}

/// Checks that both models split the text into the same tokens, because they are compared token by
/// token.
fn same_tokens(
    engine: &Engine,
    reference: &Engine,
    text: &str,
    options: &PerplexityOptions,
    tokens: &[u32],
) -> Result<()> {
    let (own, other) = (engine.model.embeddings.rows(), reference.model.embeddings.rows());
    if own != other {
        return Err(Error::invalid(format!(
            "{} has {own} tokens and the reference {} has {other}: they cannot be compared",
            engine.model.source.display(),
            reference.model.source.display()
        )));
    }
    if options.layout.tokenize(&reference.model.tokenizer()?, text)? != tokens {
        return Err(Error::invalid(format!(
            "the reference {} has another tokenizer than {}: they cannot be compared",
            reference.model.source.display(),
            engine.model.source.display()
        )));
    }
    Ok(())
}

/// The mean loss of the tokens of a window after the first.
fn window_loss(engine: &Engine, window: &[u32], serial: bool) -> Result<WindowLosses> {
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
fn window_divergence(
    engine: &Engine,
    reference: Reference<'_>,
    window: &[u32],
    serial: bool,
) -> Result<WindowLosses> {
    let vocab = engine.model.embeddings.rows();
    let mut state = State::new(engine, window.len());
    let mut reference = reference.begin(window);
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
/// most 64 MiB. No piece is a single token, because single tokens use other kernels.
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
