//! The report of a conversion, which can be written as JSON.

use serde::{Deserialize, Serialize};

use crate::quality::{AnswerPair, QualityReport};
use crate::quantize::Seconds;

/// One tensor of a report.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorReport {
    /// The name in the file.
    pub name: String,
    /// In PyTorch's order: [out, in] for a linear layer.
    pub shape: Vec<u64>,
    /// Name of the encoding.
    pub encoding: String,
    /// Stored bytes.
    pub bytes: u64,
    /// Stored bits per weight.
    pub stored_bits: f64,
    /// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) on the calibration inputs; for tensors without calibration the squared error divided
    /// by the squared weights.
    pub relative_error: f64,
    /// Share of salient columns (PB-LLM: weights).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salient: Option<f64>,
    /// Time spent on quantizing it.
    pub seconds: f64,
}

/// Wall-clock seconds of the stages of a decoder layer, or of the whole conversion.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Stages {
    /// Forward passes of the calibration, with the dense and the quantized layer.
    pub forward: f64,
    /// Sums for the Hessians.
    pub hessian: f64,
    /// Factorization of the Hessians.
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
    /// Measuring the error of the stored weights.
    pub check: f64,
    /// Measuring the file: the dense model and the file on windows held out from calibration.
    #[serde(default)]
    pub quality: f64,
    /// Writing the file, and saving the state for a later run.
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
        self.quality += other.quality;
        self.output += other.output;
    }
}

/// A decoder layer of a report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// Index, from 0.
    pub index: usize,
    /// Mean relative error of its linear layers.
    pub relative_error: f64,
    /// Time from start to end.
    pub seconds: f64,
    /// The time of each stage.
    pub stages: Stages,
    /// Calibration tokens of each expert of a mixture of experts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_tokens: Vec<u64>,
}

/// A conversion of a search for the smallest file within a KL divergence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// The size that was asked for, in true bits per parameter.
    pub bits: f64,
    /// The KL divergence measured, in nats per token; `None` if the predictions were not finite.
    pub kl: Option<f64>,
}

/// A whole conversion.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nominal_bits_paper: Option<f64>,
    /// The calibration text and its windows.
    pub calibration: String,
    /// Tokens of calibration.
    pub calibration_tokens: usize,
    /// Limitations of the file, where no encoding holds the values of its method.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What was measured with the file.
    pub quality: QualityReport,
    /// Answers of the dense model and the file to the same questions, if the model has a chat template.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<AnswerPair>,
    /// The conversions of a search for a size, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<Attempt>,
    /// Wall-clock time of this run.
    pub seconds: f64,
    /// Decoder layers that an interrupted run had finished.
    pub resumed_layers: usize,
    /// The time of each stage over all layers, including those of an interrupted run.
    pub stages: Stages,
    /// The decoder layers.
    pub layers: Vec<LayerReport>,
    /// All tensors in file order.
    pub tensors: Vec<TensorReport>,
}
