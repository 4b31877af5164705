//! One tensor: checks, packing without calibration, errors.

use stb_format::Encoding;
use stb_format::encoding::Dense;
use stb_runtime::{Error, Result, Weight};

use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::{Packed, decode, int_group};

/// Zeroes the weights of inputs that are zero in all tokens: they have no effect, and zero is the cheapest to quantize.
pub(super) fn zero_dead_inputs(values: &mut [f32], norms: &[f32]) {
    if norms.contains(&0.0) {
        for row in values.chunks_exact_mut(norms.len()) {
            for (w, norm) in row.iter_mut().zip(norms) {
                if *norm == 0.0 {
                    *w = 0.0;
                }
            }
        }
    }
}

/// Packs a tensor without a Hessian.
pub(super) fn pack_uncalibrated(tensor: &TensorPlan, weight: &Weight, values: &[f32]) -> Packed {
    let keep = |kind: Dense| Packed {
        encoding: Encoding::Dense(kind),
        payload: kind.encode(values),
        salient: None,
        seconds: Default::default(),
    };
    match tensor.method {
        TensorMethod::Keep(kind) => keep(kind),
        TensorMethod::Round(options) => {
            int_group::round_to(values, weight.rows(), weight.cols(), &options)
        }
        // Not reached: what plans quantize has a Hessian.
        TensorMethod::Linear(_) => keep(Dense::F32),
    }
}

/// Σ (w − q)² / Σ w².
pub(super) fn squared_error(packed: &Packed, weight: &Weight, values: &[f32]) -> f64 {
    let decoded = decode(packed, weight.rows(), weight.cols());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = values.iter().zip(&decoded).map(|(w, q)| square(w - q)).sum();
    let all: f64 = values.iter().map(|w| square(*w)).sum();
    if all > 0.0 { error / all } else { 0.0 }
}

/// Refuses results beyond the range of binary16, in which scales and values are stored.
pub(super) fn check_range(decoded: &[f32], name: &str) -> Result<()> {
    if decoded.iter().all(|w| w.is_finite()) {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "tensor {name} has quantized weights beyond 65504, the range of binary16; nothing was \
         written"
    )))
}

/// The decoded weights; fails unless all are finite.
pub(crate) fn decode_finite(weight: &Weight, name: &str) -> Result<Vec<f32>> {
    let values = weight.decode();
    let (rows, cols) = (weight.rows(), weight.cols());
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(i) => Err(Error::invalid(format!(
            "tensor {name} [{rows}, {cols}] has {} at row {}, column {}: the checkpoint is damaged \
             or its training diverged; nothing was written",
            values[i],
            i / cols,
            i % cols
        ))),
    }
}
