//! Models of well-known shapes with random weights, for measuring memory, start and speed without a
//! checkpoint.

use std::collections::HashMap;
use std::io::{Seek, Write};
use std::path::Path;

use anyhow::bail;
use stb_convert::Recipe;
use stb_convert::quantize::int_group::{IntOptions, fit_group};
use stb_format::arch::{ExpertsSpec, LayerSet, QkNorm, Role, TensorSpec};
use stb_format::encoding::Dense;
use stb_format::{Encoding, Meta, ModelSpec, Value, Writer};

use crate::tiny::{self, tokenizer};
use crate::vectors::content;
use stb_random::Rng;

/// The names that [`shape`] accepts.
pub const SHAPES: [&str; 7] =
    ["llama-1b", "llama-7b", "llama-13b", "llama-3-8b", "llama-70b", "qwen3-30b-a3b", "tiny"];

/// The architecture called `name`; `layers` replaces its number of decoder layers.
///
/// # Errors
/// If the name is not in [`SHAPES`].
pub fn shape(name: &str, layers: Option<u64>) -> anyhow::Result<ModelSpec> {
    if name == "qwen3-30b-a3b" {
        return Ok(mixture(layers.unwrap_or(48)));
    }
    // vocabulary, hidden, intermediate, layers, heads, key and value heads, context
    let [vocab_size, hidden_size, intermediate_size, depth, heads, kv_heads, context_length] =
        match name {
            // Llama 3.2 1B
            "llama-1b" => [128_256, 2048, 8192, 16, 32, 8, 131_072],
            "llama-7b" => [32_000, 4096, 11_008, 32, 32, 32, 4096],
            "llama-13b" => [32_000, 5120, 13_824, 40, 40, 40, 4096],
            "llama-3-8b" => [128_256, 4096, 14_336, 32, 32, 8, 8192],
            "llama-70b" => [32_000, 8192, 28_672, 80, 64, 8, 4096],
            "tiny" => [64, 96, 160, 2, 4, 2, 128],
            _ => bail!("{name} is not a shape; there are {}", SHAPES.join(", ")),
        };
    Ok(ModelSpec {
        vocab_size,
        hidden_size,
        intermediate_size,
        layers: layers.unwrap_or(depth),
        heads,
        kv_heads,
        head_dim: hidden_size / heads,
        context_length,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tied_embeddings: matches!(name, "llama-1b" | "tiny"),
        ..ModelSpec::default()
    })
}

/// Qwen3-30B-A3B: 128 experts, 8 of them per token.
fn mixture(layers: u64) -> ModelSpec {
    ModelSpec {
        vocab_size: 151_936,
        hidden_size: 2048,
        intermediate_size: 6144,
        layers,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        context_length: 40_960,
        norm_eps: 1e-6,
        rope_theta: 1_000_000.0,
        qk_norm: QkNorm::Head,
        experts: Some(ExpertsSpec {
            count: 128,
            active: 8,
            intermediate_size: 768,
            normalize: true,
            layers: LayerSet::All,
        }),
        ..ModelSpec::default()
    }
}

/// Writes a model of this architecture with the encodings of `recipe`. Tensors of the same shape and encoding
/// have the same weights, so that a large model takes seconds.
///
/// # Errors
/// If the recipe has a budget, so that its encodings are not fixed, or if writing to `out` fails.
pub fn write<W: Write + Seek>(spec: &ModelSpec, recipe: &Recipe, out: W) -> anyhow::Result<W> {
    if recipe.linear.goal().is_some() {
        bail!("{}: a recipe with fixed encodings is needed", recipe.name);
    }
    let dense = Encoding::Dense(Dense::F16);
    let body = recipe.linear.method();
    let linear =
        |cols| body.map_or(dense.clone(), |method| method.fitted(cols).quantizer().encoding());
    let table = |options: Option<IntOptions>, cols| {
        options.map_or(dense.clone(), |o| Encoding::IntGroup(fit_group(o.spec, cols)))
    };
    let mut writer = Writer::new(out)?;
    let mut payloads: HashMap<(Vec<u64>, [u8; 16], u32), Vec<u8>> = HashMap::new();
    let mut parameters = 0u64;
    for TensorSpec { name, shape, role, .. } in spec.tensors() {
        let cols = shape[shape.len() - 1] as usize;
        let encoding = match role {
            Role::TokenEmbedding => table(recipe.embeddings, cols),
            Role::LmHead => table(recipe.head, cols),
            Role::Linear(_) | Role::Expert(..) => linear(cols),
            _ => Encoding::Dense(Dense::F32),
        };
        parameters += shape.iter().product::<u64>();
        let key = (shape.clone(), encoding.params(), encoding.id());
        let payload = payloads.entry(key).or_insert_with(|| random(&shape, &encoding));
        writer.tensor(&name, &shape, &encoding, payload)?;
    }
    let mut meta = Meta::new();
    spec.write_meta(&mut meta)?;
    let entries = [
        ("model.parameters", Value::U64(parameters)),
        ("tokenizer.json", Value::Text(tokenizer())),
        ("tokenizer.add_bos", Value::Bool(true)),
        ("tokenizer.bos_id", Value::U64(0)),
        ("tokenizer.eos_ids", Value::U64List(Vec::new())),
        ("provenance.converter", Value::Text("random weights, for measurements only".into())),
    ];
    for (key, value) in entries {
        meta.set(key, value)?;
    }
    Ok(writer.finish(&meta)?)
}

/// Writes a dense checkpoint of this architecture in f16 with a vocabulary of 64 letters, to measure conversion.
///
/// # Panics
/// If the folder cannot be written.
pub fn checkpoint(folder: &Path, spec: &ModelSpec) {
    let mut config = tiny::config();
    if let Some(experts) = &spec.experts {
        config["model_type"] = "qwen3_moe".into();
        config["norm_topk_prob"] = experts.normalize.into();
        config["num_experts"] = experts.count.into();
        config["num_experts_per_tok"] = experts.active.into();
        config["moe_intermediate_size"] = experts.intermediate_size.into();
    }
    for (key, value) in [
        ("vocab_size", 64),
        ("hidden_size", spec.hidden_size),
        ("intermediate_size", spec.intermediate_size),
        ("num_hidden_layers", spec.layers),
        ("num_attention_heads", spec.heads),
        ("num_key_value_heads", spec.kv_heads),
        ("head_dim", spec.head_dim),
        ("max_position_embeddings", spec.context_length),
    ] {
        config[key] = value.into();
    }
    // Scaled so that outputs have about the size of inputs, as in trained models.
    let shrink = 2.0 / (spec.hidden_size as f32).sqrt();
    tiny::write(folder, &config, Dense::F16, |name, values| {
        if name.ends_with("_proj.weight") {
            values.iter_mut().for_each(|w| *w *= shrink);
        }
    });
}

/// Random letters, each a token of the vocabulary of [`checkpoint`].
#[must_use]
pub fn letters(tokens: usize) -> String {
    let letter = |i: u32| char::from(b'a' + (i.wrapping_mul(2_654_435_761) >> 20) as u8 % 26);
    (0..tokens as u32).flat_map(|i| [letter(i), ' ']).collect()
}

/// The payload of a random tensor of this shape, the same on each call; empty for unknown encodings.
#[must_use]
pub fn random(shape: &[u64], encoding: &Encoding) -> Vec<u8> {
    let mut rng = Rng(shape.iter().sum());
    let (rows, cols) = (shape[0] as usize, shape.get(1).map_or(1, |c| *c as usize));
    match *encoding {
        Encoding::IntGroup(spec) => content::int_group(&mut rng, spec, rows, cols).pack(),
        Encoding::Stbllm(spec) => content::stbllm(&mut rng, spec, rows, cols).pack(),
        Encoding::Nm(spec) => content::nm(&mut rng, spec, rows, cols).pack(),
        Encoding::Trellis(spec) => content::trellis(&mut rng, spec, rows, cols).pack(),
        Encoding::MixedRows(spec) => content::mixed_rows(&mut rng, spec, rows, cols).pack(),
        Encoding::Dense(kind) => {
            let spread = if shape.len() == 1 { 0.1 } else { 0.5 };
            let center = if shape.len() == 1 { 1.0 } else { 0.0 };
            let values: Vec<f32> =
                (0..rows * cols).map(|_| center + spread * rng.float()).collect();
            kind.encode(&values)
        }
        Encoding::Unknown { .. } => Vec::new(),
    }
}
