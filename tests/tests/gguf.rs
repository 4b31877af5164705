//! Models from GGUF files equal the same models from Hugging Face folders.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value as Json, json};
use stb_format::File;
use stb_format::encoding::Dense;
use stb_format::gguf::GgufType;
use stb_runtime::{
    Checkpoint, Engine, GenerateRequest, Message, OpenOptions, Piece, PromptInput, Sampler,
    SamplerOptions, Session, SessionOptions, State,
};
use stb_tests::conversion::converted;
use stb_tests::gguf::{BuiltTensor, GgufBuilder, q8_0};
use stb_tests::paths::{root, shared};
use stb_tests::programs::{note, skip};
use stb_tests::tiny;

/// The sizes of the random model: rows of matrices are whole blocks of Q8_0.
fn config() -> Json {
    let mut config = tiny::config();
    config["hidden_size"] = json!(64);
    config["intermediate_size"] = json!(96);
    config["head_dim"] = json!(16);
    config
}

/// How the matrices of a GGUF file are stored.
#[derive(Clone, Copy, PartialEq)]
enum Stored {
    F32,
    F16,
    Q8_0,
}

/// The name in GGUF files of a tensor of a LLaMA checkpoint.
fn gguf_name(name: &str) -> String {
    let name = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        if name.contains(from) {
            return name.replace(from, to);
        }
    }
    name
}

/// Rows of heads as llama.cpp's converter permutes them: [heads, 2, half] becomes [heads, half, 2].
fn interleave(values: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let half = values.len() / cols / heads / 2;
    let mut out = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for a in 0..2 {
                let row = (head * 2 + a) * half + i;
                out.extend(&values[row * cols..(row + 1) * cols]);
            }
        }
    }
    out
}

/// Writes the random model as a folder and as a GGUF file with the same values.
fn write(folder: &Path, stored: Stored) -> GgufBuilder {
    let config = config();
    let tensors = RefCell::new(Vec::new());
    tiny::write(folder, &config, Dense::F32, |name, values| {
        let is_matrix = values.len() > 100;
        let (kind, bytes) = match stored {
            Stored::Q8_0 if is_matrix => (GgufType::Q8_0, q8_0(values)),
            Stored::F16 if is_matrix => (GgufType::F16, Dense::F16.encode(values)),
            _ => (GgufType::F32, Dense::F32.encode(values)),
        };
        // The folder has the values that the GGUF file can hold.
        kind.decode(&bytes, values);
        let rows = if is_matrix { values.len() / cols_of(name) } else { 1 };
        let cols = values.len() / rows;
        let heads = match name {
            n if n.contains("q_proj") => Some(4),
            n if n.contains("k_proj") => Some(2),
            _ => None,
        };
        let values = heads.map_or_else(|| values.clone(), |heads| interleave(values, heads, cols));
        let bytes = match kind {
            GgufType::Q8_0 => q8_0(&values),
            GgufType::F16 => Dense::F16.encode(&values),
            _ => Dense::F32.encode(&values),
        };
        let shape = if is_matrix { vec![rows as u64, cols as u64] } else { vec![cols as u64] };
        let tensor = BuiltTensor { name: gguf_name(name), shape, kind: kind.id(), bytes };
        tensors.borrow_mut().push(tensor);
    });
    let mut file = GgufBuilder::default();
    metadata(&mut file, "");
    tensors.into_inner().into_iter().for_each(|tensor| file.tensor(tensor));
    file
}

fn cols_of(name: &str) -> usize {
    if name.contains("down_proj") { 96 } else { 64 }
}

/// Adds the metadata of the random model, without the key `but`.
fn metadata(file: &mut GgufBuilder, but: &str) {
    file.text("general.architecture", "llama");
    for (key, value) in [
        ("llama.context_length", 64),
        ("llama.embedding_length", 64),
        ("llama.block_count", 2),
        ("llama.feed_forward_length", 96),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 16),
        ("llama.attention.value_length", 16),
        ("llama.rope.dimension_count", 16),
    ] {
        if key != but {
            file.u32(key, value);
        }
    }
    if but != "llama.attention.layer_norm_rms_epsilon" {
        file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    }
    file.f32("llama.rope.freq_base", 10_000.0);
}

/// The logits after each token of `tokens`.
fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let engine = Engine::open(path, &OpenOptions::exact()).unwrap();
    let mut state = State::new(&engine, tokens.len());
    let mut all = Vec::new();
    engine.forward_all(&mut state, tokens, |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

#[test]
fn a_random_model_computes_as_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    for stored in [Stored::F32, Stored::F16, Stored::Q8_0] {
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, write(folder.path(), stored).build()).unwrap();
        let tokens = [3, 17, 0, 39, 21, 5];
        assert_eq!(logits(&path, &tokens), logits(folder.path(), &tokens));
        let checkpoint = Checkpoint::open(&path, true).unwrap();
        let of_folder = Checkpoint::open(folder.path(), true).unwrap();
        assert_eq!(checkpoint.spec, of_folder.spec);
        // Only what is permuted or dequantized takes memory: q and k of 2 layers here.
        let (q, k) = (64 * 64, 32 * 64);
        let all: u64 = checkpoint.spec.tensors().map(|t| t.shape.iter().product::<u64>()).sum();
        let norms = 5 * 64;
        let expected = match stored {
            Stored::F32 => 2 * (q + k) * 4,
            Stored::F16 => 2 * (q + k) * 2,
            Stored::Q8_0 => (all - norms) * 4,
        };
        assert_eq!(checkpoint.owned_bytes(), expected);
        // A weight in use is not loaded twice.
        let name = "model.layers.0.self_attn.q_proj.weight";
        let (first, second) = (checkpoint.weight(name).unwrap(), checkpoint.weight(name).unwrap());
        assert_eq!(first.bytes().as_ptr(), second.bytes().as_ptr());
        assert_eq!(
            first.bytes().len(),
            of_folder.weight(name).unwrap().bytes().len()
                / if stored == Stored::F16 { 2 } else { 1 }
        );
    }
}

/// The error of opening a file with these bytes.
fn error(folder: &Path, bytes: &[u8]) -> String {
    let path = folder.join("broken.gguf");
    std::fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path, true).unwrap_err().to_string()
}

#[test]
fn what_is_wrong_is_named() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let good = write(folder, Stored::F32);
    for key in [
        "llama.context_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut file = GgufBuilder::default();
        metadata(&mut file, key);
        file.tensor(BuiltTensor {
            name: "token_embd.weight".into(),
            shape: vec![40, 64],
            kind: 0,
            bytes: vec![0; 40 * 64 * 4],
        });
        let error = error(folder, &file.build());
        assert!(error.contains(key) && error.contains("missing"), "{error}");
    }
    let tensor = |name: &str, kind| BuiltTensor {
        name: name.into(),
        shape: vec![32],
        kind,
        bytes: vec![0; 128],
    };
    let mut file = good.clone();
    file.tensor(tensor("blk.0.attn_q.bias", 0));
    assert!(error(folder, &file.build()).contains("blk.0.attn_q.bias"));
    // A type that is unknown matters only in a tensor that is needed.
    let mut file = GgufBuilder::default();
    metadata(&mut file, "");
    file.tensor(tensor("token_embd.weight", 40));
    file.tensor(tensor("unused", 40));
    let text = error(folder, &file.build());
    assert!(text.contains("token_embd.weight"), "{text}");
    let mut file = GgufBuilder::default();
    file.text("general.architecture", "mamba");
    let text = error(folder, &file.build());
    assert!(text.contains("mamba") && text.contains("llama"), "{text}");
    let mut file = GgufBuilder::default();
    file.text("general.type", "adapter");
    assert!(error(folder, &file.build()).contains("adapter"));
    let bytes = good.build();
    assert!(error(folder, &bytes[..bytes.len() - 1]).contains("broken.gguf"));
}

#[test]
fn any_part_opens_all_and_missing_parts_are_named() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let whole = folder.join("whole.gguf");
    let bytes = write(folder, Stored::F32).build();
    std::fs::write(&whole, &bytes).unwrap();
    let paths = split(&whole, &bytes);
    let tokens = [1, 2, 3];
    let expected = logits(&whole, &tokens);
    for path in &paths {
        assert_eq!(logits(path, &tokens), expected);
    }
    // A part under another name.
    let renamed = folder.join("renamed.gguf");
    std::fs::copy(&paths[0], &renamed).unwrap();
    let error = Checkpoint::open(&renamed, true).unwrap_err().to_string();
    assert!(error.contains("parts"), "{error}");
    std::fs::remove_file(&paths[1]).unwrap();
    let error = Checkpoint::open(&paths[0], true).unwrap_err().to_string();
    assert!(error.contains("whole-00002-of-00003.gguf"), "{error}");
}

/// Writes a file in three parts: metadata and some tensors, and the other tensors.
fn split(whole: &Path, bytes: &[u8]) -> Vec<PathBuf> {
    let file = stb_format::gguf::Gguf::parse(bytes).unwrap();
    let size = file.tensors().len().div_ceil(3);
    let parts = file.tensors().chunks(size).enumerate().map(|(i, tensors)| {
        let mut part = GgufBuilder::default();
        if i == 0 {
            metadata(&mut part, "");
        }
        part.entry("split.no", 2, &(i as u16).to_le_bytes());
        part.entry("split.count", 2, &3u16.to_le_bytes());
        let total = file.tensors().len() as i32;
        part.entry("split.tensors.count", 5, &total.to_le_bytes());
        for tensor in tensors {
            let (kind, payload) = tensor.payload().unwrap();
            part.tensor(BuiltTensor {
                name: tensor.name().into(),
                shape: tensor.shape().to_vec(),
                kind: kind.id(),
                bytes: payload.to_vec(),
            });
        }
        let stem = whole.file_stem().unwrap().to_str().unwrap();
        let path = whole.with_file_name(format!("{stem}-{:05}-of-00003.gguf", i + 1));
        std::fs::write(&path, part.build()).unwrap();
        path
    });
    parts.collect()
}

/// The greedy continuation of `prompt`, and the ids of the prompt.
fn greedy(path: &Path, prompt: &str, count: usize) -> (Vec<u32>, Vec<u32>, String) {
    let engine = Arc::new(Engine::open(path, &OpenOptions::exact()).unwrap());
    let options = SessionOptions { context: Some(256), template: false };
    let mut session = Session::new(engine, options).unwrap();
    let options = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
    let request = GenerateRequest {
        max_tokens: Some(count),
        ..GenerateRequest::new(PromptInput::Text(prompt))
    };
    let mut sampler = Sampler::new(options);
    let answer = session.generate(&request, &mut sampler, |_| ControlFlow::Continue(())).unwrap();
    let ids = session.encode(PromptInput::Text(prompt)).unwrap();
    (ids, answer.tokens, answer.text)
}

#[test]
fn stories260k_equals_its_folder() {
    let Some(folder) = shared("data/models/stories260k") else {
        skip("the comparison of a GGUF file with its folder needs the shared data");
        return;
    };
    let whole = folder.join("gguf/stories260K-f32.gguf");
    let prompt = "Once upon a time, there was a dog. Ünïcödé 42!";
    let expected = greedy(&folder, prompt, 60);
    assert_eq!(greedy(&whole, prompt, 60), expected);
    assert_eq!(greedy(&folder.join("gguf/stories260K-f16.gguf"), prompt, 60), expected);
    assert_eq!(logits(&whole, &expected.0), logits(&folder, &expected.0));
}

/// `STB_SMOLLM2` names a folder with SmolLM2-135M-Instruct: a GGUF file in Q4_1, and `hf` with the same weights as
/// a Hugging Face folder.
#[test]
fn smollm2_equals_its_folder() {
    let Some(folder) = std::env::var_os("STB_SMOLLM2").map(PathBuf::from) else {
        skip("the comparison of a real GGUF file with its folder needs STB_SMOLLM2");
        return;
    };
    let file = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let open = |path: &Path| Arc::new(Engine::open(path, &OpenOptions::exact()).unwrap());
    let (file, folder) = (open(&file), open(&folder.join("hf")));
    let text = std::fs::read_to_string(root().join("tests/data/stories.txt")).unwrap();
    let ids = file.model.tokenizer().unwrap().encode_prompt(&text).unwrap();
    assert_eq!(ids, folder.model.tokenizer().unwrap().encode_prompt(&text).unwrap());
    note(&format!("{} equal ids of {} bytes of text", ids.len(), text.len()));
    let answer = |engine: &Arc<Engine>, question: &str| {
        let mut session = Session::new(Arc::clone(engine), SessionOptions::default()).unwrap();
        let messages = [Message::new("user", question)];
        let request = GenerateRequest {
            max_tokens: Some(32),
            ..GenerateRequest::new(PromptInput::Messages(&messages))
        };
        let options = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
        let mut sampler = Sampler::new(options);
        let go_on = |_: Piece<'_>| ControlFlow::Continue(());
        let answer = session.generate(&request, &mut sampler, go_on).unwrap();
        (answer.tokens, answer.text)
    };
    for question in ["What is the capital of France?", "Name three colors.", "Was ist 2 + 3?"] {
        let found = answer(&file, question);
        assert_eq!(found, answer(&folder, question));
        note(&format!("{question} {:?}", found.1));
    }
}

#[test]
fn conversions_of_file_and_folder_have_the_same_tensors() {
    let Some(folder) = shared("data/models/stories260k") else {
        skip("the conversion of a GGUF file needs the shared data");
        return;
    };
    let temporary = tempfile::tempdir().unwrap();
    let (a, b) = (temporary.path().join("a.stb"), temporary.path().join("b.stb"));
    let text = root().join("tests/data/stories.txt");
    for (source, target) in [(&folder, &a), (&folder.join("gguf/stories260K-f32.gguf"), &b)] {
        converted(source, target, "int4", &text, 8, 64, None).unwrap();
    }
    let (a, b) = (std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let (a, b) = (File::open(&a).unwrap(), File::open(&b).unwrap());
    assert_eq!(a.tensors().len(), b.tensors().len());
    for (a, b) in a.tensors().iter().zip(b.tensors()) {
        assert_eq!((a.name(), a.encoding()), (b.name(), b.encoding()));
        assert!(a.payload() == b.payload(), "{}", a.name());
    }
}
