//! [`Block`]: a description of a decoder layer.

use super::spec::{Activation, ModelSpec};

/// A decoder layer: attention and an MLP, each with a residual connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The norms of the layer.
    pub norm: Norm,
    /// Attention.
    pub attention: Attention,
    /// The feed-forward network.
    pub mlp: Mlp,
}

/// The norms of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The formula.
    pub kind: NormKind,
    /// The positions of the norms.
    pub placement: NormPlacement,
    /// The ε under the root.
    pub eps: f64,
}

/// The formula of a norm; w is its weight, b its bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x · w / sqrt(mean x² + ε): LLaMA and most models after it.
    Rms,
    /// x · (1 + w) / sqrt(mean x² + ε): Gemma.
    RmsPlusOne,
    /// (x − mean x) · w / sqrt(var x + ε) + b: OPT, GPT-2.
    Layer,
}

/// The positions of the norms in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP: most models.
    Pre,
    /// After each residual sum: OPT-350M.
    Post,
    /// Before each sublayer and again before its output is added: Gemma 2 and 3.
    Sandwich,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// The position encoding.
    pub position: Position,
    /// Whether q, k and v have biases: Qwen2, OPT.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias: OPT.
    pub output_bias: bool,
    /// Whether each head of q and k is normalized before RoPE: Qwen3, Gemma 3.
    pub qk_norm: bool,
    /// The size of the sliding window, including the token itself: Mistral, Gemma. `None` for full
    /// causal attention.
    pub window: Option<u64>,
    /// The soft cap c: scores s become c · tanh(s / c), as in Gemma 2.
    pub soft_cap: Option<f64>,
}

/// A position encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// RoPE on queries and keys. [`ModelSpec`] has its pairing, base and scaling.
    Rope,
    /// Learned position embeddings are added to the token embeddings: OPT, GPT-2.
    Learned,
    /// None: every fourth layer of SmolLM3.
    None,
}

/// The feed-forward network of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// With or without a gate.
    pub kind: MlpKind,
    /// The activation function.
    pub activation: Activation,
    /// Width between the linear layers, per expert in a mixture of experts.
    pub intermediate_size: u64,
    /// Whether the linear layers have biases: OPT, GPT-2.
    pub bias: bool,
    /// The mixture of experts, if the MLP is one: Mixtral, Qwen3-MoE, OLMoE.
    pub experts: Option<Experts>,
}

/// The linear layers of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// down(act(gate(x)) ∘ up(x)).
    Gated,
    /// down(act(up(x))).
    Plain,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts per layer.
    pub count: u64,
    /// Experts per token.
    pub active: u64,
}

impl ModelSpec {
    /// The description of decoder layer `layer`. All layers are equal in the families that this
    /// version supports.
    #[must_use]
    pub fn block(&self, _layer: u64) -> Block {
        Block {
            norm: Norm { kind: NormKind::Rms, placement: NormPlacement::Pre, eps: self.norm_eps },
            attention: Attention {
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                position: Position::Rope,
                qkv_bias: false,
                output_bias: false,
                qk_norm: false,
                window: None,
                soft_cap: None,
            },
            mlp: Mlp {
                kind: MlpKind::Gated,
                activation: self.activation,
                intermediate_size: self.intermediate_size,
                bias: false,
                experts: None,
            },
        }
    }
}
