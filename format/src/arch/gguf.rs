//! GGUF files: their architectures as families of this crate, and the names of their tensors.
//!
//! All architectures of GGUF share the names of tensors and, after the name of the architecture, the keys of
//! metadata. A [`GgufArchitecture`] says which fields of a `config.json` the keys stand for.

use super::family::SourceTensor;
use super::roles::{Linear, NormSite, Role, TensorSpec};
use super::spec::ModelSpec;

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
    /// Fields with values that the architecture implies.
    pub implied: &'static [(&'static str, Implied)],
    /// Whether the rows of q and k are stored for RoPE on neighboring elements: row 2i + a of a head is row
    /// i + a · head_dim/2 of the same head in a Hugging Face checkpoint.
    pub interleaves_heads: bool,
    /// Whether the weights of norms include the 1 that the family adds.
    pub norms_include_one: bool,
    /// Tensors that hold the outputs of several linear layers one after another: the part of the name between
    /// layer and ending, and the linear layers.
    pub stacked: &'static [(&'static str, &'static [Linear])],
}

/// A value that an architecture implies.
#[derive(Clone, Copy, Debug)]
pub enum Implied {
    /// A text.
    Text(&'static str),
    /// A boolean.
    Bool(bool),
    /// The width of a head, or, in models with this number of layers, hidden size over heads.
    HeadWidthUnless(u64),
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

/// The fields of decoders with RMSNorm and RoPE, and those of experts and caps, which are optional here. A family
/// that needs one reports a missing field.
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
    optional("rope.freq_base_swa", "rope_local_base_freq"),
    optional("attn_logit_softcapping", "attn_logit_softcapping"),
    optional("final_logit_softcapping", "final_logit_softcapping"),
    optional("expert_count", "num_local_experts"),
    optional("expert_count", "num_experts"),
    optional("expert_used_count", "num_experts_per_tok"),
    optional("expert_feed_forward_length", "moe_intermediate_size"),
];

/// The fields of GPT-2.
const GPT2: &[GgufField] = &[
    required("context_length", "n_positions"),
    required("embedding_length", "n_embd"),
    required("block_count", "n_layer"),
    required("feed_forward_length", "n_inner"),
    required("attention.head_count", "n_head"),
    required("attention.layer_norm_epsilon", "layer_norm_epsilon"),
];

const SILU: (&str, Implied) = ("hidden_act", Implied::Text("silu"));
const GELU: (&str, Implied) = ("hidden_activation", Implied::Text("gelu_pytorch_tanh"));
const STACKED_QKV: (&str, &[Linear]) = ("attn_qkv", &[Linear::Q, Linear::K, Linear::V]);

/// What most architectures have.
const BASE: GgufArchitecture = GgufArchitecture {
    name: "",
    model_type: "",
    expert_model_type: None,
    fields: RMS_DECODER,
    implied: &[SILU],
    interleaves_heads: false,
    norms_include_one: false,
    stacked: &[],
};

/// All supported architectures. Mistral's models are stored as `llama`.
static ARCHITECTURES: &[GgufArchitecture] = &[
    GgufArchitecture {
        name: "llama",
        model_type: "llama",
        expert_model_type: Some("mixtral"),
        interleaves_heads: true,
        ..BASE
    },
    GgufArchitecture {
        name: "gemma2",
        model_type: "gemma2",
        implied: &[GELU, ("query_pre_attn_scalar", Implied::HeadWidthUnless(46))],
        norms_include_one: true,
        ..BASE
    },
    GgufArchitecture {
        name: "gemma3",
        model_type: "gemma3_text",
        implied: &[GELU, ("query_pre_attn_scalar", Implied::HeadWidthUnless(62))],
        norms_include_one: true,
        ..BASE
    },
    GgufArchitecture {
        name: "gpt2",
        model_type: "gpt2",
        fields: GPT2,
        implied: &[("activation_function", Implied::Text("gelu_new"))],
        stacked: &[STACKED_QKV],
        ..BASE
    },
    GgufArchitecture {
        name: "olmoe",
        model_type: "olmoe",
        implied: &[SILU, ("norm_topk_prob", Implied::Bool(false))],
        ..BASE
    },
    GgufArchitecture {
        name: "phi3",
        model_type: "phi3",
        stacked: &[STACKED_QKV, ("ffn_up", &[Linear::Gate, Linear::Up])],
        ..BASE
    },
    GgufArchitecture { name: "qwen2", model_type: "qwen2", ..BASE },
    GgufArchitecture { name: "qwen3", model_type: "qwen3", ..BASE },
    GgufArchitecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        implied: &[SILU, ("norm_topk_prob", Implied::Bool(true))],
        ..BASE
    },
    GgufArchitecture { name: "smollm3", model_type: "smollm3", interleaves_heads: true, ..BASE },
];

impl GgufArchitecture {
    /// The architecture with this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// Where a file may have `tensor` of a model `spec`: the possible places, the usual one first. Experts are
    /// stacked in one tensor, or, in old files, each has its own.
    #[must_use]
    pub fn sources(&self, spec: &ModelSpec, tensor: &TensorSpec) -> Vec<SourceTensor> {
        let place = |name: String, shape: Vec<u64>, first_row: u64| SourceTensor {
            names: vec![name],
            shape,
            is_transposed: false,
            first_row,
        };
        let layer = tensor.layer.map(|layer| u64::try_from(layer).unwrap_or(u64::MAX));
        let mut places = Vec::new();
        match (tensor.role, layer) {
            (Role::Expert(expert, linear), Some(layer)) => {
                let stem = linear_stem(linear);
                let (rows, cols) = (spec.rows(linear, layer), spec.cols(linear, layer));
                let count = spec.experts.as_ref().map_or(0, |experts| experts.count);
                let first = u64::from(expert).saturating_mul(rows);
                let all = format!("blk.{layer}.{stem}_exps.weight");
                places.push(place(all, vec![count, rows, cols], first));
                let one = format!("blk.{layer}.{stem}.{expert}.weight");
                places.push(place(one, vec![rows, cols], 0));
            }
            (Role::Linear(linear) | Role::Bias(linear), Some(layer)) => {
                let stacked = self.stacked.iter().find(|(_, linears)| linears.contains(&linear));
                if let Some((stem, linears)) = stacked {
                    let is_bias = matches!(tensor.role, Role::Bias(_));
                    let ending = if is_bias { "bias" } else { "weight" };
                    let sum = |linears: &mut dyn Iterator<Item = &Linear>| {
                        linears.fold(0u64, |sum, l| sum.saturating_add(spec.rows(*l, layer)))
                    };
                    let first = sum(&mut linears.iter().take_while(|l| **l != linear));
                    let mut shape = tensor.shape.clone();
                    if let Some(rows) = shape.first_mut() {
                        *rows = sum(&mut linears.iter());
                    }
                    places.push(place(format!("blk.{layer}.{stem}.{ending}"), shape, first));
                }
            }
            _ => {}
        }
        // A stacked tensor may have the name that the tensor would have on its own.
        let own = gguf_name(tensor.role, tensor.layer);
        if let Some(name) = own.filter(|name| places.iter().all(|p| !p.names.contains(name))) {
            places.push(place(name, tensor.shape.clone(), 0));
        }
        places
    }

    /// The names of all architectures.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ARCHITECTURES.iter().map(|architecture| architecture.name)
    }
}

/// The tensors of LongRoPE's divisors, one per pair of elements, which are not weights.
pub const GGUF_SHORT_FACTORS: &str = "rope_factors_short.weight";
/// As [`GGUF_SHORT_FACTORS`], for long contexts.
pub const GGUF_LONG_FACTORS: &str = "rope_factors_long.weight";
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
        Role::Expert(..) | Role::ProjectIn | Role::ProjectOut => return None,
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
