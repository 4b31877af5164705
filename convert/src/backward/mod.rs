//! Gradients: of a decoder layer, and of what the whole model says.

mod attention;
mod layer;
mod model;

pub(crate) use layer::{LayerSlopes, LayerWeights, Matrix, Pass};
pub(crate) use model::{Ends, logits, logits_back, through};
