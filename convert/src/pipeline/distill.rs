//! Distillation of a finished file: changes scales and norms, not encodings and sizes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use stb_format::arch::TensorSpec;
use stb_format::{File, Meta, Writer};
use stb_runtime::{Bytes, Engine, Error, OpenOptions};

use super::job::{Job, Progress};
use crate::distill::DistillOptions;
use crate::distill::model::{Distilled, Sequences, distill_model};
use crate::interrupt::check_interrupt;
use crate::output::OutputFile;

/// Held-out windows that decide whether a distillation is kept.
const HELD_OUT: usize = 32;

/// Distills the finished `file` from the dense model and writes the result to `output`. Returns the
/// time in seconds.
pub(super) fn distill(
    job: &Job<'_>,
    meta: &Meta,
    file: &Path,
    output: PathBuf,
    options: DistillOptions,
    progress: &dyn Progress,
) -> anyhow::Result<(OutputFile, f64)> {
    let started = Instant::now();
    let dense = Engine::from_checkpoint(job.checkpoint)?;
    let engine = Engine::open_stb(file, &OpenOptions::exact())?;
    let calibration = &job.recipe.calibration;
    let length = calibration.length.min(job.checkpoint.spec.context_length as usize);
    let samples = calibration.samples;
    let count = samples.saturating_mul(options.epochs);
    let model = &dense.model;
    let training = job.calibration.draw(model, calibration, length, samples, count)?;
    if training.fresh < count {
        progress.note(&format!(
            "distillation: {} of {count} training windows are fresh; the text has no more, and the \
             others repeat parts of it",
            training.fresh
        ));
    }
    let held_out = job.calibration.held_out(model, calibration, length, HELD_OUT)?;
    let step = |done: usize, all: usize, loss: f64| {
        let text = format!("distillation, {loss:.4} nats per token from the dense model");
        progress.step(done as u64, all as u64, &text);
    };
    let sequences = Sequences { training: &training.windows, held_out: &held_out.windows };
    let mut distilled = distill_model(&dense, &engine, &sequences, options, &step)?;
    let (on_held_out, on_training) = (distilled.held_out, distilled.training);
    progress.note(&if on_held_out.after < on_held_out.before {
        format!(
            "distillation: from {:.4} to {:.4} nats per token from the dense model on held-out text \
             ({}), from {:.4} to {:.4} on training text",
            on_held_out.before,
            on_held_out.after,
            held_out.name(),
            on_training.before,
            on_training.after
        )
    } else {
        format!(
            "distillation: no better than {:.4} nats per token from the dense model on held-out text \
             ({}), so the file stays as it was",
            on_held_out.before, held_out.name()
        )
    });
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
