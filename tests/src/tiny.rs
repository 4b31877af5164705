//! Small random checkpoints in the Hugging Face layout.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value as Json, json};
use stb_format::encoding::Dense;
use stb_runtime::{Config, parse_config};

use stb_random::Rng;

/// A LLaMA configuration with ragged widths and grouped-query attention. Tests change its fields.
#[must_use]
pub fn config() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 44,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": 1,
    })
}

/// Writes a random checkpoint with this configuration; `change` may edit the values of a tensor.
///
/// # Panics
/// If the configuration is not valid or the folder cannot be written.
pub fn write(folder: &Path, config: &Json, kind: Dense, change: impl Fn(&str, &mut Vec<f32>)) {
    write_shards(folder, config, kind, 1, change);
}

/// Writes the same checkpoint in several files with an index.
///
/// # Panics
/// As for [`write()`].
pub fn write_shards(
    folder: &Path,
    config: &Json,
    kind: Dense,
    shards: usize,
    change: impl Fn(&str, &mut Vec<f32>),
) {
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("config.json");
    std::fs::write(folder.join("tokenizer.json"), tokenizer()).expect("tokenizer.json");
    let Config { family, spec, .. } =
        parse_config(&config.to_string()).expect("a valid configuration");
    let mut rng = Rng(99);
    let mut tensors = Vec::new();
    for tensor in spec.tensors() {
        let source = family.source(&spec, &tensor).expect("a name in checkpoints");
        assert_eq!(source.shape, tensor.shape, "a family that stores tensors as they are");
        let (name, shape) = (source.names[0].clone(), tensor.shape);
        let count = shape.iter().product::<u64>() as usize;
        let spread = if shape.len() == 1 { 0.1 } else { 0.5 };
        let center = if shape.len() == 1 { 1.0 } else { 0.0 };
        let mut values: Vec<f32> = (0..count).map(|_| center + spread * rng.float()).collect();
        change(&name, &mut values);
        let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
        tensors.push((name, shape, kind.encode(&values)));
    }
    let dtype = match kind {
        Dense::F32 => Dtype::F32,
        Dense::F16 => Dtype::F16,
        Dense::Bf16 => Dtype::BF16,
    };
    let mut map = serde_json::Map::new();
    let per_file = tensors.len().div_ceil(shards);
    for (i, part) in tensors.chunks(per_file).enumerate() {
        let file = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", i + 1),
        };
        let views = part.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(dtype, shape.clone(), bytes).expect("bytes of the shape"))
        });
        safetensors::serialize_to_file(views, None, &folder.join(&file)).expect("a weight file");
        for (name, _, _) in part {
            map.insert(name.clone(), file.clone().into());
        }
    }
    if shards > 1 {
        let index = json!({ "metadata": {}, "weight_map": map });
        let path = folder.join("model.safetensors.index.json");
        std::fs::write(path, index.to_string()).expect("an index");
    }
}

/// A word-level tokenizer for letters.
#[must_use]
pub fn tokenizer() -> String {
    let special = ["<s>", "</s>", "<unk>"];
    let letters = ('a'..='z').map(|c| c.to_string());
    let words = special.iter().map(|s| (*s).to_owned()).chain(letters);
    let vocab: serde_json::Map<String, serde_json::Value> =
        words.enumerate().map(|(i, word)| (word, i.into())).collect();
    let added: Vec<serde_json::Value> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            serde_json::json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let mut tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Split", "pattern": { "Regex": "." }, "behavior": "Isolated", "invert": false },
        "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" },
    });
    // The vectors of the specification have this text.
    tokenizer.sort_all_objects();
    tokenizer.to_string()
}
