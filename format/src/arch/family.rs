//! [`Family`]: how a family of checkpoints names and stores the tensors of a model.

use super::config::{ConfigError, ConfigFields};
use super::roles::{Linear, NormSite, Role, TensorSpec};
use super::spec::ModelSpec;

/// A family of models: the names and layouts of its tensors in Hugging Face checkpoints, and the reader of its
/// `config.json`.
#[derive(Debug)]
pub struct Family {
    /// The values of `model_type` in `config.json`.
    pub(super) model_types: &'static [&'static str],
    /// What comes before the names of all tensors but the lm_head. The first is what transformers writes; readers
    /// accept all.
    pub(super) prefixes: &'static [&'static str],
    /// The part of a name between the prefix and the index of a decoder layer.
    pub(super) layers: &'static str,
    /// The tensors outside the decoder layers. Names are without the prefix, except for the lm_head's.
    pub(super) outside: &'static [StoredAs],
    /// The tensors of a decoder layer; names start after the index of the layer.
    pub(super) layer: &'static [StoredAs],
    /// The matrices of an expert.
    pub(super) expert: Option<ExpertNames>,
    /// Endings (those that start with a dot) and beginnings of the names of tensors that the model does not
    /// compute with.
    pub(super) ignored: &'static [&'static str],
    /// Reads `config.json`.
    pub(super) from_config: fn(&dyn ConfigFields) -> Result<ModelSpec, ConfigError>,
}

/// A tensor in a checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredAs(pub Role, pub &'static str, pub Piece);

/// The part of a stored tensor that is a tensor of the model.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// All of it.
    Whole,
    /// Rows of a matrix, or elements of a bias, that holds the outputs of these linear layers one after another.
    Stacked(&'static [Linear]),
    /// The transpose of all of it.
    Transposed,
    /// Rows of the transpose, which holds the outputs of these linear layers one after another.
    TransposedStacked(&'static [Linear]),
    /// All but the first rows.
    After(u64),
}

/// The names of the matrices of an expert: before and after its index.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertNames {
    pub before: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// The tensor of a checkpoint that holds a tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// The names that it may have. The first is what transformers writes.
    pub names: Vec<String>,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Whether it is transposed.
    pub is_transposed: bool,
    /// The first row of the tensor of the model in the stored tensor, transposed if it is transposed.
    pub first_row: u64,
}

impl Family {
    /// The name of the family: its first `model_type`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.model_types.first().copied().unwrap_or_default()
    }

    /// Where a checkpoint has `tensor`; `None` if the family has no such tensor.
    #[must_use]
    pub fn source(&self, spec: &ModelSpec, tensor: &TensorSpec) -> Option<SourceTensor> {
        let layer = tensor.layer.map(|layer| u64::try_from(layer).unwrap_or(u64::MAX));
        let (name, piece) = match tensor.role {
            Role::Expert(expert, linear) => (self.expert?.name(expert, linear), Piece::Whole),
            role => {
                let list = if layer.is_some() { self.layer } else { self.outside };
                let stored = list.iter().find(|stored| stored.0 == role)?;
                (stored.1.to_owned(), stored.2)
            }
        };
        let with_prefix = |prefix: &&str| match layer {
            Some(layer) => format!("{prefix}{}.{layer}.{name}", self.layers),
            None => format!("{prefix}{name}"),
        };
        let mut names: Vec<String> = match tensor.role {
            Role::LmHead => vec![name],
            _ => self.prefixes.iter().map(with_prefix).collect(),
        };
        if tensor.role == Role::TokenEmbedding && spec.tied_embeddings {
            names.extend(self.lm_head());
        }
        let piece = piece.locate(spec, tensor.role, layer.unwrap_or(0), &tensor.shape);
        Some(SourceTensor { names, ..piece })
    }

    /// Whether a checkpoint may have a tensor of this name that the model does not compute with.
    #[must_use]
    pub fn is_ignored(&self, spec: &ModelSpec, name: &str) -> bool {
        let is_tied_copy = spec.tied_embeddings && self.lm_head().as_deref() == Some(name);
        let matches = |pattern: &&str| match pattern.starts_with('.') {
            true => name.ends_with(pattern),
            false => name.starts_with(pattern),
        };
        is_tied_copy || name.ends_with("rotary_emb.inv_freq") || self.ignored.iter().any(matches)
    }

    fn lm_head(&self) -> Option<String> {
        let head = self.outside.iter().find(|stored| stored.0 == Role::LmHead)?;
        Some(head.1.to_owned())
    }
}

impl ExpertNames {
    fn name(self, expert: u32, linear: Linear) -> String {
        let after = match linear {
            Linear::Gate => self.gate,
            Linear::Up => self.up,
            _ => self.down,
        };
        format!("{}.{expert}.{after}", self.before)
    }
}

impl Piece {
    /// Shape, orientation and first row of the stored tensor for a tensor of this role and `shape`.
    fn locate(self, spec: &ModelSpec, role: Role, layer: u64, shape: &[u64]) -> SourceTensor {
        let (is_transposed, stack, skipped) = match self {
            Self::Whole => (false, None, 0),
            Self::Stacked(stack) => (false, Some(stack), 0),
            Self::Transposed => (true, None, 0),
            Self::TransposedStacked(stack) => (true, Some(stack), 0),
            Self::After(rows) => (false, None, rows),
        };
        let own_rows = shape.first().copied().unwrap_or(0);
        let mut rows = own_rows.saturating_add(skipped);
        let mut first_row = skipped;
        if let (Some(stack), Role::Linear(own) | Role::Bias(own)) = (stack, role) {
            let sum = |linears: &mut dyn Iterator<Item = &Linear>| {
                linears.fold(0u64, |sum, linear| sum.saturating_add(spec.rows(*linear, layer)))
            };
            rows = sum(&mut stack.iter());
            first_row = sum(&mut stack.iter().take_while(|linear| **linear != own));
        }
        let mut shape = shape.to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows;
        }
        // Only matrices are transposed.
        let is_transposed = is_transposed && shape.len() > 1;
        if is_transposed {
            shape.reverse();
        }
        SourceTensor { names: Vec::new(), shape, is_transposed, first_row }
    }
}

/// Outside tensors of families that name them as LLaMA does.
pub(super) const LLAMA_OUTSIDE: &[StoredAs] = &[
    StoredAs(Role::TokenEmbedding, "embed_tokens.weight", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Final), "norm.weight", Piece::Whole),
    StoredAs(Role::LmHead, "lm_head.weight", Piece::Whole),
];

/// Tensors of a decoder layer as LLaMA names them, with those of families that add biases and norms of heads.
pub(super) const LLAMA_LAYER: &[StoredAs] = &[
    StoredAs(Role::Norm(NormSite::Attention), "input_layernorm.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Q), "self_attn.q_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::Q), "self_attn.q_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::K), "self_attn.k_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::K), "self_attn.k_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::V), "self_attn.v_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::V), "self_attn.v_proj.bias", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Query), "self_attn.q_norm.weight", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Key), "self_attn.k_norm.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::O), "self_attn.o_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::O), "self_attn.o_proj.bias", Piece::Whole),
    StoredAs(Role::Norm(NormSite::Mlp), "post_attention_layernorm.weight", Piece::Whole),
    StoredAs(Role::Router, "mlp.gate.weight", Piece::Whole),
    StoredAs(Role::Linear(Linear::Gate), "mlp.gate_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::Gate), "mlp.gate_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::Up), "mlp.up_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::Up), "mlp.up_proj.bias", Piece::Whole),
    StoredAs(Role::Linear(Linear::Down), "mlp.down_proj.weight", Piece::Whole),
    StoredAs(Role::Bias(Linear::Down), "mlp.down_proj.bias", Piece::Whole),
];

/// The matrices of an expert as Qwen and OLMoE name them.
pub(super) const EXPERTS: ExpertNames = ExpertNames {
    before: "mlp.experts",
    gate: "gate_proj.weight",
    up: "up_proj.weight",
    down: "down_proj.weight",
};
