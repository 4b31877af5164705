//! Perplexity: how well a model predicts a text, by the protocol of the literature.

use rayon::prelude::*;
use stb_kernels::ops;

use crate::error::{Error, Result};
use crate::forward::State;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// How a text is cut and read.
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// Tokens per window; windows do not overlap, an incomplete last one is dropped.
    pub context: usize,
    /// The most windows to use; `None` for all.
    pub windows: Option<usize>,
    /// If set, the text is split here into documents, each trimmed and started with the begin
    /// token; otherwise the whole text is one document.
    pub separator: Option<String>,
}

/// A perplexity with what it was measured on.
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// exp of the mean over windows of the mean loss of their predicted tokens.
    pub perplexity: f64,
    /// The mean loss in nats per token.
    pub mean_nll: f64,
    /// Standard error of the mean loss over windows.
    pub standard_error: f64,
    /// Tokens of the whole text.
    pub tokens: usize,
    /// Windows used.
    pub windows: usize,
    /// Tokens per window.
    pub context: usize,
}

/// Models below this size are so fast that whole windows are the better unit for threads.
const SMALL_MODEL: u64 = 50_000_000;

/// Measures the perplexity of `model` on `text`. `progress` is called with windows done and all.
///
/// # Errors
/// [`Error::Usage`] if the text is shorter than one window.
pub fn perplexity(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &str,
    options: &PerplexityOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Perplexity> {
    let context = options.context;
    if context < 2 {
        return Err(Error::usage("a window needs at least 2 tokens"));
    }
    let tokens = tokenize(tokenizer, text, options.separator.as_deref())?;
    let count = (tokens.len() / context).min(options.windows.unwrap_or(usize::MAX));
    if count == 0 {
        return Err(Error::usage(format!(
            "the text has {} tokens, one window needs {context}: give a longer text or a smaller \
             --ctx",
            tokens.len()
        )));
    }
    let windows: Vec<&[u32]> = tokens.chunks_exact(context).take(count).collect();
    let done = std::sync::atomic::AtomicUsize::new(0);
    let measure = |window: &&[u32]| {
        let loss = window_loss(model, window);
        progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, count);
        loss
    };
    let losses: Vec<f64> = if model.parameters() < SMALL_MODEL {
        windows.par_iter().map(measure).collect::<Result<_>>()?
    } else {
        windows.iter().map(measure).collect::<Result<_>>()?
    };
    let n = count as f64;
    let mean_nll = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|l| (l - mean_nll).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Ok(Perplexity {
        perplexity: mean_nll.exp(),
        mean_nll,
        standard_error: (variance / n).sqrt(),
        tokens: tokens.len(),
        windows: count,
        context,
    })
}

/// All tokens of a text, or of its documents one after another.
fn tokenize(tokenizer: &Tokenizer, text: &str, separator: Option<&str>) -> Result<Vec<u32>> {
    let Some(separator) = separator.filter(|s| !s.is_empty()) else {
        return tokenizer.encode_prompt(text);
    };
    let documents: Vec<&str> =
        text.split(separator).map(str::trim).filter(|d| !d.is_empty()).collect();
    let ids: Vec<Vec<u32>> =
        documents.par_iter().map(|d| tokenizer.encode_prompt(d)).collect::<Result<_>>()?;
    Ok(ids.concat())
}

/// The mean loss of the tokens after the first.
fn window_loss(model: &Model, window: &[u32]) -> Result<f64> {
    let mut state = State::new(model, window.len());
    let vocab = model.embeddings.rows();
    let mut sum = 0.0;
    model.forward_all(&mut state, window, |first, logits| {
        for (i, logits) in logits.chunks_exact(vocab).enumerate() {
            if let Some(target) = window.get(first + i + 1) {
                let logit = f64::from(logits[*target as usize]);
                sum += f64::from(ops::log_sum_exp(model.isa, logits)) - logit;
            }
        }
    })?;
    Ok(sum / (window.len() - 1) as f64)
}
