//! Distillation of a finished file: changes scales and norms, not encodings and sizes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use stb_format::arch::TensorSpec;
use stb_format::{File, Meta, Writer};
use stb_runtime::{Bytes, Engine, Error, OpenOptions};

use super::job::{Job, Progress};
use crate::distill::{self, model::Distilled};
use crate::interrupt::check_interrupt;
use crate::output::OutputFile;

/// Distills the finished `file` from the dense model and writes the result to `output`. Returns the
/// time in seconds.
pub(super) fn distill(
    job: &Job<'_>,
    meta: &Meta,
    file: &Path,
    output: PathBuf,
    options: distill::DistillOptions,
    progress: &dyn Progress,
) -> anyhow::Result<(OutputFile, f64)> {
    let started = Instant::now();
    let dense = Engine::from_checkpoint(job.checkpoint)?;
    let engine = Engine::open_stb(file, &OpenOptions::exact())?;
    let calibration = &job.recipe.calibration;
    let length = calibration.length.min(job.checkpoint.spec.context_length as usize);
    let sequences = job.calibration.windows(&dense.model.tokenizer()?, calibration, length)?;
    let step = |done: usize, all: usize, loss: f64| {
        let text = format!("distillation, {loss:.4} nats per token from the dense model");
        progress.step(done as u64, all as u64, &text);
    };
    let mut distilled = distill::model::distill_model(&dense, &engine, &sequences, options, &step)?;
    let (before, after) = (distilled.outcome.before, distilled.outcome.after);
    progress.note(&format!(
        "distillation: from {before:.4} to {after:.4} nats per token from the dense model, on the \
         calibration text"
    ));
    let output = rewrite(job, meta, file, output, &mut distilled)?;
    Ok((output, started.elapsed().as_secs_f64()))
}

/// Copies `file` to `output` with the tensors that distillation has changed.
fn rewrite(
    job: &Job<'_>,
    meta: &Meta,
    file: &Path,
    output: PathBuf,
    distilled: &mut Distilled<'_>,
) -> anyhow::Result<OutputFile> {
    let bytes = Bytes::open(file, true)?;
    let old = File::open(&bytes).map_err(|e| Error::format(file, e))?;
    let fail = |e: std::io::Error| Error::io(job.target, e);
    let mut writer =
        Writer::new(OutputFile::create(job.target, output, job.force)?).map_err(fail)?;
    let tensors = job.checkpoint.spec.tensors();
    let specs: HashMap<String, TensorSpec> = tensors.map(|t| (t.name.clone(), t)).collect();
    for tensor in old.tensors() {
        check_interrupt()?;
        let (name, encoding) = (tensor.name(), tensor.encoding());
        let changed = specs.get(name).and_then(|t| distilled.payload(t, encoding));
        let payload = changed.as_deref().unwrap_or(tensor.payload());
        writer.tensor(name, tensor.shape(), encoding, payload).map_err(fail)?;
    }
    Ok(writer.finish(meta).map_err(fail)?)
}
