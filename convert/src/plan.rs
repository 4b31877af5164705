//! The method and the exact size of each tensor, before anything is computed.

use stb_format::arch::{Linear, Role, TensorSpec};
use stb_format::encoding::Dense;
use stb_format::{Encoding, Meta, file_size};
use stb_runtime::{Checkpoint, Error, LayerMatrix, Result};

use crate::quantize::int_group::{IntOptions, fit_group};
use crate::quantize::{LinearQuantizer, Method};
use crate::recipe::Recipe;

/// How a tensor is converted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorMethod {
    /// Kept in its data type.
    Keep(Dense),
    /// Each weight rounded independently, without calibration.
    Round(IntOptions),
    /// Quantized against a Hessian: a linear layer against that of its inputs, the embeddings and the lm_head against
    /// one that weighs their errors by use.
    Linear(Method),
}

impl TensorMethod {
    /// The encoding in the file.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Keep(kind) => Encoding::Dense(*kind),
            Self::Round(options) => Encoding::IntGroup(options.spec),
            Self::Linear(method) => method.quantizer().encoding(),
        }
    }
}

/// One tensor of a plan.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// Its name, shape and role.
    pub tensor: TensorSpec,
    /// How it is converted.
    pub method: TensorMethod,
    /// Stored bytes.
    pub bytes: u64,
}

impl TensorPlan {
    fn new(tensor: TensorSpec, method: TensorMethod) -> Result<Self> {
        let bytes = method
            .encoding()
            .payload_len(&tensor.shape)
            .map_err(|e| Error::Internal { what: e.to_string() })?
            .unwrap_or(0);
        Ok(Self { tensor, method, bytes })
    }

    /// The number of weights.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.tensor.shape.iter().product()
    }

    /// Stored bits per weight.
    #[must_use]
    pub fn stored_bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elements() as f64
    }

    /// Changes the method and updates the stored bytes.
    ///
    /// # Errors
    /// None for a method that allows the shape.
    pub fn set(&mut self, method: TensorMethod) -> Result<()> {
        *self = Self::new(self.tensor.clone(), method)?;
        Ok(())
    }

    /// The index of the decoder layer and the matrix of a linear layer or an expert in it; `None` for other
    /// tensors.
    #[must_use]
    pub fn matrix(&self) -> Option<(usize, LayerMatrix)> {
        let key = LayerMatrix::of_role(self.tensor.role).filter(|key| *key != LayerMatrix::Router);
        self.tensor.layer.zip(key)
    }

    /// Whether the tensor is quantized with calibration.
    #[must_use]
    pub fn is_calibrated(&self) -> bool {
        matches!(self.method, TensorMethod::Linear(_))
    }

    /// The index of the decoder layer and the linear layer in it; `None` for other tensors, also for those of
    /// experts.
    #[must_use]
    pub fn linear(&self) -> Option<(usize, Linear)> {
        self.tensor.layer.zip(self.tensor.linear())
    }
}

/// All tensors in file order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The tensors.
    pub tensors: Vec<TensorPlan>,
}

/// The plan of a conversion of `checkpoint` by `recipe`.
///
/// # Errors
/// None in practice: the tensors of a checkpoint exist.
pub fn plan(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Plan> {
    let linear = recipe.linear.method();
    let calibration = &recipe.calibration;
    // Steps that use the calibration sequences even if weights are only rounded.
    let fits = calibration.follows_dense()
        || calibration.distill_layers.is_some()
        || calibration.distill.is_some();
    let mut tensors = Vec::new();
    for tensor in checkpoint.spec.tensors() {
        let name = &tensor.name;
        let keep = TensorMethod::Keep(checkpoint.element_type(name)?);
        let cols = tensor.shape.last().map_or(0, |cols| *cols as usize);
        let table = |options: IntOptions| match options.compensate {
            true => TensorMethod::Linear(Method::Int(options).fitted(cols)),
            false => TensorMethod::Round(IntOptions::rounding(fit_group(options.spec, cols))),
        };
        let quantize = |method: Method| match method.fitted(cols) {
            Method::Int(options) if !options.compensate && !fits => TensorMethod::Round(options),
            fitted => TensorMethod::Linear(fitted),
        };
        let method = match tensor.role {
            Role::TokenEmbedding => recipe.embeddings.map_or(keep, table),
            Role::LmHead => recipe.head.map_or(keep, table),
            Role::Linear(_) | Role::Expert(..) => linear.map_or(keep, quantize),
            // A wrong choice of experts would cost more than the few bytes of the router.
            Role::Router => TensorMethod::Keep(Dense::F32),
            _ => keep,
        };
        tensors.push(TensorPlan::new(tensor, method)?);
    }
    Ok(Plan { tensors })
}

impl Plan {
    /// The exact size of the file with this metadata.
    #[must_use]
    pub fn file_bytes(&self, meta: &Meta) -> u64 {
        file_size(self.tensors.iter().map(|t| (t.tensor.name.as_str(), t.bytes)), meta)
    }

    /// Model parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::elements).sum()
    }

    /// Limitations of the file compared with its methods; see [`LinearQuantizer::note`].
    ///
    /// [`LinearQuantizer::note`]: crate::quantize::LinearQuantizer::note
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for tensor in &self.tensors {
            let note = match &tensor.method {
                TensorMethod::Linear(method) => method.quantizer().note(),
                TensorMethod::Round(options) => options.note(),
                TensorMethod::Keep(_) => None,
            };
            notes.extend(note.filter(|note| !notes.contains(note)));
        }
        notes
    }

    /// Whether masks come from a pruning pass over the whole model.
    #[must_use]
    pub fn prunes_first(&self) -> bool {
        self.methods().any(|(_, method)| method.quantizer().prunes_first())
    }

    /// The tensors that are quantized with calibration.
    fn methods(&self) -> impl Iterator<Item = (&TensorPlan, Method)> {
        self.tensors.iter().filter_map(|t| match t.method {
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
        for tensor in self.tensors.iter().filter(|t| t.matrix().is_some()) {
            let TensorMethod::Linear(method) = tensor.method else { return None };
            let kept = method.quantizer().nominal_kept()?;
            let n = tensor.elements();
            bits += n as f64 * kept as f64 / 8.0 * (1.0 + salient);
            weights += n;
        }
        (weights > 0).then(|| bits / weights as f64)
    }
}
