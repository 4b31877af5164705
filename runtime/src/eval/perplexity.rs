//! Perplexity, and KL divergence from a reference model on the same tokens.
//!
//! Protocol: the text is tokenized once ([`TextLayout`]) and cut into windows of equal length that do not
//! overlap. An incomplete last window is dropped. No begin token is put before a window. The loss of a
//! window is the mean over its tokens after the first; perplexity is exp of the mean over windows.
//! Standard errors are over windows, since the tokens of a window depend on each other.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::estimate::Estimate;
use super::open::is_small;
use super::reference::Reference;
use super::text::TextLayout;
use super::window::{Divergence, WindowLosses, exponential, window_divergence, window_loss};
use crate::engine::Engine;
use crate::error::{Error, Result};
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

/// Measures the perplexity of a model on `text` and compares it with `reference`.
/// `progress(done, total)` is called after each window; `Break` stops the evaluation.
///
/// Windows are computed in pieces, so that only the logits of one piece are in memory, besides those
/// that [`Reference::kept`] holds.
///
/// # Errors
/// [`Error::Usage`] if the text is shorter than one window or a window than 2 tokens;
/// [`Error::Invalid`] if the vocabularies or tokenizers differ, or logits are not finite;
/// [`Error::Device`] if the device fails; [`Error::Interrupted`] if `progress` stops the evaluation.
pub fn perplexity(
    engine: &Engine,
    reference: Option<Reference<'_>>,
    tokenizer: &Tokenizer,
    text: &str,
    options: &PerplexityOptions,
    progress: &(dyn Fn(usize, usize) -> ControlFlow<()> + Sync),
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
            Some(reference) => {
                window_divergence(engine, &mut reference.begin(window), window, small)
            }
        };
        let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        match progress(done, count) {
            ControlFlow::Continue(()) => found,
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    };
    let found: Vec<WindowLosses> = if small {
        windows.par_iter().map(measure).collect::<Result<_>>()?
    } else {
        windows.iter().map(measure).collect::<Result<_>>()?
    };
    let nll = Estimate::of(found.iter().map(|w| w.nll));
    let divergence = reference.map(|_| Divergence::of(&found));
    Ok(Perplexity {
        perplexity: exponential(nll),
        nll,
        tokens: tokens.len(),
        windows: count,
        context,
        divergence,
    })
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
