//! What will be done to each tensor and what it will cost, before anything is computed.

use stb_format::encoding::{Dense, IntGroup};
use stb_format::{Encoding, Meta, ModelSpec, file_size};
use stb_runtime::{Checkpoint, Error, LinearInput, Result};

use crate::quantize::{int_group, nm, pb_llm, stbllm};
use crate::recipe::Recipe;

/// A quantizer for linear layers with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Structured binarization: STBLLM, BiLLM and variants.
    Stbllm(stbllm::Options),
    /// Joint N:M codes.
    Nm(nm::Options),
    /// Integers: GPTQ and rounding.
    Int(int_group::Options),
    /// Partial binarization.
    PbLlm(pb_llm::Options),
}

impl Method {
    /// What it writes.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Stbllm(o) => o.encoding(),
            Self::Nm(o) => Encoding::Nm(o.spec),
            Self::Int(o) => Encoding::IntGroup(o.spec),
            Self::PbLlm(_) => Encoding::Dense(Dense::F16),
        }
    }

    /// How what is written falls short of the method, if it does: values that no encoding of the
    /// format fits, and so a size that says nothing about the method.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        match self {
            Self::Stbllm(o) if !o.strict => Some(
                "pruned weights are forgotten as in the published code: the result is dense, not \
                 N:M, and stored as 16-bit numbers; it is for comparison, its size means nothing"
                    .into(),
            ),
            Self::Stbllm(o) if o.means => Some(
                "no encoding holds binarized weights with means: they are stored as 16-bit \
                 numbers; the file is for comparison, its size means nothing"
                    .into(),
            ),
            Self::PbLlm(_) => Some(
                "no encoding mixes bits within a row: the weights are stored as 16-bit numbers; \
                 the file is for comparison, its size means nothing"
                    .into(),
            ),
            Self::Int(o) if o.grid.bits != o.spec.bits() => Some(format!(
                "the format has no {}-bit integers: their codes are stored exactly in {} bits each",
                o.grid.bits,
                o.spec.bits()
            )),
            Self::Stbllm(_) | Self::Nm(_) | Self::Int(_) => None,
        }
    }
}

/// What is done to a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorMethod {
    /// The bytes of the source.
    Keep(Dense),
    /// Each weight rounded by itself.
    Round(IntGroup),
    /// A linear layer quantized against its calibrated inputs.
    Linear(Method),
}

impl TensorMethod {
    /// What is stored.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Keep(kind) => Encoding::Dense(*kind),
            Self::Round(spec) => Encoding::IntGroup(*spec),
            Self::Linear(method) => method.encoding(),
        }
    }
}

/// One tensor of a plan.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// The Hugging Face name.
    pub name: String,
    /// PyTorch order.
    pub shape: Vec<u64>,
    /// What is done.
    pub treatment: TensorMethod,
    /// Stored bytes.
    pub bytes: u64,
}

impl TensorPlan {
    fn new(name: String, shape: Vec<u64>, treatment: TensorMethod) -> Result<Self> {
        let bytes = treatment
            .encoding()
            .payload_len(&shape)
            .map_err(|e| Error::Internal { what: e.to_string() })?
            .unwrap_or(0);
        Ok(Self { name, shape, treatment, bytes })
    }

    /// The number of weights.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Stored bits per weight.
    #[must_use]
    pub fn stored_bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elements() as f64
    }

    /// Changes the treatment and the price.
    ///
    /// # Errors
    /// None for a treatment that allows the shape.
    pub fn set(&mut self, treatment: TensorMethod) -> Result<()> {
        *self =
            Self::new(std::mem::take(&mut self.name), std::mem::take(&mut self.shape), treatment)?;
        Ok(())
    }

    /// The decoder layer and the part of a body tensor: `(3, "mlp.up_proj")`.
    #[must_use]
    pub fn layer(&self) -> Option<(usize, &str)> {
        layer_part(&self.name)
    }
}

/// As [`TensorPlan::layer`], of a name.
pub(crate) fn layer_part(name: &str) -> Option<(usize, &str)> {
    let (index, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((index.parse().ok()?, part.strip_suffix(".weight")?))
}

/// All tensors in file order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The tensors.
    pub tensors: Vec<TensorPlan>,
}

/// What `recipe` does to `checkpoint`.
///
/// # Errors
/// [`Error::Invalid`] for recipes with impossible values.
pub fn plan(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Plan> {
    let method = recipe.body.method()?;
    let (embeddings, head) = (recipe.embeddings.encoding()?, recipe.head.encoding()?);
    let mut tensors = Vec::new();
    for (name, shape) in checkpoint.spec.tensors() {
        let Encoding::Dense(kind) = *checkpoint.weight(&name)?.encoding() else {
            return Err(Error::Internal { what: format!("{name} of a checkpoint is not dense") });
        };
        let keep = TensorMethod::Keep(kind);
        let treatment = match name.as_str() {
            _ if shape.len() != 2 => keep,
            "model.embed_tokens.weight" => embeddings.map_or(keep, TensorMethod::Round),
            "lm_head.weight" => head.map_or(keep, TensorMethod::Round),
            _ => method.map_or(keep, TensorMethod::Linear),
        };
        tensors.push(TensorPlan::new(name, shape, treatment)?);
    }
    Ok(Plan { tensors })
}

impl Plan {
    /// The exact size of the file with this metadata.
    #[must_use]
    pub fn file_bytes(&self, meta: &Meta) -> u64 {
        file_size(self.tensors.iter().map(|t| (t.name.as_str(), t.bytes)), meta)
    }

    /// Model parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::elements).sum()
    }

    /// What the file is not, see [`Method::note`].
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for tensor in &self.tensors {
            if let TensorMethod::Linear(method) = tensor.treatment
                && let Some(note) = method.note()
                && !notes.contains(&note)
            {
                notes.push(note);
            }
        }
        notes
    }

    /// Whether masks come from a pass over the whole model, see [`stbllm::Options::separate`].
    #[must_use]
    pub fn prunes_first(&self) -> bool {
        let separate = |t: &TensorPlan| match t.treatment {
            TensorMethod::Linear(Method::Stbllm(o)) => o.separate,
            _ => false,
        };
        self.tensors.iter().any(separate)
    }

    /// Whether any tensor needs calibration.
    #[must_use]
    pub fn needs_calibration(&self) -> bool {
        self.tensors.iter().any(|t| matches!(t.treatment, TensorMethod::Linear(_)))
    }

    /// Bits that the paper would state for the decoder's linear layers: N/8 per weight, times one
    /// plus the share of salient columns, without masks, regions, scales, embeddings. `None` if
    /// they are not of the paper's structure.
    #[must_use]
    pub fn nominal_bits(&self, salient: f64) -> Option<f64> {
        let (mut bits, mut weights) = (0.0, 0u64);
        for tensor in self.tensors.iter().filter(|t| t.layer().is_some() && t.shape.len() == 2) {
            let TensorMethod::Linear(Method::Stbllm(options)) = tensor.treatment else {
                return None;
            };
            if !options.storable() {
                return None;
            }
            let n = tensor.elements();
            bits += n as f64 * options.spec.n() as f64 / 8.0 * (1.0 + salient);
            weights += n;
        }
        (weights > 0).then(|| bits / weights as f64)
    }

    /// An upper estimate of the memory that conversion takes beside the mapped source, in bytes:
    /// hidden states of all sequences, one decoder layer's inputs, second moments, factors and
    /// weights.
    #[must_use]
    pub fn peak_memory(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> u64 {
        let spec = &checkpoint.spec;
        let largest = self.tensors.iter().map(TensorPlan::elements).max().unwrap_or(0);
        let pricing = match recipe.body.target() {
            Ok(Some(_)) => crate::budget::memory(spec),
            _ => 0,
        };
        if !self.needs_calibration() {
            return pricing.max(largest * 12);
        }
        let q_width = spec.heads * spec.head_dim;
        let inputs = [spec.hidden_size, q_width, spec.hidden_size, spec.intermediate_size];
        let length = (recipe.calibration.length as u64).min(spec.context_length);
        let tokens = recipe.calibration.samples as u64 * length;
        let calibration = &recipe.calibration;
        let dense = calibration.follows_dense().unwrap_or(false);
        let tunes = matches!(calibration.tuning(), Ok(Some(_)));
        // A separate pruning pass has hidden states of its own, and so has the dense model; tuning keeps
        // the inputs of the layer.
        let states = 1 + u64::from(self.prunes_first()) + u64::from(dense) + u64::from(tunes);
        let kept = match calibration.refreshed() {
            Ok(true) => crate::pipeline::KEPT_BYTES as u64,
            _ => 0,
        };
        let widest = spec.intermediate_size.max(q_width);
        let hidden = tokens * 4 * (spec.hidden_size * states) + kept.min(tokens * 4 * widest);
        let batch = crate::pipeline::BATCH as u64 * length;
        let captured = batch * (inputs.iter().sum::<u64>() + 4 * spec.intermediate_size) * 4;
        // H in f32, M and U in f32, and two f64 copies while one of them is factored.
        let moments: u64 = inputs.iter().map(|n| n * n * 12).sum();
        let factoring = inputs.iter().map(|n| n * n * 16).max().unwrap_or(0);
        let layer: u64 = self
            .tensors
            .iter()
            .filter(|t| t.layer().is_some_and(|(i, _)| i == 0))
            .map(|t| t.bytes)
            .sum();
        let linear = spec.intermediate_size * spec.hidden_size;
        let fitting = self.tensors.iter().map(|t| match t.treatment {
            TensorMethod::Linear(Method::Stbllm(o)) if o.sweeps.is_some() => {
                crate::quantize::refit::memory(t.shape[1], o.spec.block() as u64)
            }
            _ => 0,
        });
        let quantizing = linear * 36 + fitting.max().unwrap_or(0);
        // What inputs and residual stream have to do with those of the dense model.
        let shift = if dense {
            (spec.intermediate_size + spec.hidden_size) * spec.intermediate_size * 4
        } else {
            0
        };
        // A layer's weights and gradients, and all that a batch computes, forward and backward.
        let weights = 4 * spec.hidden_size * q_width + 3 * linear;
        let tuning = if tunes { weights * 8 + 2 * captured } else { 0 };
        let step = captured.max(factoring).max(quantizing).max(tuning);
        let fine = match calibration.fine_tuning() {
            Ok(Some(_)) => self.fine_tuning_memory(spec, tokens, batch) + weights * 8 + captured,
            _ => 0,
        };
        pricing.max(fine).max(hidden + moments + shift + layer + step)
    }

    /// What fine-tuning takes beside a layer's weights and gradients: codes and scales of all layers, and
    /// what goes through the model.
    fn fine_tuning_memory(&self, spec: &ModelSpec, tokens: u64, batch: u64) -> u64 {
        let moving = self.tensors.iter().map(|t| match t.treatment {
            // Codes of 16 and 8 bits; scales four times.
            TensorMethod::Linear(Method::Nm(o)) => {
                let block = if o.spec.block() == 0 { t.shape[1] } else { o.spec.block() as u64 };
                t.elements() * 2 / o.spec.m() as u64 + t.elements() * 16 / block.max(1)
            }
            TensorMethod::Linear(Method::Int(o)) => {
                t.elements() + t.elements() * 18 / o.spec.group() as u64
            }
            // Embeddings and head, with a gradient for each weight.
            TensorMethod::Round(spec) => t.elements() * 6 + t.elements() * 18 / spec.group() as u64,
            _ => 0,
        });
        let streams = batch * spec.hidden_size * (spec.layers + 2) * 4;
        moving.sum::<u64>() + tokens * spec.hidden_size * 4 + streams + batch * spec.vocab_size * 12
    }
}

/// Which of [`LinearInput::ALL`] the linear layer `part` reads.
#[must_use]
pub fn input_of(part: &str) -> Option<usize> {
    let input = match part {
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => LinearInput::Attention,
        "self_attn.o_proj" => LinearInput::AttentionOutput,
        "mlp.gate_proj" | "mlp.up_proj" => LinearInput::Mlp,
        "mlp.down_proj" => LinearInput::MlpDown,
        _ => return None,
    };
    Some(input.index())
}
