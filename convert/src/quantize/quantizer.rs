//! The interface of quantizers of linear layers: their input, their result, and the trait that they implement.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_runtime::Result;

use super::kept::KeptByLayer;
use crate::compute::Compute;
use crate::hessian::{Factor, Hessian};

/// A method that quantizes linear layers, with its options. The rest of the program uses methods only through this
/// trait.
pub trait LinearQuantizer {
    /// The encoding that is written.
    fn encoding(&self) -> Encoding;

    /// A limitation of the file, if the format has no encoding for the method's values, so that the size says nothing
    /// about the method.
    fn note(&self) -> Option<String> {
        None
    }

    /// Whether masks come from a pruning pass over the whole model, before any layer is quantized.
    fn prunes_first(&self) -> bool {
        false
    }

    /// The pruning pass for one linear layer; `None` for methods without one.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`].
    fn prune(&self, input: &Input<'_>) -> Result<Option<Pruned>> {
        let _ = input;
        Ok(None)
    }

    /// The N of N:8 in the paper's bit count; `None` for methods without the paper's structure.
    fn nominal_kept(&self) -> Option<usize> {
        None
    }

    /// The number of weights kept of each 8, for methods that can keep a different number in each decoder layer.
    fn kept_by_layer(&self) -> Option<KeptByLayer> {
        None
    }

    /// Sets the number of weights kept of each 8. Returns false if the method does not support it.
    fn keep_of_8(&mut self, n: u8) -> bool {
        let _ = n;
        false
    }

    /// Bytes of scratch for a matrix of `cols` columns, beyond what [`memory`] counts for every method.
    fn scratch_memory(&self, cols: u64) -> u64 {
        let _ = cols;
        0
    }

    /// Bytes of the unpacked codes and trained scales of a matrix, [rows, cols], during distillation; 0 for methods
    /// without scales to train.
    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        let _ = (rows, cols);
        0
    }

    /// Quantizes one linear layer. `pruned` is the result of the pruning pass if [`LinearQuantizer::prunes_first`].
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`].
    fn quantize(&self, input: &Input<'_>, pruned: Option<&Pruned>) -> Result<Packed>;
}

/// An upper estimate of the bytes needed to quantize a matrix of `weights` weights, besides the Hessian and its factors.
#[must_use]
pub fn memory(weights: u64) -> u64 {
    weights * 36
}

/// Pruned weights with their mask, both [rows, cols].
#[derive(Clone, Debug)]
pub struct Pruned {
    /// Zero where not kept; compensated if the method compensates.
    pub weights: Vec<f32>,
    /// True for kept weights.
    pub mask: Vec<bool>,
}

/// A linear layer to quantize.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The processor that computes large products.
    pub compute: Compute<'a>,
    /// [rows, cols], row-major.
    pub weights: &'a [f32],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The damped Hessian of the inputs.
    pub hessian: &'a Hessian,
    /// The factors of the Hessian.
    pub factor: &'a Factor,
    /// Norms of the input features without damping: sqrt(diag H / 2).
    pub norms: &'a [f32],
    /// The spreads of the columns of the whole matrix, `[cols]`, if `weights` are only some of its rows: root mean squares
    /// after each row has been divided by its own.
    pub col_spreads: Option<&'a [f32]>,
}

/// Spreads are at least this, so that dividing by a stored spread is safe.
const SMALLEST_SPREAD: f64 = 1.0 / 256.0;

/// The root mean square of each column of `weights`, [rows, cols], after each row has been divided by its own, so that rows
/// count alike; 1 for a column of zeros.
pub(crate) fn column_spreads(weights: &[f32], cols: usize) -> Vec<f32> {
    let (mut sums, mut count) = (vec![0.0f64; cols], 0.0f64);
    for row in weights.chunks_exact(cols) {
        let energy: f64 = row.iter().map(|w| f64::from(w * w)).sum();
        if energy > 0.0 {
            let scale = cols as f64 / energy;
            sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += scale * f64::from(w * w));
            count += 1.0;
        }
    }
    let spread =
        |sum: &f64| if *sum > 0.0 { (sum / count).sqrt().max(SMALLEST_SPREAD) } else { 1.0 };
    sums.iter().map(|sum| spread(sum) as f32).collect()
}

/// Packed weights.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Their encoding.
    pub encoding: Encoding,
    /// The stored bytes.
    pub payload: Vec<u8>,
    /// Share of salient columns (PB-LLM: weights); `None` for methods without salience.
    pub salient: Option<f64>,
    /// The time of each step.
    pub seconds: Seconds,
}

/// Wall-clock seconds per step of a quantizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Seconds {
    /// Choosing masks, including compensation of pruned weights.
    pub prune: f64,
    /// Searching salient columns and thresholds.
    pub search: f64,
    /// Scales, codes and values.
    pub quantize: f64,
    /// Spreading errors over later blocks.
    pub propagate: f64,
    /// Refitting scales and codes after the block loop.
    pub refit: f64,
    /// Packing.
    pub pack: f64,
}

impl Seconds {
    /// Adds the times of another tensor.
    pub fn add(&mut self, other: &Self) {
        self.prune += other.prune;
        self.search += other.search;
        self.quantize += other.quantize;
        self.propagate += other.propagate;
        self.refit += other.refit;
        self.pack += other.pack;
    }
}

/// The squared error of a layer's output with the weights `quantized`, relative to the squared output:
/// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ).
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub fn relative_error(input: &Input<'_>, quantized: &[f32]) -> Result<f64> {
    let difference: Vec<f32> =
        input.weights.par_iter().zip(quantized).map(|(w, q)| w - q).collect();
    let energy = |weights: &[f32]| -> Result<f64> {
        Ok(input.compute.output_errors(weights, input.hessian)?.iter().sum())
    };
    let output = energy(input.weights)?;
    Ok(if output > 0.0 { energy(&difference)? / output } else { 0.0 })
}

/// Decodes packed weights, [rows, cols].
pub(crate) fn decode(packed: &Packed, rows: usize, cols: usize) -> Vec<f32> {
    let view = packed.encoding.view(rows as u64, cols as u64, &packed.payload);
    let view = view.expect("a payload packed for this shape");
    let mut out = vec![0.0; rows * cols];
    out.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| view.decode_row(r, row));
    out
}
