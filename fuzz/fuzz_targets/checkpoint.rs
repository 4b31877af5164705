//! Fuzzes safetensors files beside a valid `config.json`. The result must be an error, or a checkpoint whose weights can
//! be read.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use stb_runtime::Checkpoint;

const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": true}"#;

/// A folder in memory, where there is one.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let base = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let folder = base.join(format!("stb-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    folder
});

fuzz_target!(|data: &[u8]| {
    std::fs::write(FOLDER.join("model.safetensors"), data).unwrap();
    let Ok(checkpoint) = Checkpoint::open(&FOLDER, false) else { return };
    for tensor in checkpoint.spec.tensors() {
        if let Ok(weight) = checkpoint.weight(&tensor.name) {
            assert!(weight.decode().len() <= data.len());
        }
    }
});
