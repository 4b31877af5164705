//! The experts of a decoder layer. They are quantized one after another, each with the Hessians of its own tokens,
//! so that one expert is in memory at a time.

use std::time::Instant;

use stb_format::arch::{Linear, LinearInput};
use stb_runtime::{Assignment, Layer, LayerMatrix, Sublayer};

use super::layer::LayerInProgress;
use super::refresh::{InputHessian, KeepInput};
use super::run::{Hidden, QuantizedTensor, Run};
use crate::hessian::Hessian;
use crate::interrupt::check_interrupt;
use crate::plan::TensorPlan;

/// The inputs of the experts of a layer for all calibration sequences, and who reads them.
struct ExpertInputs {
    /// The normalized residual stream of each sequence, [tokens, hidden].
    x: Vec<Vec<f32>>,
    /// The experts of the tokens of each sequence.
    assignments: Vec<Vec<Assignment>>,
    /// The Hessian of all tokens: what an expert with few tokens is shrunk towards.
    mean: Hessian,
}

/// The tokens of one expert.
struct ExpertTokens {
    /// Their inputs, [tokens, hidden].
    x: Vec<f32>,
    /// The factor of the expert's output for each token.
    weights: Vec<f32>,
}

impl ExpertInputs {
    /// The tokens of `expert`, in order.
    fn of(&self, expert: usize) -> ExpertTokens {
        let hidden = self.mean.size;
        let mut tokens = ExpertTokens { x: Vec::new(), weights: Vec::new() };
        for (x, assignments) in self.x.iter().zip(&self.assignments) {
            for token in assignments.iter().filter(|token| token.expert == expert) {
                tokens.x.extend_from_slice(&x[token.token * hidden..][..hidden]);
                tokens.weights.push(token.weight);
            }
        }
        tokens
    }
}

impl Run<'_> {
    /// Quantizes the experts of a layer whose other linear layers are quantized, and fills their places in
    /// `finished`. Returns the number of calibration tokens of each expert.
    pub(super) fn quantize_experts(
        &mut self,
        tensors: &[&TensorPlan],
        layer: &mut LayerInProgress,
        hidden: &mut Hidden,
        finished: &mut [Option<QuantizedTensor>],
        step: &dyn Fn(u64, &str),
    ) -> anyhow::Result<Vec<u64>> {
        let count = layer.partial.experts().len();
        if count == 0 {
            return Ok(Vec::new());
        }
        let is_calibrated = tensors.iter().any(|t| t.expert().is_some() && t.is_calibrated());
        let inputs = match is_calibrated {
            true => Some(self.expert_inputs(layer, hidden)?),
            false => None,
        };
        let mut tokens_of_experts = Vec::new();
        let first = tensors.len() - 3 * count;
        for expert in 0..count {
            check_interrupt()?;
            let tokens = inputs.as_ref().map(|inputs| inputs.of(expert));
            let name = format!("expert {} of {count}", expert + 1);
            step((1 + first + 3 * expert) as u64, &name);
            for input in [LinearInput::GateUp, LinearInput::Down] {
                let hessian = match inputs.as_ref().zip(tokens.as_ref()) {
                    Some((inputs, tokens)) => {
                        Some(self.expert_hessian(&layer.partial, expert, input, inputs, tokens)?)
                    }
                    None => None,
                };
                for (tensor, finished) in tensors.iter().zip(&mut *finished) {
                    let is_here =
                        |(e, linear): (usize, Linear)| e == expert && linear.input() == input;
                    if tensor.expert().is_some_and(is_here) {
                        let done = self.quantize_tensor(
                            tensor,
                            hessian.as_ref(),
                            None,
                            &mut layer.partial,
                        )?;
                        *finished = Some(done);
                    }
                }
            }
            tokens_of_experts.extend(tokens.map(|tokens| tokens.weights.len() as u64));
        }
        Ok(tokens_of_experts)
    }

    /// Runs all sequences up to the router. They pass the attention sublayer, which is finished.
    fn expert_inputs(
        &mut self,
        layer: &mut LayerInProgress,
        hidden: &mut Hidden,
    ) -> anyhow::Result<ExpertInputs> {
        let LayerInProgress { partial, streams, .. } = layer;
        self.advance(1, partial, &mut hidden.quantized, &mut streams.quantized)?;
        let mut mean = Hessian::new(self.engine.model.hidden_size());
        let (mut all, mut assignments) = (Vec::new(), Vec::new());
        for stream in &mut hidden.quantized {
            check_interrupt()?;
            let started = Instant::now();
            let mut observer = KeepInput::up_to(LinearInput::GateUp);
            // The observer stops the sublayer, so the stream does not change.
            let _ = self.engine.run_sublayer(Sublayer::Mlp, partial, stream, &mut observer);
            assignments.push(self.engine.route(partial, &observer.x));
            self.stages.forward += started.elapsed().as_secs_f64();
            let started = Instant::now();
            mean.add(self.engine.isa, &observer.x);
            mean.count_sequence();
            self.stages.hessian += started.elapsed().as_secs_f64();
            all.push(observer.x);
        }
        mean.finish();
        Ok(ExpertInputs { x: all, assignments, mean })
    }

    /// The Hessian of an input of `expert`, damped and factored. A token counts with the square of its weight: so
    /// much does an error of the expert's output matter. With n tokens and d features, the Hessian of the tokens
    /// gets the weight n / (n + d): that of gate and up is shrunk towards that of all tokens of the layer, that of
    /// down, whose features are the expert's own, towards a multiple of the identity.
    fn expert_hessian(
        &mut self,
        layer: &Layer,
        expert: usize,
        input: LinearInput,
        inputs: &ExpertInputs,
        tokens: &ExpertTokens,
    ) -> anyhow::Result<InputHessian> {
        let started = Instant::now();
        let product = (input == LinearInput::Down)
            .then(|| self.engine.expert_product(layer, expert, &tokens.x));
        let x = product.as_ref().unwrap_or(&tokens.x);
        let features = match input {
            LinearInput::Down => layer.experts()[expert].get(Linear::Down).map_or(0, |w| w.cols()),
            _ => inputs.mean.size,
        };
        self.stages.forward += started.elapsed().as_secs_f64();
        let started = Instant::now();
        let weighed: Vec<f32> = x
            .chunks_exact(features)
            .zip(&tokens.weights)
            .flat_map(|(x, weight)| x.iter().map(move |x| x * weight))
            .collect();
        let mut hessian = Hessian::new(features);
        hessian.add(self.engine.isa, &weighed);
        inputs.x.iter().for_each(|_| hessian.count_sequence());
        hessian.finish();
        let target = (input != LinearInput::Down).then_some(&inputs.mean);
        hessian.shrink(tokens.weights.len(), target);
        self.stages.hessian += started.elapsed().as_secs_f64();
        let started = Instant::now();
        let norms = hessian.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        hessian.damp(self.job.recipe.calibration.damping);
        let factor = self.compute().factor(&hessian)?;
        self.stages.factors += started.elapsed().as_secs_f64();
        Ok(InputHessian { hessian, factor, norms, target: None })
    }
}

impl TensorPlan {
    /// The expert and the linear layer in it; `None` for other tensors.
    pub(super) fn expert(&self) -> Option<(usize, Linear)> {
        match self.matrix()? {
            (_, LayerMatrix::Expert(expert, linear)) => Some((expert, linear)),
            _ => None,
        }
    }
}
