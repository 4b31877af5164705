//! What a conversion did, for people and programs.

use serde::Serialize;

/// One tensor of a report.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The Hugging Face name.
    pub name: String,
    /// PyTorch order.
    pub shape: Vec<u64>,
    /// How it is stored.
    pub encoding: String,
    /// Stored bytes.
    pub bytes: u64,
    /// Stored bits per weight.
    pub stored_bits: f64,
    /// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) on the calibration inputs; for tensors without inputs the
    /// squared error over the squared weights.
    pub relative_error: f64,
    /// Share of salient columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salient: Option<f64>,
    /// Time spent on quantising it.
    pub seconds: f64,
}

/// Seconds per stage, over all layers.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Stages {
    /// Forward passes.
    pub forward: f64,
    /// Second moments.
    pub moments: f64,
    /// Factorisations.
    pub factors: f64,
    /// Quantisation and packing.
    pub quantise: f64,
    /// Writing, hashing and the rest.
    pub output: f64,
}

/// A whole conversion.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The recipe's name.
    pub recipe: String,
    /// Model parameters.
    pub parameters: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// 8 × file bytes ÷ parameters.
    pub true_bits_per_parameter: f64,
    /// Stored bits per weight of the decoder's linear layers.
    pub body_bits: f64,
    /// (1 + share of salient columns) · N/8, as the paper counts; not what is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nominal_bits_paper: Option<f64>,
    /// Calibration text and its use.
    pub calibration: String,
    /// Tokens of calibration.
    pub calibration_tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
    /// Where it went.
    pub stages: Stages,
    /// All tensors in file order.
    pub tensors: Vec<TensorReport>,
}
