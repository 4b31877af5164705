//! `Model.perplexity()` and its results.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;
use stb_runtime::{
    Estimate, OpenOptions, PerplexityOptions, Reference, Result, TextLayout, default_threads,
    open_to_measure, perplexity as measure, read_text,
};

use crate::errors::exception;
use crate::loaded::Loaded;
use crate::options::Options;
use crate::waiting::{pool, run};

/// The result of ``Model.perplexity()``. Standard errors are over windows; they are None for a single window.
#[pyclass(frozen, get_all, module = "stb")]
pub(crate) struct Perplexity {
    /// exp of ``mean_nll``.
    perplexity: f64,
    /// One standard error.
    perplexity_standard_error: Option<f64>,
    /// The mean over windows of their mean loss, in nats per token.
    mean_nll: f64,
    /// One standard error of ``mean_nll``.
    standard_error: Option<f64>,
    /// Tokens of the whole text.
    tokens: usize,
    /// Windows used.
    windows: usize,
    /// Tokens per window.
    context: usize,
    /// The comparison with the reference, if there is one.
    reference: Option<Py<Divergence>>,
}

/// The comparison of a model with a reference on the same tokens.
#[pyclass(frozen, get_all, module = "stb")]
pub(crate) struct Divergence {
    /// The perplexity of the reference.
    perplexity: f64,
    /// One standard error.
    perplexity_standard_error: Option<f64>,
    /// Loss of the model minus loss of the reference, in nats per token.
    nll_difference: f64,
    /// One standard error.
    nll_difference_standard_error: Option<f64>,
    /// KL divergence of the model from the reference, in nats per token.
    kl: f64,
    /// One standard error.
    kl_standard_error: Option<f64>,
    /// Share of tokens for which both models have the same most likely prediction.
    top1: f64,
    /// One standard error.
    top1_standard_error: Option<f64>,
}

#[pymethods]
impl Perplexity {
    fn __repr__(&self) -> String {
        let Self { perplexity, windows, context, .. } = self;
        format!("<stb.Perplexity {perplexity:.4} on {windows} windows of {context} tokens>")
    }
}

#[pymethods]
impl Divergence {
    fn __repr__(&self) -> String {
        format!("<stb.Divergence {:.5} nats per token>", self.kl)
    }
}

impl Divergence {
    fn of(found: &stb_runtime::Divergence) -> Self {
        Self {
            perplexity: found.reference_perplexity.value,
            perplexity_standard_error: error(found.reference_perplexity),
            nll_difference: found.nll_difference.value,
            nll_difference_standard_error: error(found.nll_difference),
            kl: found.kl.value,
            kl_standard_error: error(found.kl),
            top1: found.top1.value,
            top1_standard_error: error(found.top1),
        }
    }
}

/// The standard error; `None` if it is unknown.
fn error(estimate: Estimate) -> Option<f64> {
    Some(estimate.standard_error).filter(|error| !error.is_nan())
}

/// The arguments of a measurement.
struct Measurement<'a> {
    model: &'a Path,
    reference: Option<&'a Path>,
    text: &'a str,
    threads: usize,
    options: PerplexityOptions,
}

/// Measures the perplexity of a model.
pub(crate) fn perplexity(
    py: Python<'_>,
    loaded: &Loaded,
    text: &Bound<'_, PyAny>,
    given: Options<'_>,
) -> PyResult<Perplexity> {
    let context = given.take::<usize>("context")?;
    let windows = given.take::<usize>("windows")?;
    let reference: Option<PathBuf> = given.take("reference")?;
    let separator: Option<String> = given.take("separator")?;
    let rows = given.take("rows")?.unwrap_or(false);
    let threads = given.take::<u16>("threads")?.map(usize::from).or(loaded.options.threads);
    let progress: Option<Py<PyAny>> = given.take("progress")?;
    given.finish()?;
    let (text, file) = match text.extract::<String>() {
        Ok(text) => (text, None),
        Err(_) => {
            let path: PathBuf = text.extract()?;
            let text = py.detach(|| read_text(&path)).map_err(|e| exception(&e))?;
            (text, Some(path))
        }
    };
    let layout = TextLayout::of(file.as_deref(), separator.as_deref(), rows);
    let measurement = Measurement {
        model: &loaded.file.path,
        reference: reference.as_deref(),
        text: &text,
        threads: threads.unwrap_or_else(default_threads),
        options: PerplexityOptions {
            context: context.unwrap_or(loaded.engine.model.spec.context_length as usize),
            windows,
            layout: layout.map_err(|e| exception(&e))?,
        },
    };
    let stopped = AtomicBool::new(false);
    let (found, outcome) = run(
        py,
        || stopped.store(true, Ordering::SeqCst),
        |py, (done, all): (usize, usize)| match &progress {
            Some(progress) => progress.call1(py, (done, all)).map(drop),
            None => Ok(()),
        },
        |sender| {
            measurement.run(&|done, all| {
                // Nobody listens after an exception.
                let _ = sender.send((done, all));
                match stopped.load(Ordering::SeqCst) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })
        },
    );
    outcome?;
    let found = found.map_err(|e| exception(&e))?;
    let divergence = found.divergence.as_ref().map(Divergence::of);
    Ok(Perplexity {
        perplexity: found.perplexity.value,
        perplexity_standard_error: error(found.perplexity),
        mean_nll: found.nll.value,
        standard_error: error(found.nll),
        tokens: found.tokens,
        windows: found.windows,
        context: found.context,
        reference: divergence.map(|d| Py::new(py, d)).transpose()?,
    })
}

impl Measurement<'_> {
    fn run(
        &self,
        progress: &(dyn Fn(usize, usize) -> ControlFlow<()> + Sync),
    ) -> Result<stb_runtime::Perplexity> {
        let open = OpenOptions { threads: Some(self.threads), ..OpenOptions::default() };
        pool(self.threads)?.install(|| {
            let engine = open_to_measure(self.model, &open)?;
            let reference = self.reference.map(|path| open_to_measure(path, &open)).transpose()?;
            let tokenizer = engine.model.tokenizer()?;
            let reference = reference.as_ref().map(Reference::new);
            measure(&engine, reference, &tokenizer, self.text, &self.options, progress)
        })
    }
}
