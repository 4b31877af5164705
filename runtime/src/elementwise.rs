//! Elementwise operations on the CPU: norms, activations, sums.

use stb_format::Activation;
use stb_format::arch::{Norm, NormKind};
use stb_kernels::{Isa, Pool, ops};

use crate::block::{BlockInput, NormWeights};

/// Elementwise operations on at most this many values run on one thread.
pub(crate) const MIN_PARALLEL_ELEMENTS: usize = 1 << 15;
/// Values per task of elementwise operations.
const CHUNK: usize = 1 << 14;

/// Elementwise operations, on several threads if there are many elements.
#[derive(Clone, Copy)]
pub(crate) struct Elementwise<'p> {
    pub isa: Isa,
    pub pool: &'p Pool,
}

impl Elementwise<'_> {
    /// Computes the activations that a linear layer reads: a norm into `normed`, an activation in place.
    pub(crate) fn input<'x>(
        self,
        x: BlockInput<'x, Vec<f32>, Vec<f32>, [f32]>,
        norm_spec: Norm,
        activation: Activation,
        normed: &'x mut Vec<f32>,
    ) -> &'x [f32] {
        let isa = self.isa;
        match x {
            BlockInput::Plain(x) => x,
            BlockInput::Residual(x) => x,
            BlockInput::Norm { x, norm } => {
                self.norm_rows(x, norm, norm_spec, normed);
                normed
            }
            BlockInput::Activated(x) => {
                self.pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
                    x,
                    CHUNK,
                    |_, x| ops::activate(isa, activation, x),
                );
                x
            }
            BlockInput::Gated { gate, up } => {
                self.pool.or_serial(gate.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
                    gate,
                    CHUNK,
                    |first, gate| {
                        ops::activate_mul(isa, activation, gate, &up[first..first + gate.len()]);
                    },
                );
                gate
            }
        }
    }

    /// Normalizes rows of `x` as wide as the weight into `out`, which is resized.
    pub(crate) fn norm_rows(
        self,
        x: &[f32],
        weights: NormWeights<'_, Vec<f32>>,
        norm: Norm,
        out: &mut Vec<f32>,
    ) {
        let (isa, width, eps) = (self.isa, weights.weight.len(), norm.eps as f32);
        out.resize(x.len(), 0.0);
        self.pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
            out,
            width,
            |first, out| {
                let x = &x[first..first + out.len()];
                norm_row(isa, norm.kind, x, weights, eps, out);
            },
        );
    }

    /// Adds `bias` to each row of `x`.
    pub(crate) fn add_bias(self, x: &mut [f32], bias: &[f32]) {
        let pool = self.pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS);
        pool.run_chunks(x, bias.len(), |_, x| {
            x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        });
    }
}

/// Normalizes one row.
fn norm_row(
    isa: Isa,
    kind: NormKind,
    x: &[f32],
    weights: NormWeights<'_, Vec<f32>>,
    eps: f32,
    out: &mut [f32],
) {
    match (kind, weights.bias) {
        (NormKind::Rms, _) => ops::rms_norm(isa, x, weights.weight, eps, out),
        (NormKind::RmsPlusOne, _) => ops::rms_norm_plus_one(isa, x, weights.weight, eps, out),
        (NormKind::Layer, Some(bias)) => {
            ops::layer_norm(isa, x, [weights.weight, bias], eps, out);
        }
        (NormKind::Layer, None) => {
            ops::layer_norm(isa, x, [weights.weight, &vec![0.0; x.len()]], eps, out);
        }
    }
}

/// `x += y`.
pub(crate) fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(x, CHUNK, |first, x| {
        for (x, y) in x.iter_mut().zip(&y[first..]) {
            *x += y;
        }
    });
}
