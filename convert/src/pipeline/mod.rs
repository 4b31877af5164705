//! The conversion: one decoder layer at a time through calibration, quantisation and output.

mod refresh;
mod tensor;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;
use stb_format::{Meta, Writer};
use stb_runtime::{Checkpoint, Error, Layer, LinearInput, Model, Observer, Result, Weight};

use crate::calibration::Source;
use crate::hessian::{Factor, Hessian, interrupted};
use crate::metadata;
use crate::output::{Output, refuse_existing};
use crate::plan::{Method, Plan, TensorPlan, Treatment, input_of};
use crate::quantise::prune::Pruned;
use crate::quantise::{Input, Packed, relative_error, stbllm};
use crate::recipe::Recipe;
use crate::report::{LayerReport, Report, Stages, TensorReport};
use crate::resume::{SavedLayer, States, Workspace};
use crate::tune;
use refresh::Shift;
use tensor::{clear_dead, decode, finite, in_range, linear, squared_error, without_inputs};

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
    /// Something that the user should know.
    fn note(&self, text: &str);
}

/// The user has asked to stop.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    /// Before anything was worth keeping.
    #[error("interrupted; nothing was written")]
    AtOnce,
    /// With this many decoder layers finished.
    #[error(
        "interrupted; {0} finished decoder layers are kept: the same command goes on from there"
    )]
    Later(usize),
}

/// Runs the conversion and writes the file. If one of the same source, recipe and text was stopped
/// before, goes on after its last finished decoder layer; the bytes are the same.
///
/// # Errors
/// [`Interrupted`] if [`crate::hessian::INTERRUPTED`] is set; [`Error::Invalid`] for weights that
/// are not finite; [`Error::Io`] for the output. After an interruption or an error of the file
/// system finished layers are kept ([`crate::resume`]), else nothing is.
pub fn convert(job: Job<'_>, progress: &dyn Progress) -> anyhow::Result<Report> {
    let started = Instant::now();
    refuse_existing(job.target, job.force)?;
    let model = Model::from_checkpoint(job.checkpoint)?;
    let mut meta = job.meta.clone();
    metadata::add_hashes(&mut meta, job.checkpoint)?;
    let key = key(&job, &meta, &model);
    let mut workspace = Workspace::open(job.target, &key)?;
    if workspace.discarded {
        progress.note(
            "an unfinished conversion to this file was of another source, recipe, calibration or \
             version: it is discarded",
        );
    }
    let result = convert_in(&job, &meta, model, &mut workspace, progress, started);
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
        return Err(Interrupted::Later(workspace.finished()).into());
    }
    result
}

fn convert_in(
    job: &Job<'_>,
    meta: &Meta,
    model: Model,
    workspace: &mut Workspace,
    progress: &dyn Progress,
    started: Instant,
) -> anyhow::Result<Report> {
    let output = Output::create(job.target, workspace.output(), job.force)?;
    let fail = |e: std::io::Error| Error::io(job.target, e);
    let writer = Writer::new(output).map_err(fail)?;
    let mut run = Run {
        job,
        model,
        writer,
        workspace,
        reports: Vec::new(),
        layers: Vec::new(),
        stages: Stages::default(),
        resumed: 0,
    };
    let calibration_tokens = run.all_tensors(progress)?;
    let writing = Instant::now();
    let Run { writer, reports, layers, mut stages, resumed, .. } = run;
    let output = writer.finish(meta).map_err(fail)?;
    check_interrupt()?;
    output.commit()?;
    stages.output += writing.elapsed().as_secs_f64();
    let mut report = make_report(job, reports, calibration_tokens, meta);
    layers.iter().for_each(|layer| stages.add(&layer.stages));
    report.stages = stages;
    report.layers = layers;
    report.resumed_layers = resumed;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// The text of everything that the bytes of the file depend on.
fn key(job: &Job<'_>, meta: &Meta, model: &Model) -> String {
    let mut text = format!("{meta:?}\n{}\n", model.isa.name());
    for tensor in &job.plan.tensors {
        text += &format!("{} {:?} {:?}\n", tensor.name, tensor.shape, tensor.treatment);
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
        notes: job.plan.notes(),
        seconds: 0.0,
        resumed_layers: 0,
        stages: Stages::default(),
        layers: Vec::new(),
        tensors,
    }
}

/// [`Interrupted`] if the user has asked to stop.
fn check_interrupt() -> anyhow::Result<()> {
    if interrupted() { Err(Interrupted::AtOnce.into()) } else { Ok(()) }
}

/// A conversion on its way.
struct Run<'a> {
    job: &'a Job<'a>,
    model: Model,
    writer: Writer<Output>,
    workspace: &'a mut Workspace,
    reports: Vec<TensorReport>,
    layers: Vec<LayerReport>,
    /// Of the layer at work; outside the layers, of what is outside.
    stages: Stages,
    /// Layers taken over from a run that was stopped.
    resumed: usize,
}

/// The inputs of a decoder layer, [tokens, hidden] for each sequence.
#[derive(Default)]
struct Hidden {
    /// Behind the quantised layers so far.
    quantised: States,
    /// Behind the layers so far that were only pruned, for masks of a pass of their own.
    pruned: States,
    /// Behind the layers so far of the dense model, for targets from it.
    dense: States,
}

impl Hidden {
    /// All of them, for what is kept of an unfinished conversion.
    fn all(&mut self) -> [&mut States; 3] {
        [&mut self.quantised, &mut self.pruned, &mut self.dense]
    }
}

/// Second moments of one input of a decoder layer, damped and factored.
struct Moments {
    hessian: Hessian,
    factor: Factor,
    norms: Vec<f32>,
    /// How far the input is from that of the dense model, if that is the target.
    shift: Option<Shift>,
}

/// A tensor that has been quantised.
struct Done {
    packed: Packed,
    error: f64,
    seconds: f64,
}

/// Keeps what it sees, in the order of [`LinearInput::ALL`].
#[derive(Default)]
struct Capture([Vec<f32>; 4]);

impl Observer for Capture {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        self.0[input.index()] = x.to_vec();
        ControlFlow::Continue(())
    }
}

impl Run<'_> {
    /// Writes all tensors; returns the number of calibration tokens.
    fn all_tensors(&mut self, progress: &dyn Progress) -> anyhow::Result<usize> {
        let job = self.job;
        let layers = self.model.layers.len();
        let mut hidden = self.embedded()?;
        let tokens = hidden.quantised.iter().map(Vec::len).sum::<usize>() / self.model.norm.len();
        let mut tensors = job.plan.tensors.iter().peekable();
        let before: Vec<_> =
            std::iter::from_fn(|| tensors.next_if(|t| t.layer().is_none())).collect();
        self.outside(&before)?;
        let parts: Vec<Vec<&TensorPlan>> = (0..layers)
            .map(|index| {
                std::iter::from_fn(|| {
                    tensors.next_if(|t| t.layer().is_some_and(|(i, _)| i == index))
                })
                .collect()
            })
            .collect();
        let outside = std::mem::take(&mut self.stages);
        let finished = self.take_over(&parts, &mut hidden, progress)?;
        for (index, part) in parts.iter().enumerate().skip(finished) {
            self.layer(index, part, &mut hidden, progress)?;
        }
        self.stages = outside;
        let after: Vec<_> = tensors.collect();
        self.outside(&after)?;
        Ok(tokens)
    }

    /// The inputs of the first layer.
    fn embedded(&self) -> anyhow::Result<Hidden> {
        let job = self.job;
        let mut hidden = Hidden::default();
        if job.plan.needs_calibration() {
            let tokenizer = self.model.tokenizer()?;
            let options = &job.recipe.calibration;
            let length = options.length.min(job.checkpoint.spec.context_length as usize);
            let table = self.stored_embeddings()?;
            for window in job.calibration.windows(&tokenizer, options, length)? {
                let mut states = Vec::new();
                self.model.embed(&window, &mut states)?;
                if job.recipe.calibration.follows_dense()? {
                    hidden.dense.push(states.clone());
                }
                if let Some(table) = &table {
                    let width = table.cols();
                    for (token, state) in window.iter().zip(states.chunks_exact_mut(width)) {
                        table.view().decode_row(*token as usize, state);
                    }
                }
                hidden.quantised.push(states);
            }
        }
        if job.plan.prunes_first() {
            hidden.pruned.clone_from(&hidden.quantised);
        }
        Ok(hidden)
    }

    /// The embeddings as they will be stored, if layers are to see those.
    fn stored_embeddings(&self) -> anyhow::Result<Option<Weight>> {
        let name = "model.embed_tokens.weight";
        let plan = self.job.plan.tensors.iter().find(|t| t.name == name);
        let Some(plan) = plan.filter(|_| self.job.recipe.calibration.refreshed().unwrap_or(false))
        else {
            return Ok(None);
        };
        let weight = self.job.checkpoint.weight(name)?;
        let packed = without_inputs(plan, &weight, &finite(&weight, name)?);
        let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
        Ok(Some(Weight::from_payload(&packed.payload, packed.encoding, rows, cols)?))
    }

    /// Writes the layers that a run before has finished; returns their number.
    fn take_over(
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
        let mut states = hidden.all();
        let complete = saved.len() == finished
            && (finished == parts.len() || self.workspace.load_states(&mut states).is_some());
        if !complete {
            progress.note("what was kept of an unfinished conversion is damaged: it starts anew");
            self.workspace.forget();
            *hidden = self.embedded()?;
            return Ok(0);
        }
        for (part, layer) in parts.iter().zip(saved) {
            for ((tensor, payload), report) in part.iter().zip(&layer.payloads).zip(layer.tensors) {
                let encoding = tensor.treatment.encoding();
                self.writer
                    .tensor(&tensor.name, &tensor.shape, &encoding, payload)
                    .map_err(|e| Error::io(self.job.target, e))?;
                self.reports.push(report);
            }
            self.layers.push(layer.layer);
        }
        self.resumed = finished;
        progress.note(&format!("going on after {finished} of {} decoder layers", parts.len()));
        Ok(finished)
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
            let seconds = started.elapsed().as_secs_f64();
            self.write(tensor, &Done { packed, error, seconds })?;
        }
        Ok(())
    }

    fn write(&mut self, tensor: &TensorPlan, done: &Done) -> anyhow::Result<()> {
        let target = self.job.target;
        let Done { packed, error, seconds } = done;
        self.stages.quantiser.add(&packed.seconds);
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
            relative_error: *error,
            salient: packed.salient,
            seconds: *seconds,
        });
        Ok(())
    }

    /// One decoder layer: statistics with its weights as they are, all its tensors, then the hidden
    /// states that the next layer will really see.
    fn layer(
        &mut self,
        index: usize,
        tensors: &[&TensorPlan],
        hidden: &mut Hidden,
        progress: &dyn Progress,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let layers = self.model.layers.len();
        self.stages = Stages::default();
        // Units of progress: calibration, each tensor, the second forward pass.
        let units = tensors.len() as u64 + 3;
        let step = |done: u64, what: &str| {
            let text = format!("layer {} of {layers}: {what}", index + 1);
            progress.step(index as u64 * units + done, layers as u64 * units, &text);
        };
        step(0, "calibration");
        let linear = tensors.iter().any(|t| matches!(t.treatment, Treatment::Linear(_)));
        for tensor in tensors {
            finite(&self.job.checkpoint.weight(&tensor.name)?, &tensor.name)?;
        }
        let dense = self.model.layers[index].clone();
        let mut layer = dense.clone();
        let pruned = self.prune_first(tensors, &mut layer, &mut hidden.pruned)?;
        let refreshed = linear && self.job.recipe.calibration.refreshed()?;
        let mut moments: [Option<Moments>; 4] = Default::default();
        if linear && !refreshed {
            moments = self.moments(&layer, &hidden.quantised)?.map(Some);
        }
        let mut finished: Vec<Option<Done>> = tensors.iter().map(|_| None).collect();
        // In the order of computation, so that each input is behind what has been quantised.
        let place = |i: &usize| {
            let part = tensors[*i].layer().map_or("", |(_, part)| part);
            (input_of(part).map_or(0, |input| input + 1), *i)
        };
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(place);
        for (done, i) in order.into_iter().enumerate() {
            check_interrupt()?;
            let part = tensors[i].layer().map_or("", |(_, part)| part);
            step(1 + done as u64, part);
            let input = input_of(part);
            if let Some(input) = input.filter(|k| refreshed && moments[*k].is_none()) {
                // One at a time in memory.
                moments = Default::default();
                let which = LinearInput::ALL[input];
                moments[input] = Some(self.refreshed_moments(which, &layer, &dense, hidden)?);
            }
            let moments = input.and_then(|k| moments[k].as_ref());
            finished[i] =
                Some(self.layer_tensor(tensors[i], part, moments, pruned.get(part), &mut layer)?);
        }
        drop((moments, pruned));
        let mut next_dense = hidden.dense.clone();
        if index + 1 < layers || self.job.recipe.calibration.tuning()?.is_some() {
            self.forward(&dense, &mut next_dense)?;
        }
        if linear {
            step(units - 2, "tuning");
            self.tune(tensors, &mut layer, &mut finished, &hidden.quantised, &next_dense)?;
        }
        let (mut error, mut count, mut payloads) = (0.0, 0, Vec::new());
        for (tensor, done) in tensors.iter().zip(finished.into_iter().flatten()) {
            self.write(tensor, &done)?;
            if let Treatment::Linear(_) = tensor.treatment {
                error += done.error;
                count += 1;
            }
            payloads.push(done.packed.payload);
        }
        step(units - 1, "next inputs");
        if index + 1 < layers {
            self.forward(&layer, &mut hidden.quantised)?;
            hidden.dense = next_dense;
        } else {
            *hidden = Hidden::default();
        }
        let encoding = tensors
            .iter()
            .find(|t| t.shape.len() == 2)
            .map_or(String::new(), |t| t.treatment.encoding().to_string());
        let mean = error / f64::from(count.max(1));
        if self.job.plan.needs_calibration() {
            self.keep(index, mean, payloads, hidden, started)?;
        }
        progress.layer(index, layers, mean, &encoding, started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Tunes the layer as a whole, if the recipe says so, and takes over what has changed.
    fn tune(
        &mut self,
        tensors: &[&TensorPlan],
        layer: &mut Layer,
        finished: &mut [Option<Done>],
        inputs: &States,
        targets: &States,
    ) -> anyhow::Result<()> {
        let Some(options) = self.job.recipe.calibration.tuning()? else { return Ok(()) };
        let started = Instant::now();
        tune::tune(&self.model, layer, inputs, targets, options)?;
        check_interrupt()?;
        for (tensor, done) in tensors.iter().zip(finished) {
            let Some((Done { packed, .. }, (_, part))) = done.as_mut().zip(tensor.layer()) else {
                continue;
            };
            let norm = match part {
                "input_layernorm" => &mut layer.attention_norm,
                "post_attention_layernorm" => &mut layer.mlp_norm,
                _ => {
                    if let Some(weight) = layer.matrix_mut(part) {
                        packed.payload = weight.bytes().to_vec();
                    }
                    continue;
                }
            };
            if let Treatment::Keep(kind) = tensor.treatment {
                packed.payload = kind.encode(norm);
                // As it is stored.
                *norm = Weight::from_payload(
                    &packed.payload,
                    packed.encoding.clone(),
                    1,
                    norm.len() as u64,
                )?
                .decode();
                in_range(norm, &tensor.name)?;
            }
        }
        self.stages.tuning += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Keeps a finished layer for a later run and in the report.
    fn keep(
        &mut self,
        index: usize,
        relative_error: f64,
        payloads: Vec<Vec<u8>>,
        hidden: &mut Hidden,
        started: Instant,
    ) -> anyhow::Result<()> {
        let keeping = Instant::now();
        let tensors = self.reports[self.reports.len() - payloads.len()..].to_vec();
        let mut layer = LayerReport {
            index,
            relative_error,
            seconds: started.elapsed().as_secs_f64(),
            stages: self.stages,
        };
        let saved = SavedLayer { tensors, layer, payloads };
        self.workspace.save(index, &saved, &hidden.all())?;
        layer.stages.output += keeping.elapsed().as_secs_f64();
        layer.seconds = started.elapsed().as_secs_f64();
        self.layers.push(layer);
        Ok(())
    }

    /// The pruning pass of methods whose masks come from a pass of their own: prunes the layer
    /// against inputs behind pruned layers and makes those of the next. What this does layer by
    /// layer is what a pass over the whole model would do.
    fn prune_first<'t>(
        &mut self,
        tensors: &[&'t TensorPlan],
        layer: &mut Layer,
        states: &mut States,
    ) -> anyhow::Result<HashMap<&'t str, Pruned>> {
        let mut pruned = HashMap::new();
        if states.is_empty() {
            return Ok(pruned);
        }
        let moments = self.moments(layer, states)?;
        for tensor in tensors {
            check_interrupt()?;
            let part = tensor.layer().map_or("", |(_, part)| part);
            let Treatment::Linear(Method::Stbllm(options)) = tensor.treatment else { continue };
            let Some(input) = input_of(part) else { continue };
            let clock = Instant::now();
            let weight = self.job.checkpoint.weight(&tensor.name)?;
            let values = weight.decode();
            let result = stbllm::prune(&self.input(&values, &weight, &moments[input]), &options);
            let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
            let stored = Weight::from_floats(result.weights.clone(), rows, cols)?;
            put(layer, part, stored);
            pruned.insert(part, result);
            self.stages.quantiser.prune += clock.elapsed().as_secs_f64();
        }
        self.forward(layer, states)?;
        Ok(pruned)
    }

    fn input<'a>(&self, values: &'a [f32], weight: &Weight, moments: &'a Moments) -> Input<'a> {
        Input {
            isa: self.model.isa,
            weights: values,
            rows: weight.rows(),
            cols: weight.cols(),
            hessian: &moments.hessian,
            factor: &moments.factor,
            norms: &moments.norms,
        }
    }

    /// Quantises one tensor of a layer and puts it into `layer`.
    fn layer_tensor(
        &mut self,
        tensor: &TensorPlan,
        part: &str,
        moments: Option<&Moments>,
        pruned: Option<&Pruned>,
        layer: &mut Layer,
    ) -> anyhow::Result<Done> {
        let started = Instant::now();
        let weight = self.job.checkpoint.weight(&tensor.name)?;
        let mut values = weight.decode();
        let (packed, error) = match (tensor.treatment, moments) {
            (Treatment::Linear(method), Some(moments)) => {
                if let Some(shift) = &moments.shift {
                    let clock = Instant::now();
                    shift.apply(self.model.isa, &mut values);
                    self.stages.moments += clock.elapsed().as_secs_f64();
                }
                clear_dead(&mut values, &moments.norms);
                let input = self.input(&values, &weight, moments);
                let packed = linear(&input, method, pruned);
                let clock = Instant::now();
                let decoded = decode(&packed, &weight);
                in_range(&decoded, &tensor.name)?;
                let error = relative_error(&input, &decoded);
                self.stages.check += clock.elapsed().as_secs_f64();
                (packed, error)
            }
            _ => {
                let packed = without_inputs(tensor, &weight, &values);
                let error = squared_error(&packed, &weight, &values);
                (packed, error)
            }
        };
        let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
        put(
            layer,
            part,
            Weight::from_payload(&packed.payload, packed.encoding.clone(), rows, cols)?,
        );
        Ok(Done { packed, error, seconds: started.elapsed().as_secs_f64() })
    }

    /// Second moments of the four inputs of a layer, with its weights as they are.
    fn moments(&mut self, layer: &Layer, hidden: &[Vec<f32>]) -> anyhow::Result<[Moments; 4]> {
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
                Ok(Moments { hessian, factor, norms, shift: None })
            })
            .collect();
        self.stages.factors += started.elapsed().as_secs_f64();
        let all: Vec<Moments> = factored.into_iter().collect::<Result<_>>()?;
        let four = || Error::Internal { what: "a layer has four inputs".into() };
        Ok(all.try_into().map_err(|_| four())?)
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

/// Replaces a linear layer.
fn put(layer: &mut Layer, part: &str, weight: Weight) {
    if let Some(old) = layer.matrix_mut(part) {
        *old = weight;
    }
}
