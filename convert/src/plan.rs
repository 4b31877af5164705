//! What will be done to each tensor and what it will cost, before anything is computed.

use stb_format::encoding::{Dense, IntGroup};
use stb_format::{Encoding, Meta, file_size};
use stb_runtime::{Checkpoint, Error, LinearInput, Result};

use crate::quantize::Method;
use crate::recipe::Recipe;

/// What is done to a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorMethod {
    /// The bytes of the source.
    Keep(Dense),
    /// Each weight rounded by itself.
    Round(IntGroup),
    /// A linear layer, quantized against the Hessian of its inputs.
    Linear(Method),
}

impl TensorMethod {
    /// What is stored.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Keep(kind) => Encoding::Dense(*kind),
            Self::Round(spec) => Encoding::IntGroup(*spec),
            Self::Linear(method) => method.quantizer().encoding(),
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

    /// Changes the treatment, and the stored bytes with it.
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
/// None in practice: the tensors of a checkpoint exist and are dense.
pub fn plan(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Plan> {
    let method = recipe.linear.method();
    let mut tensors = Vec::new();
    for (name, shape) in checkpoint.spec.tensors() {
        let Encoding::Dense(kind) = *checkpoint.weight(&name)?.encoding() else {
            return Err(Error::Internal { what: format!("{name} of a checkpoint is not dense") });
        };
        let keep = TensorMethod::Keep(kind);
        let treatment = match name.as_str() {
            _ if shape.len() != 2 => keep,
            "model.embed_tokens.weight" => recipe.embeddings.map_or(keep, TensorMethod::Round),
            "lm_head.weight" => recipe.head.map_or(keep, TensorMethod::Round),
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

    /// How the file falls short of its methods, see [`LinearQuantizer::note`].
    ///
    /// [`LinearQuantizer::note`]: crate::quantize::LinearQuantizer::note
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for (_, method) in self.methods() {
            notes.extend(method.quantizer().note().filter(|note| !notes.contains(note)));
        }
        notes
    }

    /// Whether masks come from a pruning pass over the whole model.
    #[must_use]
    pub fn prunes_first(&self) -> bool {
        self.methods().any(|(_, method)| method.quantizer().prunes_first())
    }

    /// The tensors that are quantized against their calibrated inputs.
    fn methods(&self) -> impl Iterator<Item = (&TensorPlan, Method)> {
        self.tensors.iter().filter_map(|t| match t.treatment {
            TensorMethod::Linear(method) => Some((t, method)),
            TensorMethod::Keep(_) | TensorMethod::Round(_) => None,
        })
    }

    /// Whether any tensor needs calibration.
    #[must_use]
    pub fn needs_calibration(&self) -> bool {
        self.methods().next().is_some()
    }

    /// Bits that the paper would state for the decoder's linear layers: N/8 per weight, times one
    /// plus the share of salient columns, without masks, regions, scales, embeddings. `None` if
    /// they are not of the paper's structure.
    #[must_use]
    pub fn nominal_bits(&self, salient: f64) -> Option<f64> {
        let (mut bits, mut weights) = (0.0, 0u64);
        for tensor in self.tensors.iter().filter(|t| t.layer().is_some() && t.shape.len() == 2) {
            let TensorMethod::Linear(method) = tensor.treatment else { return None };
            let kept = method.quantizer().nominal_kept()?;
            let n = tensor.elements();
            bits += n as f64 * kept as f64 / 8.0 * (1.0 + salient);
            weights += n;
        }
        (weights > 0).then(|| bits / weights as f64)
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
