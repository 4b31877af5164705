//! One decoder layer: Hessians, its tensors, distillation, and the inputs of the next layer.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::arch::{InputMap, Linear, LinearInput, LinearMap, Role};
use stb_runtime::{Error, Layer, Model, Result, Weight};

use super::job::Progress;
use super::limits::BATCH;
use super::refresh::{ALL_SUBLAYERS, InputHessian, LayerPair, StreamPosition, StreamPositions};
use super::run::{Capture, Hidden, QuantizedTensor, Run};
use super::tensor::{
    check_range, decode_finite, pack_uncalibrated, squared_error, zero_dead_inputs,
};
use crate::distill;
use crate::hessian::Hessian;
use crate::interrupt::check_interrupt;
use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::{Input, Pruned, decode, relative_error};
use crate::report::{LayerReport, Stages};
use crate::resume::{SavedLayer, States};

/// A decoder layer while it is quantized.
pub(super) struct LayerInProgress {
    /// The layer of the checkpoint.
    pub(super) dense: Layer,
    /// The same with the linear layers that are quantized so far.
    pub(super) partial: Layer,
    /// How far the hidden states have advanced in it.
    pub(super) streams: StreamPositions,
}

impl<'r> Run<'r> {
    /// Converts one decoder layer: Hessians, all its tensors, distillation if the recipe asks for it, then the inputs
    /// of the next layer, computed with the quantized weights.
    pub(super) fn convert_layer(
        &mut self,
        index: usize,
        tensors: &[&TensorPlan],
        hidden: &mut Hidden,
        progress: &dyn Progress,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let layers = self.job.checkpoint.spec.layers as usize;
        self.stages = Stages::default();
        // Units of progress: calibration, each tensor, distillation, the inputs of the next layer.
        let units = tensors.len() as u64 + 3;
        let step = |done: u64, what: &str| {
            let text = format!("layer {} of {layers}: {what}", index + 1);
            progress.step(index as u64 * units + done, layers as u64 * units, &text);
        };
        step(0, "calibration");
        for tensor in tensors {
            decode_finite(&self.job.checkpoint.weight(&tensor.tensor.name)?, &tensor.tensor.name)?;
        }
        let is_quantized = tensors.iter().any(|t| matches!(t.method, TensorMethod::Linear(_)));
        let distilled = is_quantized && self.job.recipe.calibration.distill_layers.is_some();
        let dense = Model::load_layer(self.job.checkpoint, index)?;
        let streams = StreamPositions::default();
        let mut in_progress = LayerInProgress { partial: dense.clone(), dense, streams };
        // The hidden states advance while the layer is quantized. Distillation starts from the inputs of the
        // layer, so it keeps a copy.
        let inputs = if distilled { hidden.quantized.clone() } else { States::new() };
        let mut finished = self.quantize_layer(tensors, &mut in_progress, hidden, &step)?;
        let LayerInProgress { dense, mut partial, mut streams } = in_progress;
        self.advance_check(&dense, &mut hidden.check)?;
        if index + 1 < layers || distilled {
            self.advance(ALL_SUBLAYERS, &dense, &mut hidden.dense, &mut streams.dense)?;
        }
        if distilled {
            step(units - 2, "distillation");
            self.distill_layer(tensors, &mut partial, &mut finished, &inputs, &hidden.dense)?;
            (hidden.quantized, streams.quantized) = (inputs, StreamPosition::default());
        }
        let (error, payloads) = self.write_layer(tensors, finished)?;
        step(units - 1, "next inputs");
        if index + 1 < layers {
            self.advance(ALL_SUBLAYERS, &partial, &mut hidden.quantized, &mut streams.quantized)?;
        } else {
            *hidden = hidden.after_layers();
        }
        let encoding = tensors
            .iter()
            .find(|t| t.matrix().is_some())
            .map_or(String::new(), |t| t.method.encoding().to_string());
        let is_kept = tensors.iter().all(|t| matches!(t.method, TensorMethod::Keep(_)));
        if !is_kept || self.job.plan.needs_calibration() {
            self.save_layer(index, error, payloads, hidden, started)?;
        }
        progress.layer(index, layers, error, &encoding, started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Advances the streams of the check to the end of the dense `layer`.
    fn advance_check(&mut self, layer: &Layer, streams: &mut States) -> anyhow::Result<()> {
        let (started, forward) = (Instant::now(), self.stages.forward);
        self.advance(ALL_SUBLAYERS, layer, streams, &mut StreamPosition::default())?;
        self.stages.forward = forward;
        self.stages.quality += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Quantizes all tensors of a layer; returns them in the order of `tensors`. Calls `step` with the number of
    /// tensors done and the name of the next.
    fn quantize_layer(
        &mut self,
        tensors: &[&TensorPlan],
        layer: &mut LayerInProgress,
        hidden: &mut Hidden,
        step: &dyn Fn(u64, &str),
    ) -> anyhow::Result<Vec<QuantizedTensor>> {
        let is_quantized = tensors.iter().any(|t| matches!(t.method, TensorMethod::Linear(_)));
        let pruned = self.prune_layer(tensors, &mut layer.partial, &mut hidden.pruned)?;
        let refreshed = is_quantized && self.job.recipe.calibration.refreshed;
        let mut hessians: InputMap<Option<InputHessian>> = InputMap::default();
        if is_quantized && !refreshed {
            hessians = self.hessians(&layer.partial, &hidden.quantized)?.map(Some);
        }
        let mut finished: Vec<Option<QuantizedTensor>> = tensors.iter().map(|_| None).collect();
        // In the order of computation, so that a refreshed Hessian comes from the quantized linear layers before
        // it. Norms have no input and come first: None sorts before Some.
        let key = |i: &usize| (tensors[*i].linear().map(|(_, linear)| linear.input()), *i);
        let mut order: Vec<usize> =
            (0..tensors.len()).filter(|i| tensors[*i].expert().is_none()).collect();
        order.sort_by_key(key);
        for (done, i) in order.into_iter().enumerate() {
            check_interrupt()?;
            let linear = tensors[i].linear().map(|(_, linear)| linear);
            step(1 + done as u64, linear.map_or("norm", Linear::short_name));
            let input = linear.map(Linear::input);
            if let Some(input) = input.filter(|input| refreshed && hessians[*input].is_none()) {
                // Keep only one Hessian in memory.
                hessians = InputMap::default();
                let layers = LayerPair { partial: &layer.partial, dense: &layer.dense };
                hessians[input] =
                    Some(self.refreshed_hessian(input, layers, hidden, &mut layer.streams)?);
            }
            let hessian = input.and_then(|input| hessians[input].as_ref());
            let pruned = linear.and_then(|linear| pruned.get(linear));
            finished[i] =
                Some(self.quantize_tensor(tensors[i], hessian, pruned, &mut layer.partial)?);
        }
        self.expert_tokens = self.quantize_experts(tensors, layer, hidden, &mut finished, step)?;
        Ok(finished.into_iter().flatten().collect())
    }

    /// Writes the tensors of a layer. Returns the mean error of the quantized tensors, and all payloads.
    fn write_layer(
        &mut self,
        tensors: &[&TensorPlan],
        finished: Vec<QuantizedTensor>,
    ) -> anyhow::Result<(f64, Vec<Vec<u8>>)> {
        let (mut error, mut count, mut payloads) = (0.0, 0, Vec::new());
        for (tensor, done) in tensors.iter().zip(finished) {
            self.write(tensor, &done)?;
            if !matches!(tensor.method, TensorMethod::Keep(_)) {
                error += done.error;
                count += 1;
            }
            payloads.push(done.packed.payload);
        }
        Ok((error / f64::from(count.max(1)), payloads))
    }

    /// Distills the layer if the recipe asks for it, and updates the changed tensors in `finished`.
    fn distill_layer(
        &mut self,
        tensors: &[&TensorPlan],
        layer: &mut Layer,
        finished: &mut [QuantizedTensor],
        inputs: &States,
        targets: &States,
    ) -> anyhow::Result<()> {
        let Some(options) = self.job.recipe.calibration.distill_layers else { return Ok(()) };
        let started = Instant::now();
        distill::layer::distill_layer(&self.engine, layer, inputs, targets, options)?;
        check_interrupt()?;
        for (tensor, done) in tensors.iter().zip(finished) {
            let packed = &mut done.packed;
            match (tensor.tensor.role, tensor.method) {
                (Role::Norm(site), TensorMethod::Keep(kind)) => {
                    let norm = layer.norm_mut(site);
                    packed.payload = kind.encode(norm);
                    // The layer computes with the rounded norm.
                    let stored = packed.encoding.clone();
                    let width = norm.len() as u64;
                    *norm = Weight::from_payload(&packed.payload, stored, 1, width)?.decode();
                    check_range(norm, &tensor.tensor.name)?;
                }
                _ => {
                    let matrix = tensor.matrix().and_then(|(_, key)| layer.matrix(key));
                    if let Some(matrix) = matrix {
                        packed.payload = matrix.bytes().to_vec();
                    }
                }
            }
        }
        self.stages.distill_layers += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Adds a finished layer to the report, and saves it, so that the conversion can be resumed, unless it is quickly
    /// computed again.
    fn save_layer(
        &mut self,
        index: usize,
        relative_error: f64,
        payloads: Vec<Vec<u8>>,
        hidden: &mut Hidden,
        started: Instant,
    ) -> anyhow::Result<()> {
        let saving = Instant::now();
        let tensors = self.reports[self.reports.len() - payloads.len()..].to_vec();
        let mut layer = LayerReport {
            index,
            relative_error,
            seconds: started.elapsed().as_secs_f64(),
            stages: self.stages,
            expert_tokens: std::mem::take(&mut self.expert_tokens),
        };
        if self.job.plan.needs_calibration() {
            let saved = SavedLayer { tensors, layer: layer.clone(), payloads };
            self.workspace.save(index, &saved, &hidden.fields())?;
        }
        layer.stages.output += saving.elapsed().as_secs_f64();
        layer.seconds = started.elapsed().as_secs_f64();
        self.layers.push(layer);
        Ok(())
    }

    /// Prunes the layer for methods that prune the whole model before they quantize, with Hessians of inputs that
    /// the pruned layers before it compute, and computes the inputs of the next layer. The weights are those that
    /// pruning the whole model first would give.
    fn prune_layer(
        &mut self,
        tensors: &[&TensorPlan],
        layer: &mut Layer,
        states: &mut States,
    ) -> anyhow::Result<LinearMap<Pruned>> {
        let mut pruned = Vec::new();
        if states.is_empty() {
            return Ok(LinearMap::default());
        }
        let hessians = self.hessians(layer, states)?;
        for tensor in tensors {
            check_interrupt()?;
            let TensorMethod::Linear(method) = tensor.method else { continue };
            let Some((_, linear)) = tensor.linear() else { continue };
            let clock = Instant::now();
            let weight = self.job.checkpoint.weight(&tensor.tensor.name)?;
            let values = weight.decode();
            let input = self.quantizer_input(&values, &weight, &hessians[linear.input()]);
            let Some(result) = method.quantizer().prune(&input)? else { continue };
            let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
            *layer.linear_mut(linear) = Weight::from_floats(result.weights.clone(), rows, cols)?;
            pruned.push((linear, result));
            self.stages.quantizer.prune += clock.elapsed().as_secs_f64();
        }
        self.advance(ALL_SUBLAYERS, layer, states, &mut StreamPosition::default())?;
        Ok(pruned.into_iter().collect())
    }

    /// The input of a quantizer for `weight`, whose decoded values are `values`.
    fn quantizer_input<'i>(
        &self,
        values: &'i [f32],
        weight: &Weight,
        hessian: &'i InputHessian,
    ) -> Input<'i>
    where
        'r: 'i,
    {
        Input {
            compute: self.compute(),
            weights: values,
            rows: weight.rows(),
            cols: weight.cols(),
            hessian: &hessian.hessian,
            factor: &hessian.factor,
            norms: &hessian.norms,
            col_spreads: None,
        }
    }

    /// Quantizes one tensor; a linear layer replaces that of `layer`.
    pub(super) fn quantize_tensor(
        &mut self,
        tensor: &TensorPlan,
        hessian: Option<&InputHessian>,
        pruned: Option<&Pruned>,
        layer: &mut Layer,
    ) -> anyhow::Result<QuantizedTensor> {
        let started = Instant::now();
        let weight = self.job.checkpoint.weight(&tensor.tensor.name)?;
        let mut values = weight.decode();
        let (packed, error) = match (tensor.method, hessian) {
            (TensorMethod::Linear(method), Some(hessian)) => {
                if let Some(target) = &hessian.target {
                    let clock = Instant::now();
                    target.apply(self.compute(), &mut values)?;
                    self.stages.hessian += clock.elapsed().as_secs_f64();
                }
                zero_dead_inputs(&mut values, &hessian.norms);
                let input = self.quantizer_input(&values, &weight, hessian);
                let packed = method.quantizer().quantize(&input, pruned)?;
                let clock = Instant::now();
                let decoded = decode(&packed, input.rows, input.cols);
                check_range(&decoded, &tensor.tensor.name)?;
                let error = relative_error(&input, &decoded)?;
                self.stages.check += clock.elapsed().as_secs_f64();
                (packed, error)
            }
            _ => {
                let packed = pack_uncalibrated(tensor, &weight, &values);
                let error = squared_error(&packed, &weight, &values);
                (packed, error)
            }
        };
        if let Some((_, key)) = tensor.matrix()
            && let Some(matrix) = layer.matrix_mut(key)
        {
            let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
            *matrix = Weight::from_payload(&packed.payload, packed.encoding.clone(), rows, cols)?;
        }
        Ok(QuantizedTensor { packed, error, seconds: started.elapsed().as_secs_f64() })
    }

    /// The Hessians of the inputs of `layer`, damped and factored.
    fn hessians(
        &mut self,
        layer: &Layer,
        hidden: &[Vec<f32>],
    ) -> anyhow::Result<InputMap<InputHessian>> {
        let hessians = match self.accelerator {
            Some(accelerator) => self.hessians_on_device(accelerator, layer, hidden)?,
            None => self.hessians_on_cpu(layer, hidden)?,
        };
        let started = Instant::now();
        let damping = self.job.recipe.calibration.damping;
        let compute = self.compute();
        let factored: Vec<Result<(LinearInput, InputHessian)>> = hessians
            .into_entries()
            .into_par_iter()
            .map(|(input, mut hessian)| {
                let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
                hessian.damp(damping);
                let factor = compute.factor(&hessian)?;
                Ok((input, InputHessian { hessian, factor, norms, target: None }))
            })
            .collect();
        self.stages.factors += started.elapsed().as_secs_f64();
        let mut factored = factored.into_iter().collect::<Result<Vec<_>>>()?.into_iter();
        let missing = || Error::Internal { what: "an input without Hessian".into() };
        Ok(InputMap::try_from_fn(|_| factored.next().map(|(_, h)| h).ok_or_else(missing))?)
    }

    /// The Hessians of the inputs of `layer`, finished but not damped.
    fn hessians_on_cpu(
        &mut self,
        layer: &Layer,
        hidden: &[Vec<f32>],
    ) -> anyhow::Result<InputMap<Hessian>> {
        let mut hessians = InputMap::from_fn(|input| Hessian::new(layer.input_width(input)));
        for batch in hidden.chunks(BATCH) {
            check_interrupt()?;
            let started = Instant::now();
            let captured: Vec<Capture> = batch
                .par_iter()
                .map(|states| {
                    let mut capture = Capture::default();
                    self.engine.run_layer(layer, &mut states.clone(), &mut capture);
                    capture
                })
                .collect();
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            // Experts have Hessians of their own.
            for (input, hessian) in hessians.iter_mut().filter(|(_, hessian)| hessian.size > 0) {
                // One product for the whole batch: fewer passes over the matrix.
                let x = captured.iter().map(|c| &c.0[input][..]).collect::<Vec<_>>().concat();
                hessian.add(self.engine.isa, &x);
                captured.iter().for_each(|_| hessian.count_sequence());
            }
            self.stages.hessian += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        let all: Vec<&mut Hessian> = hessians.iter_mut().map(|(_, hessian)| hessian).collect();
        all.into_par_iter().for_each(Hessian::finish);
        self.stages.hessian += started.elapsed().as_secs_f64();
        Ok(hessians)
    }
}
