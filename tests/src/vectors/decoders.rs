//! Model files of `model.architecture` `decoder`.

use stb_format::arch::{
    Activation, Biases, ExpertsSpec, LayerSet, MlpKind, NormKind, NormPlacement, QkNorm, Window,
};
use stb_format::{File, Meta, ModelSpec, RopePairing, RopeScaling, Value};

use super::valid::{Tensors, file, model, model_of};

/// A model of three layers with most of what a decoder may have.
fn rich() -> ModelSpec {
    ModelSpec {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        context_length: 64,
        norm_kind: NormKind::RmsPlusOne,
        norm_placement: NormPlacement::Sandwich,
        norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_pairing: RopePairing::Interleaved,
        rope_scaling: RopeScaling::LongRope {
            short_factors: vec![1.0, 1.25, 1.5],
            long_factors: vec![1.0, 4.0, 16.0],
            attention_factor: 1.125,
            original_context: 32,
        },
        rope_dim: Some(6),
        rope_layers: LayerSet::Only(vec![0, 1]),
        local_rope_theta: Some(1e4),
        attention_scale: Some(0.25),
        attention_soft_cap: Some(50.0),
        window: Some(Window { size: 16, layers: LayerSet::Only(vec![0, 2]) }),
        qk_norm: QkNorm::Head,
        biases: Biases { qkv: true, attention_output: true, mlp: true },
        activation: Activation::GeluTanh,
        experts: Some(ExpertsSpec {
            count: 4,
            active: 2,
            intermediate_size: 24,
            normalize: true,
            layers: LayerSet::Only(vec![1]),
        }),
        embedding_scale: Some(5.65),
        embedding_size: Some(24),
        logit_soft_cap: Some(30.0),
        ..ModelSpec::default()
    }
}

/// A model with LayerNorm after the sums, learned positions and no final norm.
fn learned() -> ModelSpec {
    ModelSpec {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        kv_heads: 4,
        head_dim: 8,
        context_length: 64,
        norm_kind: NormKind::Layer,
        norm_placement: NormPlacement::Post,
        norm_eps: 1e-5,
        no_final_norm: true,
        rope_theta: 1e4,
        learned_positions: true,
        qk_norm: QkNorm::Full,
        biases: Biases { qkv: true, attention_output: true, mlp: true },
        mlp: MlpKind::Plain,
        activation: Activation::Relu,
        tied_embeddings: true,
        ..ModelSpec::default()
    }
}

/// A file with some entries changed, added or removed.
fn changed((tensors, meta): (Tensors, Meta), changes: &[(&str, Option<Value>)]) -> Vec<u8> {
    let base = file(&tensors, &meta);
    let parsed = File::open(&base).expect("a valid model");
    let is_kept = |key: &str| changes.iter().all(|(changed, _)| *changed != key);
    let kept = parsed.meta().iter().filter(|(key, _)| is_kept(key));
    let kept = kept.map(|(key, value)| (key.to_owned(), value.to_value()));
    let new = changes.iter().filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
    let mut meta = Meta::new();
    for (key, value) in kept.chain(new) {
        meta.set(&key, value).expect("a valid entry");
    }
    file(&tensors, &meta)
}

/// The rich model with some entries changed, added or removed.
pub(super) fn changed_decoder(changes: &[(&str, Option<Value>)]) -> Vec<u8> {
    changed(model_of(&rich(), 12), changes)
}

/// Valid files: name, description, content.
pub(super) fn valid() -> [(&'static str, &'static str, Vec<u8>); 4] {
    let text = |value: &str| Some(Value::Text(value.to_owned()));
    let strange = changed(
        llama(),
        &[
            ("model.norm_placement", Some(Value::U64(1))),
            ("model.attention.window", Some(Value::U64(0))),
            ("model.mlp", text("triple")),
        ],
    );
    let plain = changed(llama(), &[("model.architecture", text("decoder"))]);
    let unused = changed(
        model_of(&learned(), 13),
        &[
            ("model.experts.active", Some(Value::U64(0))),
            ("model.experts.layers", text("all")),
            ("model.attention.window_layers", Some(Value::U64List(vec![3, 3]))),
            ("model.rope.short_factors", text("short")),
        ],
    );
    [
        (
            "decoder",
            "norms around sublayers and of heads, experts, a window, longrope on parts of heads, soft caps, biases, projections",
            changed_decoder(&[]),
        ),
        (
            "decoder-learned",
            "LayerNorm after sums, learned positions, no final norm, no gate; invalid values of keys that are not in use",
            unused,
        ),
        ("decoder-plain", "a decoder without any key of its own", plain),
        ("llama-with-decoder-keys", "keys of decoders in a model that is none", strange),
    ]
}

/// The model of the vector `model`.
fn llama() -> (Tensors, Meta) {
    let (tensors, meta, _) = model();
    (tensors, meta)
}
