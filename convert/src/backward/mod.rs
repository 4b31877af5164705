//! Gradients of a decoder layer and of the whole model.

mod attention;
mod layer;
mod matrix;
mod model;
mod record;

pub(crate) use layer::{LayerFisher, Pass};
pub(crate) use matrix::{DenseLayer, DenseMatrix, decode_layer};
pub(crate) use model::{TableStatistics, backpropagate, logits, logits_backward};
