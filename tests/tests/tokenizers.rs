//! Tokenizers that are built from other files give the ids of the model's own `tokenizer.json`, on text
//! and on odd strings. Skipped where the third-party tokenizers are absent.

use std::path::Path;

use serde_json::{Value, json};
use stb_runtime::{Checkpoint, Tokenizer, from_folder};
use stb_tests::paths::shared;
use stb_tests::programs::skip;

/// Strings that break tokenizers, without special tokens.
const ODD: [&str; 24] = [
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    "a  b   c    d                                 e",
    "\n",
    "\n\n\n a\r\n\t\tb\n \n",
    "0 12 345 6789 123456789012345",
    "I'm you're WE'LL they'd 'tis o'clock 'S",
    "hello🙂world 👨‍👩‍👧‍👦 🇩🇪 🚀🚀",
    "中文字符，日本語のテキスト。한국어",
    "Здравствуйте, мир! Γειά σου",
    "naïve café e\u{301} ÉCOLE Straße",
    "مرحبا بالعالم שלום नमस्ते",
    "\u{0}\u{1}\u{7f}\u{85}\u{a0}\u{200b}\u{feff}\u{fffd}",
    "\u{2581}a \u{2581}\u{2581}b",
    "<0x0A> <0xE4>",
    "fn main() { println!(\"{}\", a[i] >= b && c != d); }",
    "==================== ---------- ........ ______",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.com/a_b?c=d&e=%20f#g",
    "𝕳𝖊𝖑𝖑𝖔 ﬁ ½ ² Ⅷ ①",
    "\t\t\t\t\u{3000}\u{2003}x",
];

/// Compares `built` with `own` on the odd strings, on the special tokens between words, and on the
/// lines of WikiText-2.
fn compare(name: &str, built: &str, own: &str, special: &[&str]) {
    let load = |json: &str| Tokenizer::new(json, None, Vec::new(), 1 << 20).unwrap();
    let (built, own) = (load(built), load(own));
    let mut texts: Vec<String> = ODD.iter().map(|text| (*text).to_owned()).collect();
    for token in special {
        texts.push(format!("{token}a {token} b{token}{token}\n{token}"));
    }
    match shared("data/text/wikitext-2/wiki.test.raw") {
        Some(path) => {
            let text = std::fs::read_to_string(path).unwrap();
            texts.extend(text.split_inclusive('\n').map(str::to_owned));
            texts.push(text.chars().take(100_000).collect());
        }
        None => skip("WikiText-2 is not here"),
    }
    for text in texts {
        let (ids, expected) = (built.encode(&text).unwrap(), own.encode(&text).unwrap());
        assert_eq!(ids, expected, "{name}: {text:?}");
        assert_eq!(built.decode(&ids).unwrap(), own.decode(&ids).unwrap(), "{name}: {text:?}");
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A folder with these files of a third-party tokenizer, without its `tokenizer.json`.
fn folder_with(source: &Path, names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn llama_2_from_its_sentence_piece_model() {
    let Some(source) = shared("data/tokenizers/llama2") else { return skip("Llama 2 is not here") };
    let folder = folder_with(&source, &["tokenizer.model"]);
    let built = from_folder(folder.path(), None).unwrap().unwrap();
    let own = read(&source.join("tokenizer.json"));
    compare("llama2", &built, &own, &["<s>", "</s>", "<unk>"]);
    // Not only the ids of some texts: the same merges in the same order.
    let merges = |json: &str| {
        let file: Value = serde_json::from_str(json).unwrap();
        let pair = |merge: &Value| match merge {
            Value::String(both) => both.split(' ').map(str::to_owned).collect(),
            pair => serde_json::from_value::<Vec<String>>(pair.clone()).unwrap(),
        };
        let mut merges: Vec<_> =
            file["model"]["merges"].as_array().unwrap().iter().map(pair).collect();
        merges.sort();
        merges
    };
    assert_eq!(merges(&built), merges(&own));
}

#[test]
fn stories_from_a_model_with_512_pieces() {
    let (Some(source), Some(own)) =
        (shared("data/tokenizers/tok512"), shared("data/models/stories260k/tokenizer.json"))
    else {
        return skip("the tokenizer of stories260k is not here");
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("tok512.model"), folder.path().join("tokenizer.model")).unwrap();
    let built = from_folder(folder.path(), None).unwrap().unwrap();
    let own = Tokenizer::new(&read(&own), None, Vec::new(), 512).unwrap();
    let built = Tokenizer::new(&built, None, Vec::new(), 512).unwrap();
    // This model removes surplus spaces; its tokenizer.json, which is not by its author, does not.
    for text in ODD {
        let clean = text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        assert_eq!(built.encode(text).unwrap(), own.encode(&clean).unwrap(), "{text:?}");
    }
}

#[test]
fn llama_3_from_its_ranks() {
    let Some(source) = shared("data/tokenizers/llama3") else { return skip("Llama 3 is not here") };
    let own = read(&source.join("tokenizer.json"));
    let file: Value = serde_json::from_str(&own).unwrap();
    // A tokenizer_config.json has the special tokens by id.
    let added = file["added_tokens"].as_array().unwrap().iter();
    let added: serde_json::Map<String, Value> =
        added.map(|token| (token["id"].to_string(), token.clone())).collect();
    let config = json!({ "added_tokens_decoder": added, "bos_token": "<|begin_of_text|>" });
    let folder = folder_with(&source, &["tokenizer.model"]);
    let built = from_folder(folder.path(), Some(&config.to_string())).unwrap().unwrap();
    compare("llama3", &built, &own, &["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]);
    // Without them the ranks are half a tokenizer.
    let error = from_folder(folder.path(), None).unwrap_err();
    assert!(error.to_string().contains("added_tokens_decoder"), "{error}");
}

#[test]
fn opt_from_vocab_json_and_merges() {
    let Some(source) = shared("data/tokenizers/opt") else { return skip("OPT is not here") };
    let folder = folder_with(&source, &["vocab.json", "merges.txt"]);
    let config = json!({
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": { "content": "</s>" },
        "pad_token": "<pad>",
        "unk_token": "</s>",
    });
    let built = from_folder(folder.path(), Some(&config.to_string())).unwrap().unwrap();
    compare("opt", &built, &read(&source.join("tokenizer.json")), &["</s>", "<pad>"]);
}

#[test]
fn gpt_2_from_vocab_json_and_merges() {
    let Some(source) = shared("data/tokenizers/gpt2") else { return skip("GPT-2 is not here") };
    let folder = folder_with(&source, &["vocab.json", "merges.txt"]);
    std::fs::write(folder.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    let built = from_folder(folder.path(), None).unwrap().unwrap();
    let tokenizer = Tokenizer::new(&built, None, Vec::new(), 50257).unwrap();
    // Ids that OpenAI's and other implementations give.
    for (text, ids) in [
        ("Hello world", &[15496, 995][..]),
        ("Hello, y'all!", &[15496, 11, 331, 6, 439, 0]),
        (" 12345\n\n", &[17031, 2231, 628]),
        ("<|endoftext|>Hi", &[50256, 17250]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    }
}

/// The same tokenizer as part of a checkpoint whose folder has no `tokenizer.json`.
#[test]
fn a_checkpoint_with_a_sentence_piece_model() {
    let (Some(model), Some(tokenizer)) =
        (shared("data/models/stories260k"), shared("data/tokenizers/tok512/tok512.model"))
    else {
        return skip("stories260k is not here");
    };
    let folder = folder_with(&model, &["config.json", "model.safetensors"]);
    std::fs::copy(tokenizer, folder.path().join("tokenizer.model")).unwrap();
    let checkpoint = Checkpoint::open(folder.path(), false).unwrap();
    assert_eq!(checkpoint.begin_token().unwrap(), (Some(1), true));
    let built = Tokenizer::new(&checkpoint.tokenizer.unwrap(), None, Vec::new(), 512).unwrap();
    let own = read(&model.join("tokenizer.json"));
    let own = Tokenizer::new(&own, None, Vec::new(), 512).unwrap();
    let text = "Once upon a time, there was a little girl.";
    assert_eq!(built.encode(text).unwrap(), own.encode(text).unwrap());
}
