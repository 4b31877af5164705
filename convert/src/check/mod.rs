//! Measures a converted file against the dense model, on windows of text that calibration has not seen.
//!
//! The dense model runs one decoder layer at a time while the conversion goes on; what is left here are its hidden
//! states after the last layer. The file is run as users run it: mapped, with activations of 8 bits.

mod answers;

use std::path::Path;

use stb_format::{Figure, File, Meta, MetaPatch, Quality, QualityFigures, Verdict};
use stb_runtime::{
    Bytes, Divergence, Engine, Error, Estimate, OpenOptions, Result, Verify, WindowLogits,
    WindowLosses, compare_windows, open_for_windows,
};

pub use answers::compare_answers;

use crate::backward::ModelHead;
use crate::calibration::HeldOut;
use crate::interrupt::check_interrupt;
use crate::output::OutputFile;
use crate::resume::States;

/// The logits of the dense model on a window, from its hidden states after the last decoder layer.
struct DenseLogits<'a> {
    head: ModelHead<'a>,
    /// States that are still to come, [tokens, hidden].
    states: &'a [f32],
    logits: Vec<f32>,
}

impl WindowLogits for DenseLogits<'_> {
    fn next(&mut self, _: &[u32], tokens: usize) -> Result<&[f32]> {
        let (states, rest) = self.states.split_at(tokens * self.head.engine.model.hidden_size());
        self.states = rest;
        self.logits = self.head.logits(&self.head.inputs(states));
        Ok(&self.logits)
    }
}

/// Measures the finished `file` on `held_out`. `dense` is the dense model, of which only the head is used, and
/// `states` are its hidden states after the last decoder layer, [tokens, hidden] for each window.
///
/// # Errors
/// [`Error::Invalid`] if the dense model computes values that are not finite; those of [`Engine::open`];
/// [`crate::interrupt::Interrupted`].
pub(crate) fn measure(
    dense: &Engine,
    held_out: &HeldOut,
    states: &States,
    file: &Path,
) -> anyhow::Result<Quality> {
    if !states.iter().flatten().all(|x| x.is_finite()) {
        return Err(Error::invalid(format!(
            "{} computes values that are not finite on the text of the check; its weights may be damaged. \
             --no-check converts it nevertheless",
            dense.model.source.display()
        ))
        .into());
    }
    let threads = rayon::current_num_threads();
    // The file has just been written.
    let options =
        OpenOptions { threads: Some(threads), verify: Verify::Off, ..OpenOptions::default() };
    let engine = open_for_windows(file, &options)?;
    let mut losses: Vec<WindowLosses> = Vec::new();
    for (windows, states) in held_out.windows.chunks(threads).zip(states.chunks(threads)) {
        check_interrupt()?;
        let begin = |i: usize| DenseLogits {
            head: ModelHead::of(dense),
            states: &states[i],
            logits: Vec::new(),
        };
        match compare_windows(&engine, windows, begin) {
            Ok(found) => losses.extend(found),
            // The tokens are in the vocabulary and the states are finite: the file's logits are not.
            Err(Error::Invalid { .. }) => {
                return Ok(Quality { verdict: Verdict::Broken, figures: None });
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(quality(&losses, held_out))
}

/// The verdict on a file with these losses.
fn quality(losses: &[WindowLosses], held_out: &HeldOut) -> Quality {
    let found = Divergence::of(losses);
    let figure = |e: Estimate| Figure {
        value: e.value,
        error: Some(e.standard_error).filter(|e| e.is_finite()),
    };
    let figures = QualityFigures {
        kl: figure(found.kl),
        top1: figure(found.top1),
        perplexity: figure(WindowLosses::perplexity(losses)),
        source_perplexity: figure(found.reference_perplexity),
        tokens: held_out.windows.iter().map(|w| w.len() as u64 - 1).sum(),
        windows: losses.len() as u64,
        text: held_out.text.clone(),
    };
    let values = [figures.kl, figures.top1, figures.perplexity, figures.source_perplexity];
    match values.iter().all(|figure| figure.value.is_finite()) {
        true => Quality::measured(figures),
        // The exponential of a loss can overflow.
        false => Quality { verdict: Verdict::Broken, figures: None },
    }
}

/// Writes `quality` into `meta` and into the metadata of `output`, whose figures it replaces.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_quality(
    quality: &Quality,
    meta: &mut Meta,
    output: &mut OutputFile,
) -> Result<()> {
    let internal = |what: String| Error::Internal { what };
    quality.write(meta).map_err(|e| internal(e.to_string()))?;
    let path = output.readable()?.to_owned();
    let bytes = Bytes::open(&path, true)?;
    let file = File::open(&bytes).map_err(|e| Error::format(&path, e))?;
    let patch = MetaPatch::new(&file, meta).map_err(|e| internal(e.to_string()))?;
    drop(bytes);
    output.patch(&patch.ok_or_else(|| internal("the metadata are not at the end".into()))?)
}
