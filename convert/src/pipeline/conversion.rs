//! The whole conversion: opens the checkpoint, converts all tensors in file order, reports.

use std::time::Instant;

use stb_format::{Meta, Quality, Writer};
use stb_runtime::{Engine, Error};

use super::distill;
use super::job::{Job, Progress};
use super::run::{Hidden, Run, TableState};
use crate::check;
use crate::compute::Accelerator;
use crate::interrupt::{Interrupted, check_interrupt};
use crate::metadata;
use crate::output::{OutputFile, refuse_existing};
use crate::plan::TensorPlan;
use crate::quality::QualityReport;
use crate::report::{Report, Stages, TensorReport};
use crate::resume::{States, Workspace};

/// Runs the conversion and writes the file. Resumes an interrupted conversion of the same source, recipe and text
/// after its last finished decoder layer; the bytes of the file do not depend on interruptions.
///
/// # Errors
/// [`Interrupted`] on request ([`crate::interrupt`]); [`Error::Invalid`] for weights that are not finite;
/// [`Error::Io`] for the output. Finished layers are kept ([`crate::resume`]) after an interruption or an error
/// of the file system, but not after other errors.
pub fn convert(job: Job<'_>, progress: &dyn Progress) -> anyhow::Result<Report> {
    let started = Instant::now();
    refuse_existing(job.target, job.force)?;
    let engine = Engine::without_layers(job.checkpoint)?;
    let mut meta = job.meta.clone();
    metadata::add_hashes(&mut meta, job.checkpoint)?;
    let accelerator = match &job.device {
        Some(device) => Some(Accelerator::new(device, &engine.model)?),
        None => None,
    };
    let key = key(&job, &meta, &engine, accelerator.as_ref());
    let mut workspace = Workspace::open(job.target, &key)?;
    if workspace.discarded {
        progress.note(
            "discarding an unfinished conversion to this file: its source, recipe, calibration or \
             version differs",
        );
    }
    let result =
        write_file(&job, &meta, engine, accelerator.as_ref(), &mut workspace, progress, started);
    let keep = match &result {
        Ok(_) => false,
        Err(e) => {
            let io = e.downcast_ref::<Error>().is_some_and(|e| matches!(e, Error::Io { .. }));
            workspace.finished() > 0 && (io || e.is::<Interrupted>())
        }
    };
    if !keep {
        workspace.remove();
    } else if result.as_ref().is_err_and(|e| e.is::<Interrupted>()) {
        let (layers, folder) = (workspace.finished(), workspace.folder().to_owned());
        return Err(Interrupted::Later { layers, folder }.into());
    }
    result
}

/// Converts all tensors, distills the model if the recipe asks for it, and commits the file.
fn write_file(
    job: &Job<'_>,
    meta: &Meta,
    engine: Engine,
    accelerator: Option<&Accelerator>,
    workspace: &mut Workspace,
    progress: &dyn Progress,
    started: Instant,
) -> anyhow::Result<Report> {
    let output = OutputFile::create(job.target, workspace.output(), job.force)?;
    let fail = |e: std::io::Error| Error::io(job.target, e);
    let writer = Writer::new(output).map_err(fail)?;
    let mut run = Run {
        job,
        engine,
        accelerator,
        writer,
        workspace,
        reports: Vec::new(),
        layers: Vec::new(),
        expert_tokens: Vec::new(),
        stages: Stages::default(),
        resumed: 0,
        tables: TableState::default(),
    };
    let (calibration_tokens, states) = run.convert_tensors(progress)?;
    let writing = Instant::now();
    let Run { engine, writer, reports, layers, mut stages, resumed, .. } = run;
    let mut output = writer.finish(meta).map_err(fail)?;
    check_interrupt()?;
    let mut distilling = 0.0;
    if let Some(options) = job.recipe.calibration.distill {
        let (file, tuned) = (output.close()?, workspace.tuned_output());
        (output, distilling) = distill::distill(job, meta, &file, tuned, options, progress)?;
    }
    let checking = Instant::now();
    let mut meta = meta.clone();
    let quality = match job.held_out {
        Some(held_out) => {
            progress.step(0, 1, "measuring the file");
            let quality = check::measure(&engine, held_out, &states, output.readable()?)?;
            check::write_quality(&quality, &mut meta, &mut output)?;
            quality
        }
        None => Quality::unchecked(),
    };
    let checking = checking.elapsed().as_secs_f64();
    output.commit()?;
    stages.output += writing.elapsed().as_secs_f64() - distilling - checking;
    stages.distill = distilling;
    stages.quality += checking;
    let mut report = make_report(job, reports, calibration_tokens, &meta);
    report.quality = QualityReport::from(&quality);
    layers.iter().for_each(|layer| stages.add(&layer.stages));
    report.stages = stages;
    report.layers = layers;
    report.resumed_layers = resumed;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// A text with everything on which the bytes of the file depend.
fn key(job: &Job<'_>, meta: &Meta, engine: &Engine, accelerator: Option<&Accelerator>) -> String {
    let device = accelerator.map_or("", Accelerator::name);
    let windows = job.held_out.map_or(0, |held_out| held_out.windows.len());
    let mut text = format!("{meta:?}\n{} {device}\n{windows} windows\n", engine.isa.name());
    for tensor in &job.plan.tensors {
        text += &format!("{} {:?} {:?}\n", tensor.tensor.name, tensor.tensor.shape, tensor.method);
    }
    text
}

fn make_report(
    job: &Job<'_>,
    tensors: Vec<TensorReport>,
    calibration_tokens: usize,
    meta: &Meta,
) -> Report {
    let (file_bytes, parameters) = (job.plan.file_bytes(meta), job.plan.parameters());
    let body = || job.plan.tensors.iter().filter(|t| t.matrix().is_some());
    let body_bytes: u64 = body().map(|t| t.bytes).sum();
    let body_weights: u64 = body().map(TensorPlan::elements).sum();
    let salient: Vec<f64> = tensors.iter().filter_map(|t| t.salient).collect();
    let salient = salient.iter().sum::<f64>() / salient.len().max(1) as f64;
    let calibration = match meta.get("provenance.calibration") {
        Some(stb_format::Value::Text(text)) => text.clone(),
        _ => String::new(),
    };
    Report {
        recipe: job.recipe.name.clone(),
        parameters,
        file_bytes,
        true_bits_per_parameter: file_bytes as f64 * 8.0 / parameters as f64,
        body_bits: body_bytes as f64 * 8.0 / body_weights.max(1) as f64,
        nominal_bits_paper: job.plan.nominal_bits(salient),
        calibration,
        calibration_tokens,
        notes: job.plan.notes(),
        quality: QualityReport::from(&Quality::unchecked()),
        answers: Vec::new(),
        search: Vec::new(),
        seconds: 0.0,
        resumed_layers: 0,
        stages: Stages::default(),
        layers: Vec::new(),
        tensors,
    }
}

impl Run<'_> {
    /// Converts and writes all tensors. Returns the number of calibration tokens, and the windows of the check after
    /// the layers of the dense model.
    fn convert_tensors(&mut self, progress: &dyn Progress) -> anyhow::Result<(usize, States)> {
        let job = self.job;
        let layers = self.job.checkpoint.spec.layers as usize;
        self.measure_tables()?;
        let mut hidden = self.embed_windows(progress)?;
        let tokens =
            hidden.quantized.iter().map(Vec::len).sum::<usize>() / self.engine.model.hidden_size();
        let mut tensors = job.plan.tensors.iter().peekable();
        let before: Vec<_> =
            std::iter::from_fn(|| tensors.next_if(|t| t.tensor.layer.is_none())).collect();
        self.convert_global_tensors(&before)?;
        let parts: Vec<Vec<&TensorPlan>> = (0..layers)
            .map(|index| {
                std::iter::from_fn(|| tensors.next_if(|t| t.tensor.layer == Some(index))).collect()
            })
            .collect();
        let global_stages = std::mem::take(&mut self.stages);
        let finished = self.resume(&parts, &mut hidden, progress)?;
        for (index, part) in parts.iter().enumerate().skip(finished) {
            self.convert_layer(index, part, &mut hidden, progress)?;
        }
        self.stages = global_stages;
        let after: Vec<_> = tensors.collect();
        self.convert_global_tensors(&after)?;
        Ok((tokens, hidden.check))
    }

    /// Embeds the windows of calibration and check: the inputs of the first decoder layer. Those of calibration are
    /// empty for plans without it.
    fn embed_windows(&mut self, progress: &dyn Progress) -> anyhow::Result<Hidden> {
        let job = self.job;
        let mut hidden = Hidden::default();
        for window in job.held_out.iter().flat_map(|held_out| &held_out.windows) {
            let mut states = Vec::new();
            self.engine.embed(window, &mut states)?;
            hidden.check.push(states);
        }
        if job.plan.needs_calibration() {
            let options = &job.recipe.calibration;
            let length = options.length.min(job.checkpoint.spec.context_length as usize);
            let table = self.stored_embeddings()?;
            let drawn =
                job.calibration.draw(&self.engine.model, options, length, 0, options.samples)?;
            if drawn.fresh < drawn.windows.len() {
                progress.note(&format!(
                    "the calibration text has {} windows of {length} tokens; the other {} repeat \
                     parts of it: a longer text or a smaller --calib-samples is better",
                    drawn.fresh,
                    drawn.windows.len() - drawn.fresh
                ));
            }
            for window in drawn.windows {
                let mut states = Vec::new();
                self.engine.embed(&window, &mut states)?;
                if job.recipe.calibration.follows_dense() {
                    hidden.dense.push(states.clone());
                }
                if let Some(table) = &table {
                    self.engine.embed_with(table, &window, 0..window.len(), &mut states)?;
                }
                hidden.quantized.push(states);
            }
        }
        if job.plan.prunes_first() {
            hidden.pruned.clone_from(&hidden.quantized);
        }
        Ok(hidden)
    }

    /// Writes the layers that an interrupted run has finished, and loads the states after them. Returns the number of
    /// these layers.
    fn resume(
        &mut self,
        parts: &[Vec<&TensorPlan>],
        hidden: &mut Hidden,
        progress: &dyn Progress,
    ) -> anyhow::Result<usize> {
        let finished = self.workspace.finished().min(parts.len());
        if finished == 0 {
            return Ok(0);
        }
        let mut saved = Vec::new();
        for (index, part) in parts[..finished].iter().enumerate() {
            let lengths: Vec<u64> = part.iter().map(|t| t.bytes).collect();
            saved.extend(self.workspace.load(index, &lengths));
        }
        if finished == parts.len() {
            *hidden = hidden.after_layers();
        }
        let mut states = hidden.fields();
        let complete = saved.len() == finished && self.workspace.load_states(&mut states).is_some();
        if !complete {
            progress
                .note("the saved layers of an unfinished conversion are damaged: starting again");
            self.workspace.forget();
            *hidden = self.embed_windows(progress)?;
            return Ok(0);
        }
        for (part, layer) in parts.iter().zip(saved) {
            for ((tensor, payload), report) in part.iter().zip(&layer.payloads).zip(layer.tensors) {
                let encoding = tensor.method.encoding();
                self.writer
                    .tensor(&tensor.tensor.name, &tensor.tensor.shape, &encoding, payload)
                    .map_err(|e| Error::io(self.job.target, e))?;
                self.reports.push(report);
            }
            self.layers.push(layer.layer);
        }
        self.resumed = finished;
        progress.note(&format!("resuming after {finished} of {} decoder layers", parts.len()));
        Ok(finished)
    }
}
