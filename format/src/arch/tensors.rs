//! The tensors of a model: names, shapes, roles.

use super::block::{Block, MlpKind, NormKind};
use super::roles::{Linear, LinearInput, NormSite, Role, TensorSpec};
use super::spec::ModelSpec;

impl Block {
    /// Whether the layer has a tensor of this role.
    fn has(&self, role: Role) -> bool {
        match role {
            Role::Norm(NormSite::Query | NormSite::Key) => self.attention.qk_norm,
            Role::NormBias(_) => self.norm.kind == NormKind::Layer,
            Role::Linear(Linear::Gate) => {
                self.mlp.kind == MlpKind::Gated && self.mlp.experts.is_none()
            }
            Role::Linear(Linear::Up | Linear::Down) => self.mlp.experts.is_none(),
            Role::Bias(Linear::Q | Linear::K | Linear::V) => self.attention.qkv_bias,
            Role::Bias(Linear::O) => self.attention.output_bias,
            Role::Bias(Linear::Gate | Linear::Up | Linear::Down) => self.mlp.bias,
            Role::Router | Role::Expert(..) => self.mlp.experts.is_some(),
            Role::Norm(_)
            | Role::Linear(_)
            | Role::TokenEmbedding
            | Role::PositionEmbedding
            | Role::LmHead => true,
        }
    }
}

impl ModelSpec {
    /// All tensors of the model, in the order of a forward pass.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> + '_ {
        let family = self.architecture.family();
        let outside = move |name: &str, role: Role| TensorSpec {
            name: name.to_owned(),
            shape: self.shape(role),
            layer: None,
            role,
        };
        let head = (!self.tied_embeddings).then(|| outside(family.lm_head, Role::LmHead));
        std::iter::once(outside(family.token_embedding, Role::TokenEmbedding))
            .chain((0..self.layers).flat_map(|layer| self.layer_tensors(layer)))
            .chain(std::iter::once(outside(family.final_norm, Role::Norm(NormSite::Final))))
            .chain(head)
    }

    /// The tensors of decoder layer `layer`, in the order of a forward pass.
    pub fn layer_tensors(&self, layer: u64) -> impl Iterator<Item = TensorSpec> + '_ {
        let family = self.architecture.family();
        let block = self.block(layer);
        let tensors = family.layer.iter().filter(move |(role, _)| block.has(*role));
        tensors.map(move |(role, name)| TensorSpec {
            name: format!("{}.{layer}.{name}", family.layer_prefix),
            shape: self.shape(*role),
            layer: usize::try_from(layer).ok(),
            role: *role,
        })
    }

    /// Whether a checkpoint may have a tensor of this name that the model does not need: a copy of tied
    /// embeddings, or RoPE frequencies.
    #[must_use]
    pub fn is_redundant(&self, name: &str) -> bool {
        let copy_of_tied = name == self.architecture.family().lm_head && self.tied_embeddings;
        copy_of_tied || name.ends_with("rotary_emb.inv_freq")
    }

    /// The shape of a tensor of this role.
    fn shape(&self, role: Role) -> Vec<u64> {
        let q_width = self.heads.saturating_mul(self.head_dim);
        let kv_width = self.kv_heads.saturating_mul(self.head_dim);
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let rows = |linear: Linear| match linear {
            Linear::Q => q_width,
            Linear::K | Linear::V => kv_width,
            Linear::Gate | Linear::Up => intermediate,
            Linear::O | Linear::Down => hidden,
        };
        match role {
            Role::TokenEmbedding | Role::LmHead => vec![self.vocab_size, hidden],
            Role::PositionEmbedding => vec![self.context_length, hidden],
            Role::Norm(NormSite::Query | NormSite::Key)
            | Role::NormBias(NormSite::Query | NormSite::Key) => vec![self.head_dim],
            Role::Norm(_) | Role::NormBias(_) => vec![hidden],
            Role::Bias(linear) => vec![rows(linear)],
            Role::Linear(linear) | Role::Expert(_, linear) => {
                let cols = match linear.input() {
                    LinearInput::Qkv | LinearInput::GateUp => hidden,
                    LinearInput::AttentionOutput => q_width,
                    LinearInput::Down => intermediate,
                };
                vec![rows(linear), cols]
            }
            Role::Router => vec![self.block(0).mlp.experts.map_or(0, |e| e.count), hidden],
        }
    }
}
