//! The receiver of gradients.

use rayon::prelude::*;
use stb_format::arch::NormSite;
use stb_runtime::LayerMatrix;

/// Receives the gradients of a backward pass.
pub(super) trait GradientSink {
    /// The gradient of the product with a matrix, `d` [tokens, out], and its input `x` [tokens, in].
    fn matrix(&mut self, key: LayerMatrix, d: &[f32], x: &[f32]);

    /// The gradient of the weight of a norm, as long as the weight.
    fn norm(&mut self, site: NormSite, d: &[f32]);
}

/// Adds `from` to `to`.
pub(super) fn accumulate(to: &mut [f32], from: &[f32]) {
    to.par_iter_mut().zip(from).for_each(|(to, from)| *to += from);
}
