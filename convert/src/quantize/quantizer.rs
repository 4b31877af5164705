//! What all quantizers of linear layers share: their input, their result, and the trait that each of them implements.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_runtime::Result;

use super::kept::KeptByLayer;
use crate::compute::Compute;
use crate::hessian::{Factor, Hessian};

/// A method that quantizes linear layers, with its options. This is all that the rest of the program knows of a
/// method.
pub trait LinearQuantizer {
    /// The encoding that is written.
    fn encoding(&self) -> Encoding;

    /// How the file falls short of the method, if it does: no encoding of the format holds the values, so that the
    /// size says nothing about the method.
    fn note(&self) -> Option<String> {
        None
    }

    /// Whether masks come from a pruning pass over the whole model, before any layer is quantized.
    fn prunes_first(&self) -> bool {
        false
    }

    /// That pruning pass for one linear layer; `None` for methods without one.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`].
    fn prune(&self, input: &Input<'_>) -> Result<Option<Pruned>> {
        let _ = input;
        Ok(None)
    }

    /// The N of N:8 that the paper's bit count is made of; `None` for what is not of the paper's structure.
    fn nominal_kept(&self) -> Option<usize> {
        None
    }

    /// How many weights of each 8 are kept, for methods that may keep another number in each decoder layer.
    fn kept_by_layer(&self) -> Option<KeptByLayer> {
        None
    }

    /// Keeps `n` weights of each 8 from now on. Returns whether the method can.
    fn keep_of_8(&mut self, n: u8) -> bool {
        let _ = n;
        false
    }

    /// Bytes of scratch for a matrix of `cols` columns, beyond what [`memory`] counts for every method.
    fn scratch_memory(&self, cols: u64) -> u64 {
        let _ = cols;
        0
    }

    /// Bytes of the unpacked codes and moving scales of a matrix [rows, cols] while the model is distilled; 0 for
    /// methods whose scales do not move.
    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        let _ = (rows, cols);
        0
    }

    /// Quantizes one linear layer. `pruned` is its pruned form where [`LinearQuantizer::prunes_first`].
    ///
    /// # Errors
    /// [`stb_runtime::Error::Device`].
    fn quantize(&self, input: &Input<'_>, pruned: Option<&Pruned>) -> Result<Packed>;
}

/// An upper estimate of the bytes that quantizing a matrix of so many weights takes, beside the Hessian and its factors.
#[must_use]
pub fn memory(weights: u64) -> u64 {
    weights * 36
}

/// Pruned weights with their mask, both [rows, cols].
#[derive(Clone, Debug)]
pub struct Pruned {
    /// Exactly zero where not kept; compensated if the method does.
    pub weights: Vec<f32>,
    /// Kept weights.
    pub mask: Vec<bool>,
}

/// A linear layer on its way to packed weights.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Where products are computed.
    pub compute: Compute<'a>,
    /// [rows, cols], row-major.
    pub weights: &'a [f32],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The damped Hessian of the inputs.
    pub hessian: &'a Hessian,
    /// Its factors.
    pub factor: &'a Factor,
    /// Norms of the input features without damping: sqrt(diag H / 2).
    pub norms: &'a [f32],
}

/// Packed weights.
#[derive(Clone, Debug)]
pub struct Packed {
    /// How they are stored.
    pub encoding: Encoding,
    /// The stored bytes.
    pub payload: Vec<u8>,
    /// Share of columns (PB-LLM: of weights) that are salient, where the method has any.
    pub salient: Option<f64>,
    /// Where the time went.
    pub seconds: Seconds,
}

/// Wall-clock seconds per step of a quantizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Seconds {
    /// Choosing masks, compensation of pruned weights included.
    pub prune: f64,
    /// Searching salient columns and thresholds.
    pub search: f64,
    /// Scales, codes and values.
    pub quantize: f64,
    /// Passing errors on to later blocks.
    pub propagate: f64,
    /// Refitting scales and codes after the block loop.
    pub refit: f64,
    /// Packing.
    pub pack: f64,
}

impl Seconds {
    /// Adds those of another tensor.
    pub fn add(&mut self, other: &Self) {
        self.prune += other.prune;
        self.search += other.search;
        self.quantize += other.quantize;
        self.propagate += other.propagate;
        self.refit += other.refit;
        self.pack += other.pack;
    }
}

/// The error of a layer's output that `quantized` causes, relative to the output itself:
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

/// The weights that `packed` stands for, [rows, cols].
pub(crate) fn decode(packed: &Packed, rows: usize, cols: usize) -> Vec<f32> {
    let view = packed.encoding.view(rows as u64, cols as u64, &packed.payload);
    let view = view.expect("a payload that was packed for this shape");
    let mut out = vec![0.0; rows * cols];
    out.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| view.decode_row(r, row));
    out
}
