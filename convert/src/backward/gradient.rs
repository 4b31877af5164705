//! The backward pass of a decoder layer.

use std::borrow::Cow;

use rayon::prelude::*;
use stb_format::arch::{Linear, LinearInput, MlpKind, NormPlacement, NormSite};
use stb_runtime::block::{BlockScratch, ExpertsLayer};
use stb_runtime::{Engine, LayerMatrix, LayerVector, Sublayer};

use super::activation::{gated_gradients, slope};
use super::attention::SequenceAttention;
use super::matrix::DenseLayer;
use super::norm::NormOp;
use super::record::Recording;
use super::sink::{GradientSink, accumulate};

/// The backward pass of a decoder layer for sequences of one length. Hands the gradients of norms and linear layers
/// to a sink, from the last to the first. Biases have no gradients: nothing trains them.
pub(super) struct LayerGradient<'a> {
    engine: &'a Engine,
    /// Tokens of each sequence.
    length: usize,
    weights: &'a DenseLayer,
    recording: &'a Recording,
    /// The inputs of the norms that come before the present operation, in the order of computation.
    norm_inputs: std::slice::Iter<'a, Vec<f32>>,
    sink: &'a mut dyn GradientSink,
}

impl<'a> LayerGradient<'a> {
    pub fn new(
        engine: &'a Engine,
        length: usize,
        weights: &'a DenseLayer,
        recording: &'a Recording,
        sink: &'a mut dyn GradientSink,
    ) -> Self {
        let norm_inputs = recording.norm_inputs.iter();
        Self { engine, length, weights, recording, norm_inputs, sink }
    }

    /// The gradient of the input of the layer, given that of its output; both are [tokens, hidden].
    pub fn input(mut self, d_out: Vec<f32>) -> Vec<f32> {
        let mut d_residual = d_out;
        self.sublayer(Sublayer::Mlp, &mut d_residual);
        self.sublayer(Sublayer::Attention, &mut d_residual);
        d_residual
    }

    /// Turns the gradient of the residual stream after a sublayer into that before it, [tokens, hidden].
    fn sublayer(&mut self, sublayer: Sublayer, d_residual: &mut Vec<f32>) {
        let (site, output_site) = match sublayer {
            Sublayer::Attention => (NormSite::Attention, NormSite::AttentionOutput),
            Sublayer::Mlp => (NormSite::Mlp, NormSite::MlpOutput),
        };
        let placement = self.weights.block.norm.placement;
        if placement == NormPlacement::Post {
            *d_residual = self.norm(site, d_residual);
        }
        let d_output: Cow<'_, [f32]> = match placement {
            NormPlacement::Sandwich => self.norm(output_site, d_residual).into(),
            NormPlacement::Pre | NormPlacement::Post => (&d_residual[..]).into(),
        };
        let d_input = match sublayer {
            Sublayer::Attention => self.attention(&d_output),
            Sublayer::Mlp => self.mlp(&d_output),
        };
        drop(d_output);
        // A sublayer adds its output to its input: the gradient passes unchanged and through the sublayer.
        match placement {
            NormPlacement::Pre | NormPlacement::Sandwich => {
                self.add_norm(site, &d_input, d_residual);
            }
            NormPlacement::Post => accumulate(d_residual, &d_input),
        }
    }

    /// The gradient of the MLP's input, given that of its output; both are [tokens, hidden].
    fn mlp(&mut self, d_out: &[f32]) -> Vec<f32> {
        let (isa, recording, weights) = (self.engine.isa, self.recording, self.weights);
        let mlp = &weights.block.mlp;
        if let (Some(recorded), Some(spec), Some(router)) =
            (&recording.experts, mlp.experts, weights.router())
        {
            let layer = ExpertsLayer { spec, router, experts: weights.experts() };
            return recorded.backward(self.engine, &layer, d_out, self.sink);
        }
        self.sink.matrix(
            LayerMatrix::Linear(Linear::Down),
            d_out,
            &recording.inputs[LinearInput::Down],
        );
        let d_product = weights.linear(Linear::Down).apply_transposed(isa, d_out);
        let BlockScratch { gate, up, .. } = &recording.block;
        let input = &recording.inputs[LinearInput::GateUp];
        let up_gradient = |d_up: &[f32]| weights.linear(Linear::Up).apply_transposed(isa, d_up);
        match mlp.kind {
            MlpKind::Gated => {
                let (d_gate, d_up): (Vec<f32>, Vec<f32>) = d_product
                    .par_iter()
                    .zip(gate)
                    .zip(up)
                    .map(|((d, g), u)| gated_gradients(mlp.activation, *d, *g, *u))
                    .unzip();
                self.sink.matrix(LayerMatrix::Linear(Linear::Gate), &d_gate, input);
                self.sink.matrix(LayerMatrix::Linear(Linear::Up), &d_up, input);
                let mut d_input = weights.linear(Linear::Gate).apply_transposed(isa, &d_gate);
                accumulate(&mut d_input, &up_gradient(&d_up));
                d_input
            }
            MlpKind::Plain => {
                let d_up = d_product.par_iter().zip(up).map(|(d, u)| d * slope(mlp.activation, *u));
                let d_up: Vec<f32> = d_up.collect();
                self.sink.matrix(LayerMatrix::Linear(Linear::Up), &d_up, input);
                up_gradient(&d_up)
            }
        }
    }

    /// The gradient of the input of attention, given that of `o`'s output; both are [tokens, hidden].
    fn attention(&mut self, d_out: &[f32]) -> Vec<f32> {
        let (isa, recording, weights) = (self.engine.isa, self.recording, self.weights);
        self.sink.matrix(
            LayerMatrix::Linear(Linear::O),
            d_out,
            &recording.inputs[LinearInput::AttentionOutput],
        );
        let d_attn_out = weights.linear(Linear::O).apply_transposed(isa, d_out);
        let [mut dq, mut dk, dv] = self.qkv(&d_attn_out);
        // Keys were normalized after queries.
        for (site, d) in [(NormSite::Key, &mut dk), (NormSite::Query, &mut dq)] {
            if weights.vector(LayerVector::Norm(site)).is_some() {
                *d = self.norm(site, d);
            }
        }
        let input = &recording.inputs[LinearInput::Qkv];
        let mut d_input = weights.linear(Linear::Q).apply_transposed(isa, &dq);
        for (linear, d) in [(Linear::Q, &dq), (Linear::K, &dk), (Linear::V, &dv)] {
            self.sink.matrix(LayerMatrix::Linear(linear), d, input);
            if linear != Linear::Q {
                accumulate(&mut d_input, &weights.linear(linear).apply_transposed(isa, d));
            }
        }
        d_input
    }

    /// The gradients of queries and keys before RoPE, and of values, given that of the attention output,
    /// [tokens, heads · head_dim].
    fn qkv(&self, d_attn_out: &[f32]) -> [Vec<f32>; 3] {
        let BlockScratch { q, k, v, .. } = &self.recording.block;
        let (engine, block) = (self.engine, &*self.weights.block);
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![0.0; x.len()]);
        let [q_width, kv_width] = [Linear::Q, Linear::K].map(|l| self.weights.linear(l).rows);
        let (q_size, kv_size) = (self.length * q_width, self.length * kv_width);
        let sequences = q
            .par_chunks_exact(q_size)
            .zip(k.par_chunks_exact(kv_size))
            .zip(v.par_chunks_exact(kv_size));
        dq.par_chunks_exact_mut(q_size)
            .zip(dk.par_chunks_exact_mut(kv_size))
            .zip(dv.par_chunks_exact_mut(kv_size))
            .zip(d_attn_out.par_chunks_exact(q_size))
            .zip(sequences)
            .for_each(|((((dq, dk), dv), d_attn_out), ((q, k), v))| {
                let sequence = SequenceAttention::new(engine.isa, &block.attention, [q, k, v]);
                sequence.backward(d_attn_out, dq, dk, dv);
                engine.rotate(block, dq, q_width, true);
                engine.rotate(block, dk, kv_width, true);
            });
        [dq, dk, dv]
    }

    /// The gradient of the input of a norm, given that of its output.
    fn norm(&mut self, site: NormSite, dy: &[f32]) -> Vec<f32> {
        let mut dx = vec![0.0; dy.len()];
        self.add_norm(site, dy, &mut dx);
        dx
    }

    /// Adds the gradient of the input of a norm to `dx`, given that of its output.
    fn add_norm(&mut self, site: NormSite, dy: &[f32], dx: &mut [f32]) {
        let x = self.norm_inputs.next_back().expect("the recorded input of each norm");
        let weight = self.weights.norm(site);
        let mut dw = vec![0.0; weight.len()];
        // The bias has no effect on gradients.
        let (isa, norm) = (self.engine.isa, self.weights.block.norm);
        NormOp { isa, norm, weight, bias: None }.backward(x, dy, dx, &mut dw);
        self.sink.norm(site, &dw);
    }
}
