//! What a conversion did, for people and programs.

use serde::{Deserialize, Serialize};

use crate::quantize::Seconds;

/// One tensor of a report.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// Share of salient columns (PB-LLM: weights).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salient: Option<f64>,
    /// Time spent on quantizing it.
    pub seconds: f64,
}

/// Wall-clock seconds of a decoder layer, or of all.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Stages {
    /// Forward passes of the calibration, with the dense and the quantized layer.
    pub forward: f64,
    /// Sums for the Hessian.
    pub hessian: f64,
    /// Its factorization.
    pub factors: f64,
    /// The steps of the quantizers.
    #[serde(flatten)]
    pub quantizer: Seconds,
    /// Distilling the layer.
    #[serde(default)]
    pub distill_layers: f64,
    /// Distilling the model.
    #[serde(default)]
    pub distill: f64,
    /// Measuring the error of what is stored.
    pub check: f64,
    /// Writing, and keeping what a later run resumes from.
    pub output: f64,
}

impl Stages {
    /// Adds another layer.
    pub fn add(&mut self, other: &Self) {
        self.forward += other.forward;
        self.hessian += other.hessian;
        self.factors += other.factors;
        self.quantizer.add(&other.quantizer);
        self.distill_layers += other.distill_layers;
        self.distill += other.distill;
        self.check += other.check;
        self.output += other.output;
    }
}

/// A decoder layer of a report.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// Its place, from 0.
    pub index: usize,
    /// Mean relative error of its linear layers.
    pub relative_error: f64,
    /// Time from start to end.
    pub seconds: f64,
    /// Where it went.
    pub stages: Stages,
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
    /// How the file falls short of its method, if no encoding holds the method's values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Wall-clock time of this run.
    pub seconds: f64,
    /// Decoder layers that an interrupted run had finished.
    pub resumed_layers: usize,
    /// Where the time of all layers went, those of an interrupted run included.
    pub stages: Stages,
    /// The decoder layers.
    pub layers: Vec<LayerReport>,
    /// All tensors in file order.
    pub tensors: Vec<TensorReport>,
}
