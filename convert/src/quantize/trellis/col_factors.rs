//! Column factors: the tables are for weights with a normal distribution, and a few columns of large weights, as the
//! embeddings of many models have them, make a mixture of wide and narrow ones of that. Divided by the spread of its
//! column, each weight has the distribution that the tables are for. A factor takes 16 bits per column.

use std::borrow::Cow;

use stb_format::half::f16;

use crate::hessian::{Factor, Hessian};
use crate::quantize::quantizer::{Input, column_spreads};

/// The problem in units of the column factors: weights W F⁻¹ under the Hessian F H F.
pub(super) struct ScaledInput {
    /// As stored.
    pub factors: Vec<f16>,
    weights: Vec<f32>,
    hessian: Hessian,
    factor: Factor,
    norms: Vec<f32>,
}

impl ScaledInput {
    /// Divides the columns by their spreads.
    pub(super) fn new(input: &Input<'_>) -> Self {
        let spreads = match input.col_spreads {
            Some(spreads) => Cow::Borrowed(spreads),
            None => Cow::Owned(column_spreads(input.weights, input.cols)),
        };
        let factors: Vec<f16> = spreads.iter().map(|spread| f16::from_f32(*spread)).collect();
        let values: Vec<f32> = factors.iter().map(|factor| factor.to_f32()).collect();
        let weights = input
            .weights
            .chunks_exact(input.cols)
            .flat_map(|row| row.iter().zip(&values).map(|(w, factor)| w / factor));
        Self {
            weights: weights.collect(),
            hessian: input.hessian.scaled(&values),
            factor: input.factor.scaled(&values),
            norms: input.norms.iter().zip(&values).map(|(norm, factor)| norm * factor).collect(),
            factors,
        }
    }

    /// The input of the quantizer.
    pub(super) fn input<'s>(&'s self, input: &Input<'s>) -> Input<'s> {
        Input {
            weights: &self.weights,
            hessian: &self.hessian,
            factor: &self.factor,
            norms: &self.norms,
            ..*input
        }
    }
}
