//! [`Block`]: a description of a decoder layer.

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormKind {
    /// x · w / sqrt(mean x² + ε): LLaMA and most models after it.
    #[default]
    Rms,
    /// x · (1 + w) / sqrt(mean x² + ε): Gemma.
    RmsPlusOne,
    /// (x − mean x) · w / sqrt(var x + ε) + b: OPT, GPT-2.
    Layer,
}

/// The positions of the norms in a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP: most models.
    #[default]
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
    /// The factor of the scores q · k: 1 / √head_dim in most models.
    pub scale: f64,
    /// RoPE on queries and keys: its table of frequencies, or `None` for a layer without RoPE.
    pub rope: Option<RopeTable>,
    /// Whether q, k and v have biases: Qwen2, OPT.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias: OPT.
    pub output_bias: bool,
    /// The norm of queries and keys before RoPE.
    pub qk_norm: QkNorm,
    /// The size w of the sliding window: a token attends to itself and the w − 1 tokens before it, as
    /// in Mistral and Gemma. `None` for full causal attention.
    pub window: Option<u64>,
    /// The soft cap c: scores s become c · tanh(s / c), as in Gemma 2.
    pub soft_cap: Option<f64>,
}

/// The norm of queries and keys before RoPE. Its formula is that of the other norms of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None: most models.
    #[default]
    None,
    /// Each head is normalized on its own, with one weight `[head_dim]` for all heads: Qwen3, Gemma 3.
    Head,
    /// All heads are normalized together, with a weight `[heads · head_dim]`: OLMoE.
    Full,
}

/// The feed-forward network of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// With or without a gate.
    pub kind: MlpKind,
    /// The activation function.
    pub activation: Activation,
    /// Width between the linear layers; of one expert in a mixture of experts.
    pub intermediate_size: u64,
    /// Whether the linear layers have biases: OPT, GPT-2.
    pub bias: bool,
    /// The mixture of experts, if the MLP is one: Mixtral, Qwen3-MoE, OLMoE.
    pub experts: Option<Experts>,
}

/// The linear layers of an MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MlpKind {
    /// down(act(gate(x)) ∘ up(x)).
    #[default]
    Gated,
    /// down(act(up(x))).
    Plain,
}

/// A mixture of experts. A router, a linear layer without bias, gives each expert a logit. The softmax
/// over all logits weighs the outputs of the `active` experts with the largest logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts per layer.
    pub count: u64,
    /// Experts per token.
    pub active: u64,
    /// Whether the weights of the active experts are divided by their sum.
    pub normalize: bool,
}

/// An activation function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `silu`: x · sigmoid(x).
    #[default]
    Silu,
    /// `relu`: max(x, 0).
    Relu,
    /// `gelu`: x · Φ(x).
    Gelu,
    /// `gelu_tanh`: the approximation of `gelu` by tanh.
    GeluTanh,
}

/// The frequency table that the RoPE of a layer uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeTable {
    /// [`ModelSpec::rope_theta`](super::ModelSpec::rope_theta) with
    /// [`ModelSpec::rope_scaling`](super::ModelSpec::rope_scaling).
    Global,
    /// [`ModelSpec::local_rope_theta`](super::ModelSpec::local_rope_theta) without scaling: the windowed layers
    /// of Gemma 3.
    Local,
}
