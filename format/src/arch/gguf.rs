//! GGUF files: their architectures as families of this crate, and the names of their tensors.
//!
//! All architectures of GGUF share the names of tensors and, after the name of the architecture, the keys of
//! metadata. A [`GgufArchitecture`] says which fields of a `config.json` the keys stand for.

use super::roles::{Linear, NormSite, Role};

/// A value of `general.architecture` and the `config.json` that says the same.
#[derive(Debug)]
pub struct GgufArchitecture {
    /// The value of `general.architecture`, with which the keys start.
    pub name: &'static str,
    /// The `model_type` of models without experts.
    pub model_type: &'static str,
    /// The `model_type` of mixtures of experts, if the architecture has them.
    pub expert_model_type: Option<&'static str>,
    /// The keys, and the fields that have the same value.
    pub fields: &'static [GgufField],
    /// Fields with texts that the architecture implies.
    pub implied: &'static [(&'static str, &'static str)],
    /// Whether the rows of q and k are stored for RoPE on neighboring elements: row 2i + a of a head is row
    /// i + a · head_dim/2 of the same head in a Hugging Face checkpoint.
    pub interleaves_heads: bool,
}

/// A metadata key of an architecture.
#[derive(Clone, Copy, Debug)]
pub struct GgufField {
    /// The key after the name of the architecture and a dot.
    pub key: &'static str,
    /// The field of `config.json`.
    pub field: &'static str,
    /// Whether a model cannot be read without it.
    pub required: bool,
}

const fn required(key: &'static str, field: &'static str) -> GgufField {
    GgufField { key, field, required: true }
}

const fn optional(key: &'static str, field: &'static str) -> GgufField {
    GgufField { key, field, required: false }
}

/// The fields of decoders with RMSNorm and RoPE.
const RMS_DECODER: &[GgufField] = &[
    required("context_length", "max_position_embeddings"),
    required("embedding_length", "hidden_size"),
    required("block_count", "num_hidden_layers"),
    required("feed_forward_length", "intermediate_size"),
    required("attention.head_count", "num_attention_heads"),
    optional("attention.head_count_kv", "num_key_value_heads"),
    optional("attention.key_length", "head_dim"),
    required("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    optional("attention.sliding_window", "sliding_window"),
    optional("rope.freq_base", "rope_theta"),
];

/// All supported architectures. Mistral's models are stored as `llama`.
static ARCHITECTURES: &[GgufArchitecture] = &[GgufArchitecture {
    name: "llama",
    model_type: "llama",
    expert_model_type: Some("mixtral"),
    fields: RMS_DECODER,
    implied: &[("hidden_act", "silu")],
    interleaves_heads: true,
}];

impl GgufArchitecture {
    /// The architecture with this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// The names of all architectures.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ARCHITECTURES.iter().map(|architecture| architecture.name)
    }
}

/// The tensor of RoPE's divisors, one per pair of elements, which is not a weight.
pub const GGUF_ROPE_DIVISORS: &str = "rope_freqs.weight";

/// The name of a tensor in GGUF files; `None` if they have no tensor of its own for this role.
#[must_use]
pub fn gguf_name(role: Role, layer: Option<usize>) -> Option<String> {
    let (stem, ending) = match role {
        Role::TokenEmbedding => ("token_embd", "weight"),
        Role::PositionEmbedding => ("position_embd", "weight"),
        Role::LmHead => ("output", "weight"),
        Role::Norm(site) => (norm_stem(site), "weight"),
        Role::NormBias(site) => (norm_stem(site), "bias"),
        Role::Linear(linear) => (linear_stem(linear), "weight"),
        Role::Bias(linear) => (linear_stem(linear), "bias"),
        Role::Router => ("ffn_gate_inp", "weight"),
        Role::Expert(..) => return None,
    };
    Some(match layer {
        Some(layer) => format!("blk.{layer}.{stem}.{ending}"),
        None => format!("{stem}.{ending}"),
    })
}

fn norm_stem(site: NormSite) -> &'static str {
    match site {
        NormSite::Attention => "attn_norm",
        NormSite::AttentionOutput => "post_attention_norm",
        NormSite::Query => "attn_q_norm",
        NormSite::Key => "attn_k_norm",
        NormSite::Mlp => "ffn_norm",
        NormSite::MlpOutput => "post_ffw_norm",
        NormSite::Final => "output_norm",
    }
}

fn linear_stem(linear: Linear) -> &'static str {
    match linear {
        Linear::Q => "attn_q",
        Linear::K => "attn_k",
        Linear::V => "attn_v",
        Linear::O => "attn_output",
        Linear::Gate => "ffn_gate",
        Linear::Up => "ffn_up",
        Linear::Down => "ffn_down",
    }
}
