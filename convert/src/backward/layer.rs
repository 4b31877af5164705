//! A decoder layer forward and backward.

use rayon::prelude::*;
use stb_format::arch::{InputMap, NormSite};
use stb_kernels::Isa;
use stb_runtime::{Engine, LayerMatrix};

use super::experts::ExpertPart;
use super::gradient::LayerGradient;
use super::matrix::DenseLayer;
use super::record::{Recording, record};
use super::sink::{GradientSink, accumulate};
use crate::products::add_cross_products;

/// The inputs of the linear layers of a decoder layer and the Fisher diagonal of their outputs.
pub(crate) struct LayerFisher {
    /// The inputs, [tokens, in].
    pub inputs: InputMap<Vec<f32>>,
    /// The inputs of the experts that have tokens, if the layer is a mixture of experts.
    pub experts: Vec<ExpertPart>,
    /// The mean square of the gradient of each output over the tokens of the matrix, `[out]`.
    pub outputs: Vec<(LayerMatrix, Vec<f32>)>,
}

impl LayerFisher {
    /// The mean squares of the gradients of the outputs of a matrix; `None` for an expert without tokens.
    pub fn outputs_of(&self, key: LayerMatrix) -> Option<&Vec<f32>> {
        self.outputs.iter().find(|(k, _)| *k == key).map(|(_, squares)| squares)
    }
}

/// Sums the gradients of weights over all calls.
struct WeightGradients<'a> {
    isa: Isa,
    sums: &'a mut DenseLayer,
}

impl GradientSink for WeightGradients<'_> {
    fn matrix(&mut self, key: LayerMatrix, d: &[f32], x: &[f32]) {
        let sum = self.sums.matrix_mut(key).filter(|sum| !sum.values.is_empty());
        if let Some(sum) = sum {
            add_cross_products(self.isa, d, sum.rows, x, sum.cols, &mut sum.values);
        }
    }

    fn norm(&mut self, site: NormSite, d: &[f32]) {
        accumulate(self.sums.norm_mut(site), d);
    }
}

/// The mean squares of the gradients of the outputs of linear layers.
struct OutputSquares {
    squares: Vec<(LayerMatrix, Vec<f32>)>,
    rows: Vec<(LayerMatrix, usize)>,
}

impl GradientSink for OutputSquares {
    fn matrix(&mut self, key: LayerMatrix, d: &[f32], _: &[f32]) {
        if let Some((_, rows)) = self.rows.iter().find(|(k, _)| *k == key) {
            self.squares.push((key, mean_squares(d, *rows)));
        }
    }

    fn norm(&mut self, _: NormSite, _: &[f32]) {}
}

/// The forward and backward pass of a decoder layer for sequences of one length.
pub(crate) struct Pass<'a> {
    pub engine: &'a Engine,
    /// Tokens of each sequence.
    pub length: usize,
}

impl Pass<'_> {
    /// Σ (out − target)², for sequences `x`, [sequences · length, hidden].
    pub fn error(&self, weights: &DenseLayer, x: Vec<f32>, target: &[f32]) -> f64 {
        squared_distance(&self.forward(weights, x).out, target)
    }

    /// The layer's output for sequences `x`; both are [sequences · length, hidden].
    pub fn output(&self, weights: &DenseLayer, x: Vec<f32>) -> Vec<f32> {
        self.forward(weights, x).out
    }

    /// Adds the gradient of ½ Σ (out − target)² to `gradient`, for the weights of all norms and for the linear
    /// layers whose matrices in it are not empty. Returns Σ (out − target)².
    pub fn gradient(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        target: &[f32],
        gradient: &mut DenseLayer,
    ) -> f64 {
        let recording = self.forward(weights, x);
        let error = squared_distance(&recording.out, target);
        let d_out: Vec<f32> =
            recording.out.par_iter().zip(target).map(|(out, target)| out - target).collect();
        let mut sink = WeightGradients { isa: self.engine.isa, sums: gradient };
        self.backward(weights, &recording, d_out, &mut sink);
        error
    }

    /// The gradient of a loss with respect to the input `x`, given `d_out`, the gradient with respect to the
    /// output; all are [tokens, hidden]. Adds the gradient of the weights to `gradient`, as
    /// [`Pass::gradient`] does.
    pub fn input_gradient(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        d_out: Vec<f32>,
        gradient: &mut DenseLayer,
    ) -> Vec<f32> {
        let recording = self.forward(weights, x);
        let mut sink = WeightGradients { isa: self.engine.isa, sums: gradient };
        self.backward(weights, &recording, d_out, &mut sink)
    }

    /// The Fisher diagonal of the linear layers, and the gradient of the loss with respect to the input `x`,
    /// given `d_out`, the gradient with respect to the output; all are [tokens, hidden].
    pub fn fisher(
        &self,
        weights: &DenseLayer,
        x: Vec<f32>,
        d_out: Vec<f32>,
    ) -> (LayerFisher, Vec<f32>) {
        let recording = self.forward(weights, x);
        let rows = weights.matrices().map(|(key, matrix)| (key, matrix.rows)).collect();
        let mut sink = OutputSquares { squares: Vec::new(), rows };
        let d_in = self.backward(weights, &recording, d_out, &mut sink);
        let experts = recording.experts.map(|experts| experts.parts).unwrap_or_default();
        (LayerFisher { inputs: recording.inputs, experts, outputs: sink.squares }, d_in)
    }

    fn forward(&self, weights: &DenseLayer, x: Vec<f32>) -> Recording {
        record(self.engine, self.length, weights, x)
    }

    fn backward(
        &self,
        weights: &DenseLayer,
        recording: &Recording,
        d_out: Vec<f32>,
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        LayerGradient::new(self.engine, self.length, weights, recording, sink).input(d_out)
    }
}

/// Σ x² / tokens of each column of `x`, [tokens, width].
pub(crate) fn mean_squares(x: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for x in x.chunks_exact(width) {
        sums.iter_mut().zip(x).for_each(|(s, x)| *s += x * x);
    }
    let tokens = (x.len() / width).max(1) as f32;
    sums.iter_mut().for_each(|s| *s /= tokens);
    sums
}

/// Σ (a − b)² in f64, added in order so that threads do not change the result.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let part = |(a, b): (&[f32], &[f32])| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    a.par_chunks(4096).zip(b.par_chunks(4096)).map(part).collect::<Vec<f64>>().into_iter().sum()
}
