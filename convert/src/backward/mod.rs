//! Gradients of a decoder layer and of the whole model.

mod activation;
mod attention;
mod experts;
mod gradient;
mod head;
mod layer;
mod matrix;
mod model;
mod norm;
mod record;
mod sink;

pub(crate) use head::{ModelHead, embedded_gradient, uncap};
pub(crate) use layer::{LayerFisher, Pass};
pub(crate) use matrix::{DenseLayer, DenseMatrix, decode_layer};
pub(crate) use model::{RowWeights, TableStatistics, backpropagate};

#[cfg(test)]
mod tests;
