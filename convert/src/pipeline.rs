//! The conversion: one decoder layer at a time through calibration, quantisation and output.

use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;
use stb_format::encoding::{Dense, IntGroup};
use stb_format::{Encoding, Meta, Writer};
use stb_runtime::{Checkpoint, Error, Layer, LinearInput, Model, Observer, Result, Weight};

use crate::calibration::Source;
use crate::hessian::{Factor, Hessian, interrupted};
use crate::metadata;
use crate::output::Output;
use crate::plan::{Method, Plan, TensorPlan, Treatment, input_of};
use crate::quantise::{Input, Packed, int_group, nm, relative_error, stbllm};
use crate::recipe::Recipe;
use crate::report::{Report, Stages, TensorReport};

/// Sequences that run through a layer together: threads take whole sequences.
pub const BATCH: usize = 8;

/// One conversion.
pub struct Job<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// What is done.
    pub recipe: &'a Recipe,
    /// What is done to which tensor.
    pub plan: Plan,
    /// The metadata, hashes of the sources still missing.
    pub meta: Meta,
    /// The calibration text.
    pub calibration: &'a Source,
    /// The file to write.
    pub target: &'a Path,
    /// Whether it may replace another.
    pub force: bool,
}

/// Hears how far a conversion is.
pub trait Progress {
    /// `done` of `all` units of work; `what` is being done.
    fn step(&self, done: u64, all: u64, what: &str);
    /// A decoder layer is finished with this mean relative error.
    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64);
}

/// The user has asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; nothing was written")]
pub struct Interrupted;

/// Runs the conversion and writes the file.
///
/// # Errors
/// [`Interrupted`] if [`crate::hessian::INTERRUPTED`] is set; [`Error::Invalid`] for weights that
/// are not finite; [`Error::Io`] for the output. No partial file stays behind.
pub fn convert(job: Job<'_>, progress: &dyn Progress) -> anyhow::Result<Report> {
    let started = Instant::now();
    let output = Output::create(job.target, job.force)?;
    let fail = |e: std::io::Error| Error::io(job.target, e);
    let writer = Writer::new(output).map_err(fail)?;
    let model = Model::from_checkpoint(job.checkpoint)?;
    let mut run = Run { job: &job, model, writer, reports: Vec::new(), stages: Stages::default() };
    let calibration_tokens = run.all_tensors(progress)?;
    let Run { writer, reports, mut stages, .. } = run;
    let hashing = Instant::now();
    let mut meta = job.meta.clone();
    metadata::add_hashes(&mut meta, job.checkpoint)?;
    let output = writer.finish(&meta).map_err(fail)?;
    check_interrupt()?;
    output.commit()?;
    stages.output += hashing.elapsed().as_secs_f64();
    Ok(make_report(&job, reports, stages, calibration_tokens, &meta, started))
}

fn make_report(
    job: &Job<'_>,
    tensors: Vec<TensorReport>,
    stages: Stages,
    calibration_tokens: usize,
    meta: &Meta,
    started: Instant,
) -> Report {
    let (file_bytes, parameters) = (job.plan.file_bytes(meta), job.plan.parameters());
    let body = || job.plan.tensors.iter().filter(|t| t.layer().is_some() && t.shape.len() == 2);
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
        seconds: started.elapsed().as_secs_f64(),
        stages,
        tensors,
    }
}

/// [`Interrupted`] if the user has asked to stop.
fn check_interrupt() -> anyhow::Result<()> {
    if interrupted() { Err(Interrupted.into()) } else { Ok(()) }
}

/// A conversion on its way.
struct Run<'a> {
    job: &'a Job<'a>,
    model: Model,
    writer: Writer<Output>,
    reports: Vec<TensorReport>,
    stages: Stages,
}

/// Second moments of one input of a decoder layer, damped and factored.
struct Moments {
    hessian: Hessian,
    factor: Factor,
    norms: Vec<f32>,
}

/// Keeps what it sees, in the order of [`LinearInput::ALL`].
#[derive(Default)]
struct Capture([Vec<f32>; 4]);

impl Observer for Capture {
    fn observe(&mut self, input: LinearInput, x: &[f32]) {
        self.0[input.index()] = x.to_vec();
    }
}

impl Run<'_> {
    /// Writes all tensors; returns the number of calibration tokens.
    fn all_tensors(&mut self, progress: &dyn Progress) -> anyhow::Result<usize> {
        let job = self.job;
        let layers = self.model.layers.len();
        let mut hidden = Vec::new();
        if job.plan.needs_calibration() {
            let tokenizer = self.model.tokenizer()?;
            let options = &job.recipe.calibration;
            let length = options.length.min(job.checkpoint.spec.context_length as usize);
            for window in job.calibration.windows(&tokenizer, options, length)? {
                let mut states = Vec::new();
                self.model.embed(&window, &mut states)?;
                hidden.push(states);
            }
        }
        let mut tensors = job.plan.tensors.iter().peekable();
        let before: Vec<_> =
            std::iter::from_fn(|| tensors.next_if(|t| t.layer().is_none())).collect();
        self.outside(&before)?;
        for index in 0..layers {
            let part: Vec<_> = std::iter::from_fn(|| {
                tensors.next_if(|t| t.layer().is_some_and(|(i, _)| i == index))
            })
            .collect();
            self.layer(index, &part, &mut hidden, progress)?;
        }
        let after: Vec<_> = tensors.collect();
        self.outside(&after)?;
        Ok(hidden.iter().map(Vec::len).sum::<usize>() / self.model.norm.len())
    }

    /// Tensors outside the decoder layers.
    fn outside(&mut self, tensors: &[&TensorPlan]) -> anyhow::Result<()> {
        for tensor in tensors {
            check_interrupt()?;
            let started = Instant::now();
            let weight = self.job.checkpoint.weight(&tensor.name)?;
            let values = finite(&weight, &tensor.name)?;
            let packed = without_inputs(tensor, &weight, &values);
            let error = squared_error(&packed, &weight, &values);
            self.write(tensor, &packed, error, started)?;
        }
        Ok(())
    }

    fn write(
        &mut self,
        tensor: &TensorPlan,
        packed: &Packed,
        error: f64,
        started: Instant,
    ) -> anyhow::Result<()> {
        let target = self.job.target;
        self.stages.quantise += started.elapsed().as_secs_f64();
        let writing = Instant::now();
        self.writer
            .tensor(&tensor.name, &tensor.shape, &packed.encoding, &packed.payload)
            .map_err(|e| Error::io(target, e))?;
        self.stages.output += writing.elapsed().as_secs_f64();
        self.reports.push(TensorReport {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            encoding: packed.encoding.to_string(),
            bytes: packed.payload.len() as u64,
            stored_bits: tensor.stored_bits(),
            relative_error: error,
            salient: packed.salient,
            seconds: started.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// One decoder layer: statistics with the dense weights, all its tensors, then the hidden
    /// states that the next layer will really see.
    fn layer(
        &mut self,
        index: usize,
        tensors: &[&TensorPlan],
        hidden: &mut [Vec<f32>],
        progress: &dyn Progress,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let layers = self.model.layers.len();
        // Units of progress: calibration, each tensor, the second forward pass.
        let units = tensors.len() as u64 + 2;
        let step = |done: u64, what: &str| {
            let text = format!("layer {} of {layers}: {what}", index + 1);
            progress.step(index as u64 * units + done, layers as u64 * units, &text);
        };
        step(0, "calibration");
        let linear = tensors.iter().any(|t| matches!(t.treatment, Treatment::Linear(_)));
        for tensor in tensors {
            finite(&self.job.checkpoint.weight(&tensor.name)?, &tensor.name)?;
        }
        let moments = if linear { Some(self.moments(index, hidden)?) } else { None };
        let mut layer = self.model.layers[index].clone();
        let (mut error, mut count) = (0.0, 0);
        for (i, tensor) in tensors.iter().enumerate() {
            check_interrupt()?;
            let part = tensor.layer().map_or("", |(_, part)| part);
            step(1 + i as u64, part);
            let tensor_error = self.layer_tensor(tensor, part, moments.as_deref(), &mut layer)?;
            if let Treatment::Linear(_) = tensor.treatment {
                error += tensor_error;
                count += 1;
            }
        }
        drop(moments);
        step(units - 1, "next inputs");
        if index + 1 < layers {
            self.forward(&layer, hidden)?;
        }
        let encoding = tensors
            .iter()
            .find(|t| t.shape.len() == 2)
            .map_or(String::new(), |t| t.treatment.encoding().to_string());
        let mean = error / f64::from(count.max(1));
        progress.layer(index, layers, mean, &encoding, started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Quantises and writes one tensor of a layer and puts it into `layer`; returns its error.
    fn layer_tensor(
        &mut self,
        tensor: &TensorPlan,
        part: &str,
        moments: Option<&[Moments]>,
        layer: &mut Layer,
    ) -> anyhow::Result<f64> {
        let started = Instant::now();
        let weight = self.job.checkpoint.weight(&tensor.name)?;
        let mut values = weight.decode();
        let (packed, error) = match (tensor.treatment, moments.zip(input_of(part))) {
            (Treatment::Linear(method), Some((moments, input))) => {
                let Moments { hessian, factor, norms } = &moments[input];
                clear_dead(&mut values, norms);
                let input = Input {
                    isa: self.model.isa,
                    weights: &values,
                    rows: weight.rows(),
                    cols: weight.cols(),
                    hessian,
                    factor,
                    norms,
                };
                let packed = linear(&input, method);
                let decoded = decode(&packed, &weight);
                let error = relative_error(&input, &decoded);
                (packed, error)
            }
            _ => {
                let packed = without_inputs(tensor, &weight, &values);
                let error = squared_error(&packed, &weight, &values);
                (packed, error)
            }
        };
        let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
        let stored = Weight::from_payload(&packed.payload, packed.encoding.clone(), rows, cols)?;
        match part {
            "self_attn.q_proj" => layer.q = stored,
            "self_attn.k_proj" => layer.k = stored,
            "self_attn.v_proj" => layer.v = stored,
            "self_attn.o_proj" => layer.o = stored,
            "mlp.gate_proj" => layer.gate = stored,
            "mlp.up_proj" => layer.up = stored,
            "mlp.down_proj" => layer.down = stored,
            _ => {}
        }
        self.write(tensor, &packed, error, started)?;
        Ok(error)
    }

    /// Second moments of the four inputs of a layer, with its dense weights.
    fn moments(&mut self, index: usize, hidden: &[Vec<f32>]) -> anyhow::Result<Vec<Moments>> {
        let layer = &self.model.layers[index];
        let sizes = [layer.q.cols(), layer.o.cols(), layer.gate.cols(), layer.down.cols()];
        let mut hessians = sizes.map(Hessian::new);
        for batch in hidden.chunks(BATCH) {
            check_interrupt()?;
            let started = Instant::now();
            let captured: Vec<Capture> = batch
                .par_iter()
                .map(|states| {
                    let mut capture = Capture::default();
                    self.model.run_layer(layer, &mut states.clone(), &mut capture);
                    capture
                })
                .collect();
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            for (k, hessian) in hessians.iter_mut().enumerate() {
                // One product for the whole batch: longer sums, fewer passes over the matrix.
                let x: Vec<f32> = captured.iter().flat_map(|c| c.0[k].iter().copied()).collect();
                hessian.add(self.model.isa, &x);
                captured.iter().for_each(|_| hessian.count_sequence());
            }
            self.stages.moments += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        let damping = self.job.recipe.calibration.damping;
        let factored: Vec<Result<Moments>> = hessians
            .into_par_iter()
            .map(|mut hessian| {
                hessian.finish();
                let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
                hessian.damp(damping);
                let factor = Factor::new(&hessian)?;
                Ok(Moments { hessian, factor, norms })
            })
            .collect();
        self.stages.factors += started.elapsed().as_secs_f64();
        Ok(factored.into_iter().collect::<Result<_>>()?)
    }

    /// Replaces the hidden states by the output of `layer`.
    fn forward(&mut self, layer: &Layer, hidden: &mut [Vec<f32>]) -> anyhow::Result<()> {
        let started = Instant::now();
        for batch in hidden.chunks_mut(BATCH) {
            check_interrupt()?;
            batch.par_iter_mut().for_each(|states| self.model.run_layer(layer, states, &mut ()));
        }
        self.stages.forward += started.elapsed().as_secs_f64();
        Ok(())
    }
}

fn linear(input: &Input<'_>, method: Method) -> Packed {
    match method {
        Method::Stbllm(options) => stbllm::quantise(input, &options),
        Method::Nm(options) => nm::quantise(input, &options),
        Method::Int(spec) => int_group::compensate(input, spec),
    }
}

/// Weights of inputs that never occurred do nothing; zero costs least.
fn clear_dead(values: &mut [f32], norms: &[f32]) {
    if norms.contains(&0.0) {
        for row in values.chunks_exact_mut(norms.len()) {
            for (w, norm) in row.iter_mut().zip(norms) {
                if *norm == 0.0 {
                    *w = 0.0;
                }
            }
        }
    }
}

/// A tensor without statistics of its inputs.
fn without_inputs(tensor: &TensorPlan, weight: &Weight, values: &[f32]) -> Packed {
    let round = |spec: IntGroup| int_group::round(values, weight.rows(), weight.cols(), spec);
    let keep = |kind: Dense| Packed {
        encoding: Encoding::Dense(kind),
        payload: kind.encode(values),
        salient: None,
    };
    match tensor.treatment {
        Treatment::Keep(kind) => keep(kind),
        Treatment::Round(spec) | Treatment::Linear(Method::Int(spec)) => round(spec),
        // Only reached for parts that are not linear layers, which plans keep.
        Treatment::Linear(_) => keep(Dense::F32),
    }
}

fn decode(packed: &Packed, weight: &Weight) -> Vec<f32> {
    let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
    let view = packed.encoding.view(rows, cols, &packed.payload);
    let view = view.expect("a payload that was packed for this shape");
    let mut out = vec![0.0; weight.rows() * weight.cols()];
    out.par_chunks_exact_mut(weight.cols())
        .enumerate()
        .for_each(|(r, row)| view.decode_row(r, row));
    out
}

/// Σ (w − q)² / Σ w².
fn squared_error(packed: &Packed, weight: &Weight, values: &[f32]) -> f64 {
    let decoded = decode(packed, weight);
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = values.iter().zip(&decoded).map(|(w, q)| square(w - q)).sum();
    let all: f64 = values.iter().map(|w| square(*w)).sum();
    if all > 0.0 { error / all } else { 0.0 }
}

/// The decoded weights, all finite.
fn finite(weight: &Weight, name: &str) -> Result<Vec<f32>> {
    let values = weight.decode();
    let (rows, cols) = (weight.rows(), weight.cols());
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(i) => Err(Error::invalid(format!(
            "tensor {name} [{rows}, {cols}] has {} at row {}, column {}: the checkpoint is damaged \
             or its training diverged; nothing was written",
            values[i],
            i / cols,
            i % cols
        ))),
    }
}
