//! One decoder layer: statistics, its tensors, tuning, and what the next layer sees.

use std::collections::HashMap;
use std::time::Instant;

use rayon::prelude::*;
use stb_runtime::{Error, Layer, LinearInput, Result, Weight};

use super::job::Progress;
use super::limits::BATCH;
use super::refresh::{Moments, Place, Walk};
use super::run::{Capture, Done, Hidden, Run};
use super::tensor::{clear_dead, finite, in_range, squared_error, without_inputs};
use crate::hessian::Hessian;
use crate::interrupt::check_interrupt;
use crate::plan::{TensorMethod, TensorPlan, input_of};
use crate::quantize::{Input, Pruned, decode, relative_error};
use crate::report::{LayerReport, Stages};
use crate::resume::{SavedLayer, States};
use crate::tune;

impl<'r> Run<'r> {
    /// One decoder layer: statistics with its weights as they are, all its tensors, then the hidden
    /// states that the next layer will really see.
    pub(super) fn layer(
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
        let linear = tensors.iter().any(|t| matches!(t.treatment, TensorMethod::Linear(_)));
        for tensor in tensors {
            finite(&self.job.checkpoint.weight(&tensor.name)?, &tensor.name)?;
        }
        let dense = self.model.layers[index].clone();
        let mut layer = dense.clone();
        let pruned = self.prune_first(tensors, &mut layer, &mut hidden.pruned)?;
        let refreshed = linear && self.job.recipe.calibration.refreshed;
        let mut walk = Walk::default();
        let tuned = linear && self.job.recipe.calibration.distill_layers.is_some();
        // Streams advance while the layer is quantized; tuning starts from its inputs.
        let inputs = if tuned { hidden.quantized.clone() } else { States::new() };
        let mut moments: [Option<Moments>; 4] = Default::default();
        if linear && !refreshed {
            moments = self.moments(&layer, &hidden.quantized)?.map(Some);
        }
        let mut finished: Vec<Option<Done>> = tensors.iter().map(|_| None).collect();
        // In the order of computation, so that each input is behind what has been quantized.
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
                moments[input] =
                    Some(self.refreshed_moments(which, &layer, &dense, hidden, &mut walk)?);
            }
            let moments = input.and_then(|k| moments[k].as_ref());
            finished[i] =
                Some(self.layer_tensor(tensors[i], part, moments, pruned.get(part), &mut layer)?);
        }
        drop((moments, pruned));
        if index + 1 < layers || tuned {
            self.advance(2, &dense, &mut hidden.dense, &mut walk.dense)?;
        }
        if tuned {
            step(units - 2, "tuning");
            self.tune(tensors, &mut layer, &mut finished, &inputs, &hidden.dense)?;
            (hidden.quantized, walk.quantized) = (inputs, Place::default());
        }
        let (mut error, mut count, mut payloads) = (0.0, 0, Vec::new());
        for (tensor, done) in tensors.iter().zip(finished.into_iter().flatten()) {
            self.write(tensor, &done)?;
            if let TensorMethod::Linear(_) = tensor.treatment {
                error += done.error;
                count += 1;
            }
            payloads.push(done.packed.payload);
        }
        step(units - 1, "next inputs");
        if index + 1 < layers {
            self.advance(2, &layer, &mut hidden.quantized, &mut walk.quantized)?;
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
        let Some(options) = self.job.recipe.calibration.distill_layers else { return Ok(()) };
        let started = Instant::now();
        tune::layer::tune(&self.model, layer, inputs, targets, options)?;
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
            if let TensorMethod::Keep(kind) = tensor.treatment {
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
            let TensorMethod::Linear(method) = tensor.treatment else { continue };
            let Some(input) = input_of(part) else { continue };
            let clock = Instant::now();
            let weight = self.job.checkpoint.weight(&tensor.name)?;
            let values = weight.decode();
            let input = self.input(&values, &weight, &moments[input]);
            let Some(result) = method.quantizer().prune(&input)? else { continue };
            let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
            let stored = Weight::from_floats(result.weights.clone(), rows, cols)?;
            put(layer, part, stored);
            pruned.insert(part, result);
            self.stages.quantizer.prune += clock.elapsed().as_secs_f64();
        }
        self.advance(2, layer, states, &mut Place::default())?;
        Ok(pruned)
    }

    fn input<'i>(&self, values: &'i [f32], weight: &Weight, moments: &'i Moments) -> Input<'i>
    where
        'r: 'i,
    {
        Input {
            engine: self.engine(),
            weights: values,
            rows: weight.rows(),
            cols: weight.cols(),
            hessian: &moments.hessian,
            factor: &moments.factor,
            norms: &moments.norms,
        }
    }

    /// Quantizes one tensor of a layer and puts it into `layer`.
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
            (TensorMethod::Linear(method), Some(moments)) => {
                if let Some(shift) = &moments.shift {
                    let clock = Instant::now();
                    shift.apply(self.engine(), &mut values)?;
                    self.stages.moments += clock.elapsed().as_secs_f64();
                }
                clear_dead(&mut values, &moments.norms);
                let input = self.input(&values, &weight, moments);
                let packed = method.quantizer().quantize(&input, pruned)?;
                let clock = Instant::now();
                let decoded = decode(&packed, input.rows, input.cols);
                in_range(&decoded, &tensor.name)?;
                let error = relative_error(&input, &decoded)?;
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
        let hessians = match self.accelerator {
            Some(accelerator) => self.sums_on_device(accelerator, layer, hidden)?,
            None => self.sums(layer, hidden)?,
        };
        let started = Instant::now();
        let damping = self.job.recipe.calibration.damping;
        let engine = self.engine();
        let factored: Vec<Result<Moments>> = hessians
            .into_par_iter()
            .map(|mut hessian| {
                let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
                hessian.damp(damping);
                let factor = engine.factor(&hessian)?;
                Ok(Moments { hessian, factor, norms, shift: None })
            })
            .collect();
        self.stages.factors += started.elapsed().as_secs_f64();
        let all: Vec<Moments> = factored.into_iter().collect::<Result<_>>()?;
        let four = || Error::Internal { what: "a layer has four inputs".into() };
        Ok(all.try_into().map_err(|_| four())?)
    }

    /// Second moments of the four inputs, finished.
    fn sums(&mut self, layer: &Layer, hidden: &[Vec<f32>]) -> anyhow::Result<Vec<Hessian>> {
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
                let x = captured.iter().map(|c| &c.0[k][..]).collect::<Vec<_>>().concat();
                hessian.add(self.model.isa, &x);
                captured.iter().for_each(|_| hessian.count_sequence());
            }
            self.stages.moments += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        hessians.par_iter_mut().for_each(Hessian::finish);
        self.stages.moments += started.elapsed().as_secs_f64();
        Ok(hessians.into())
    }
}

/// Replaces a linear layer.
fn put(layer: &mut Layer, part: &str, weight: Weight) {
    if let Some(old) = layer.matrix_mut(part) {
        *old = weight;
    }
}
