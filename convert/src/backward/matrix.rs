//! Dense matrices, and decoder layers made of them.

use stb_kernels::{Isa, Panels};
use stb_runtime::{Layer, Weight};

use crate::products::product_of;

/// A dense matrix, [rows, cols]. As a gradient it is empty if the gradient is not needed.
#[derive(Clone, Debug, Default)]
pub(crate) struct DenseMatrix {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f32>,
}

/// The weights of a decoder layer, or gradients with respect to them.
pub(crate) type DenseLayer = Layer<DenseMatrix, Vec<f32>>;

/// The decoded weights of `layer`.
pub(crate) fn decode_layer(layer: &Layer) -> DenseLayer {
    layer.map(|_, weight| DenseMatrix::decoded(weight), |_, norm| norm.clone())
}

impl DenseMatrix {
    /// A matrix of zeros.
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, values: vec![0.0; rows * cols] }
    }

    /// The values of `weight`.
    pub fn decoded(weight: &Weight) -> Self {
        Self { rows: weight.rows(), cols: weight.cols(), values: weight.decode() }
    }

    /// `x` [tokens, cols] · Wᵀ: [tokens, rows].
    pub(super) fn apply(&self, isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack(&self.values, self.cols);
        product_of(isa, x, self.cols, &panels, self.rows)
    }

    /// `dy` [tokens, rows] · W: [tokens, cols].
    pub(super) fn apply_transposed(&self, isa: Isa, dy: &[f32]) -> Vec<f32> {
        let mut panels = Panels::default();
        panels.pack_transposed(&self.values, self.cols, self.rows, self.cols);
        product_of(isa, dy, self.rows, &panels, self.cols)
    }
}
