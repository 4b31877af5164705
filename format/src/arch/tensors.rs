//! The tensors of a model file: names, shapes, roles (spec, metadata §2.2). The names are those of LLaMA
//! checkpoints, for all families.

use super::block::{Block, MlpKind, NormKind, QkNorm};
use super::roles::{Linear, LinearInput, NormSite, Role, TensorSpec};
use super::spec::ModelSpec;

/// The tensors of a decoder layer in the order of a forward pass: the role, and the name after the index of the
/// layer. The experts come last, one after another, so that each is contiguous in a file.
const LAYER: &[(Role, &str)] = &[
    (Role::Norm(NormSite::Attention), "input_layernorm.weight"),
    (Role::NormBias(NormSite::Attention), "input_layernorm.bias"),
    (Role::Linear(Linear::Q), "self_attn.q_proj.weight"),
    (Role::Bias(Linear::Q), "self_attn.q_proj.bias"),
    (Role::Linear(Linear::K), "self_attn.k_proj.weight"),
    (Role::Bias(Linear::K), "self_attn.k_proj.bias"),
    (Role::Linear(Linear::V), "self_attn.v_proj.weight"),
    (Role::Bias(Linear::V), "self_attn.v_proj.bias"),
    (Role::Norm(NormSite::Query), "self_attn.q_norm.weight"),
    (Role::Norm(NormSite::Key), "self_attn.k_norm.weight"),
    (Role::Linear(Linear::O), "self_attn.o_proj.weight"),
    (Role::Bias(Linear::O), "self_attn.o_proj.bias"),
    (Role::Norm(NormSite::AttentionOutput), "self_attn.output_norm.weight"),
    (Role::Norm(NormSite::Mlp), "post_attention_layernorm.weight"),
    (Role::NormBias(NormSite::Mlp), "post_attention_layernorm.bias"),
    (Role::Router, "mlp.router.weight"),
    (Role::Linear(Linear::Gate), "mlp.gate_proj.weight"),
    (Role::Bias(Linear::Gate), "mlp.gate_proj.bias"),
    (Role::Linear(Linear::Up), "mlp.up_proj.weight"),
    (Role::Bias(Linear::Up), "mlp.up_proj.bias"),
    (Role::Linear(Linear::Down), "mlp.down_proj.weight"),
    (Role::Bias(Linear::Down), "mlp.down_proj.bias"),
    (Role::Norm(NormSite::MlpOutput), "mlp.output_norm.weight"),
];

/// The matrices of an expert: the linear layer, and the name after the index of the expert.
const EXPERT: &[(Linear, &str)] = &[
    (Linear::Gate, "gate_proj.weight"),
    (Linear::Up, "up_proj.weight"),
    (Linear::Down, "down_proj.weight"),
];

/// The tensors outside the decoder layers that come before these.
const BEFORE: &[(Role, &str)] = &[
    (Role::TokenEmbedding, "model.embed_tokens.weight"),
    (Role::PositionEmbedding, "model.embed_positions.weight"),
    (Role::ProjectIn, "model.project_in.weight"),
];

/// The tensors outside the decoder layers that come after these.
const AFTER: &[(Role, &str)] = &[
    (Role::Norm(NormSite::Final), "model.norm.weight"),
    (Role::NormBias(NormSite::Final), "model.norm.bias"),
    (Role::ProjectOut, "model.project_out.weight"),
    (Role::LmHead, "lm_head.weight"),
];

impl Block {
    /// Whether the layer has a tensor of this role.
    fn has(&self, role: Role) -> bool {
        let has_experts = self.mlp.experts.is_some();
        match role {
            Role::Norm(site) => self.has_norm(site),
            Role::NormBias(site) => self.norm.kind == NormKind::Layer && self.has_norm(site),
            Role::Linear(Linear::Gate) => self.mlp.kind == MlpKind::Gated && !has_experts,
            Role::Linear(Linear::Up | Linear::Down) => !has_experts,
            Role::Linear(_) => true,
            Role::Bias(Linear::Q | Linear::K | Linear::V) => self.attention.qkv_bias,
            Role::Bias(Linear::O) => self.attention.output_bias,
            Role::Bias(linear) => self.mlp.bias && self.has(Role::Linear(linear)),
            Role::Router | Role::Expert(..) => has_experts,
            Role::TokenEmbedding
            | Role::PositionEmbedding
            | Role::ProjectIn
            | Role::ProjectOut
            | Role::LmHead => false,
        }
    }

    fn has_norm(&self, site: NormSite) -> bool {
        match site {
            NormSite::Attention | NormSite::Mlp => true,
            NormSite::Query | NormSite::Key => self.attention.qk_norm != QkNorm::None,
            NormSite::AttentionOutput | NormSite::MlpOutput => {
                self.norm.placement == super::block::NormPlacement::Sandwich
            }
            NormSite::Final => false,
        }
    }
}

impl ModelSpec {
    /// All tensors of the model, in the order of a forward pass.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> + '_ {
        let outside = |list: &'static [(Role, &'static str)]| {
            let present = list.iter().filter(|(role, _)| self.has_outside(*role));
            present.map(|(role, name)| TensorSpec {
                name: (*name).to_owned(),
                shape: self.shape(*role, 0),
                layer: None,
                role: *role,
            })
        };
        outside(BEFORE)
            .chain((0..self.layers).flat_map(|layer| self.layer_tensors(layer)))
            .chain(outside(AFTER))
    }

    /// The parameters that a token uses: all but those of experts that are not active.
    #[must_use]
    pub fn active_parameters(&self) -> u64 {
        let elements = |tensor: &TensorSpec| {
            tensor.shape.iter().fold(1u64, |product, size| product.saturating_mul(*size))
        };
        let is_active = |tensor: &TensorSpec| match tensor.role {
            Role::Expert(expert, _) => {
                self.experts.as_ref().is_some_and(|experts| u64::from(expert) < experts.active)
            }
            _ => true,
        };
        let active = self.tensors().filter(is_active);
        active.fold(0u64, |sum, tensor| sum.saturating_add(elements(&tensor)))
    }

    /// The tensors of decoder layer `layer`, in the order of a forward pass.
    pub fn layer_tensors(&self, layer: u64) -> impl Iterator<Item = TensorSpec> + '_ {
        let block = self.block(layer);
        let experts = block.mlp.experts.map_or(0, |experts| experts.count);
        let shared = LAYER.iter().filter(move |(role, _)| block.has(*role));
        let shared = shared.map(|(role, name)| (*role, (*name).to_owned()));
        let of_experts = (0..u32::try_from(experts).unwrap_or(u32::MAX)).flat_map(|expert| {
            EXPERT.iter().map(move |(linear, name)| {
                (Role::Expert(expert, *linear), format!("mlp.experts.{expert}.{name}"))
            })
        });
        shared.chain(of_experts).map(move |(role, name)| TensorSpec {
            name: format!("model.layers.{layer}.{name}"),
            shape: self.shape(role, layer),
            layer: usize::try_from(layer).ok(),
            role,
        })
    }

    /// Whether the model has a tensor of this role outside the decoder layers.
    fn has_outside(&self, role: Role) -> bool {
        match role {
            Role::TokenEmbedding => true,
            Role::PositionEmbedding => self.learned_positions,
            Role::ProjectIn | Role::ProjectOut => self.embedding_size.is_some(),
            Role::Norm(NormSite::Final) => !self.no_final_norm,
            Role::NormBias(NormSite::Final) => {
                !self.no_final_norm && self.norm_kind == NormKind::Layer
            }
            Role::LmHead => !self.tied_embeddings,
            _ => false,
        }
    }

    /// The shape of a tensor of this role in decoder layer `layer`.
    pub(super) fn shape(&self, role: Role, layer: u64) -> Vec<u64> {
        let (hidden, embedding) = (self.hidden_size, self.embedding_size());
        match role {
            Role::TokenEmbedding | Role::LmHead => vec![self.vocab_size, embedding],
            Role::PositionEmbedding => vec![self.context_length, hidden],
            Role::ProjectIn => vec![hidden, embedding],
            Role::ProjectOut => vec![embedding, hidden],
            Role::Norm(site) | Role::NormBias(site) => vec![self.norm_width(site)],
            Role::Bias(linear) => vec![self.rows(linear, layer)],
            Role::Linear(linear) | Role::Expert(_, linear) => {
                vec![self.rows(linear, layer), self.cols(linear, layer)]
            }
            Role::Router => {
                vec![self.experts.as_ref().map_or(0, |experts| experts.count), hidden]
            }
        }
    }

    /// The outputs of a linear layer.
    pub(super) fn rows(&self, linear: Linear, layer: u64) -> u64 {
        match linear {
            Linear::Q => self.q_width(),
            Linear::K | Linear::V => self.kv_heads.saturating_mul(self.head_dim),
            Linear::Gate | Linear::Up => self.block(layer).mlp.intermediate_size,
            Linear::O | Linear::Down => self.hidden_size,
        }
    }

    /// The inputs of a linear layer.
    pub(super) fn cols(&self, linear: Linear, layer: u64) -> u64 {
        match linear.input() {
            LinearInput::Qkv | LinearInput::GateUp => self.hidden_size,
            LinearInput::AttentionOutput => self.q_width(),
            LinearInput::Down => self.block(layer).mlp.intermediate_size,
        }
    }

    fn q_width(&self) -> u64 {
        self.heads.saturating_mul(self.head_dim)
    }

    fn norm_width(&self, site: NormSite) -> u64 {
        let is_full = self.qk_norm == QkNorm::Full;
        match site {
            NormSite::Query if is_full => self.q_width(),
            NormSite::Key if is_full => self.kv_heads.saturating_mul(self.head_dim),
            NormSite::Query | NormSite::Key => self.head_dim,
            _ => self.hidden_size,
        }
    }
}
