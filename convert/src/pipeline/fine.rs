//! Fine-tuning of a finished file: the same tensors, encodings and sizes, other scales and norms.

use std::path::{Path, PathBuf};
use std::time::Instant;

use stb_format::{File, Meta, Writer};
use stb_runtime::{Bytes, Error, Model, OpenOptions};

use super::job::{Job, Progress};
use crate::interrupt::check_interrupt;
use crate::output::Output;
use crate::tune::{self, model::Tuned};

/// Fine-tunes the finished `file` to what the model of the source says, and writes the result to `output`.
/// Returns the seconds that it took.
pub(super) fn fine_tune(
    job: &Job<'_>,
    meta: &Meta,
    file: &Path,
    output: PathBuf,
    options: tune::DistillOptions,
    progress: &dyn Progress,
) -> anyhow::Result<(Output, f64)> {
    let started = Instant::now();
    let dense = Model::from_checkpoint(job.checkpoint)?;
    let model = Model::open_stb(file, &OpenOptions::exact())?;
    let calibration = &job.recipe.calibration;
    let length = calibration.length.min(job.checkpoint.spec.context_length as usize);
    let sequences = job.calibration.windows(&dense.tokenizer()?, calibration, length)?;
    let step = |done: usize, all: usize, loss: f64| {
        let text = format!("fine-tuning, {loss:.4} nats per token from the dense model");
        progress.step(done as u64, all as u64, &text);
    };
    let mut tuned = tune::model::tune(&dense, &model, &sequences, options, &step)?;
    let (before, after) = (tuned.outcome.before, tuned.outcome.after);
    progress.note(&format!(
        "fine-tuning: from {before:.4} to {after:.4} nats per token from the dense model, on the \
         calibration text"
    ));
    let output = rewrite(job, meta, file, output, &mut tuned)?;
    Ok((output, started.elapsed().as_secs_f64()))
}

/// Writes `file` anew with the tensors that have moved.
fn rewrite(
    job: &Job<'_>,
    meta: &Meta,
    file: &Path,
    output: PathBuf,
    tuned: &mut Tuned<'_>,
) -> anyhow::Result<Output> {
    let bytes = Bytes::open(file, true)?;
    let old = File::open(&bytes).map_err(|e| Error::format(file, e))?;
    let fail = |e: std::io::Error| Error::io(job.target, e);
    let mut writer = Writer::new(Output::create(job.target, output, job.force)?).map_err(fail)?;
    for tensor in old.tensors() {
        check_interrupt()?;
        let (name, encoding) = (tensor.name(), tensor.encoding());
        let moved = tuned.payload(name, encoding);
        let payload = moved.as_deref().unwrap_or(tensor.payload());
        writer.tensor(name, tensor.shape(), encoding, payload).map_err(fail)?;
    }
    Ok(writer.finish(meta).map_err(fail)?)
}
