//! Norms forward and backward.

use std::borrow::Cow;

use rayon::prelude::*;
use stb_format::arch::{Norm, NormKind};
use stb_kernels::{Isa, ops};

/// A norm and its weights.
#[derive(Clone, Copy)]
pub(super) struct NormOp<'a> {
    pub isa: Isa,
    /// Formula and ε.
    pub norm: Norm,
    /// The weight, `[width]`.
    pub weight: &'a [f32],
    /// The bias of LayerNorm, `[width]`.
    pub bias: Option<&'a [f32]>,
}

impl NormOp<'_> {
    /// Normalizes rows of `x` as wide as the weight.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let Self { isa, weight, .. } = *self;
        let (width, eps) = (weight.len(), self.eps());
        let zeros = vec![0.0; width];
        let bias = self.bias.unwrap_or(&zeros);
        let mut out = vec![0.0; x.len()];
        out.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(out, x)| {
            match self.norm.kind {
                NormKind::Rms => ops::rms_norm(isa, x, weight, eps, out),
                NormKind::RmsPlusOne => ops::rms_norm_plus_one(isa, x, weight, eps, out),
                NormKind::Layer => ops::layer_norm(isa, x, [weight, bias], eps, out),
            }
        });
        out
    }

    /// The backward pass for the input `x`, [rows, width], and the gradient `dy` of the output: adds the gradient
    /// of `x` to `dx` and that of the weight to `dw`.
    pub fn backward(&self, x: &[f32], dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        let width = self.weight.len();
        let factors: Cow<'_, [f32]> = match self.norm.kind {
            NormKind::Rms | NormKind::Layer => self.weight.into(),
            NormKind::RmsPlusOne => self.weight.iter().map(|w| 1.0 + w).collect(),
        };
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            match self.norm.kind {
                NormKind::Rms | NormKind::RmsPlusOne => self.rms(&factors, [x, dy], dx, dw),
                NormKind::Layer => self.layer(&factors, [x, dy], dx, dw),
            }
        }
    }

    fn eps(&self) -> f32 {
        self.norm.eps as f32
    }

    /// One row of RMSNorm, y = w ∘ x·r with r = (mean x² + ε)^−½: adds r·(w∘dy − x·r²·mean(w∘dy∘x)) to `dx` and
    /// dy ∘ x·r to `dw`.
    fn rms(&self, weight: &[f32], [x, dy]: [&[f32]; 2], dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len();
        let r = 1.0 / (ops::dot(self.isa, x, x) / n as f32 + self.eps()).sqrt();
        let terms = x.iter().zip(dy).zip(weight).map(|((x, dy), w)| x * dy * w);
        let along = terms.sum::<f32>() * r * r / n as f32;
        for (((dx, dw), (x, dy)), w) in dx.iter_mut().zip(dw).zip(x.iter().zip(dy)).zip(weight) {
            *dx += r * (w * dy - x * along);
            *dw += dy * x * r;
        }
    }

    /// One row of LayerNorm, y = w ∘ z + b with z = (x − mean x)·r and r = (var x + ε)^−½: adds
    /// r·(w∘dy − mean(w∘dy) − z·mean(w∘dy∘z)) to `dx` and dy ∘ z to `dw`.
    fn layer(&self, weight: &[f32], [x, dy]: [&[f32]; 2], dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len() as f32;
        let mean = x.iter().sum::<f32>() / n;
        let mut z: Vec<f32> = x.iter().map(|x| x - mean).collect();
        let r = 1.0 / (ops::dot(self.isa, &z, &z) / n + self.eps()).sqrt();
        z.iter_mut().for_each(|z| *z *= r);
        let dz: Vec<f32> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
        let level = dz.iter().sum::<f32>() / n;
        let along = ops::dot(self.isa, &dz, &z) / n;
        for (((dx, dw), (z, dz)), dy) in dx.iter_mut().zip(dw).zip(z.iter().zip(&dz)).zip(dy) {
            *dx += r * (dz - level - z * along);
            *dw += dy * z;
        }
    }
}
