//! The tokenizer of a Hugging Face folder that has no `tokenizer.json`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use super::{TokenKind, Vocabulary, VocabularyKind, sentencepiece, tiktoken, tokenizer_json};
use crate::error::{Error, Result};

/// The text of a `tokenizer.json` for `folder`, from its `tokenizer.model` (SentencePiece, or the ranks
/// of Llama 3), else from its `vocab.json` and `merges.txt` (GPT-2); `None` if it has none of these.
/// `tokenizer_config` is the text of `tokenizer_config.json`. It names the special tokens, as do
/// `special_tokens_map.json` and `added_tokens.json`.
///
/// # Errors
/// [`Error::Io`] for unreadable files, and the errors of [`tokenizer_json`].
pub fn from_folder(folder: &Path, tokenizer_config: Option<&str>) -> Result<Option<String>> {
    let config = parse_json(tokenizer_config.unwrap_or("{}"), "tokenizer_config.json")?;
    let mut is_incomplete = false;
    let mut vocabulary = if let Some(model) = read(&folder.join("tokenizer.model"))? {
        if model.first() == Some(&sentencepiece::FIRST_BYTE) {
            sentencepiece::parse(&model)?
        } else {
            is_incomplete = true;
            tiktoken::parse(&model)?
        }
    } else if let Some(vocabulary) = gpt2(folder, &config)? {
        vocabulary
    } else {
        return Ok(None);
    };
    let special = SpecialTokens::read(folder, &config)?;
    if is_incomplete && special.added.is_empty() {
        return Err(Error::invalid(format!(
            "{}: tokenizer.model has ranks, but no special tokens; put a tokenizer_config.json with \
             added_tokens_decoder, or the model's tokenizer.json, beside it",
            folder.display()
        )));
    }
    special.apply(&mut vocabulary)?;
    if let Some(add) = config.get("add_bos_token").and_then(Value::as_bool) {
        vocabulary.add_bos = Some(add);
    }
    tokenizer_json(&vocabulary).map(Some)
}

/// The content of a file; `None` if it does not exist.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn parse_json(text: &str, name: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::invalid(format!("{name}: {e}")))
}

/// A JSON file of the folder; `null` if it does not exist.
fn read_json(folder: &Path, name: &str) -> Result<Value> {
    match read(&folder.join(name))? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::invalid(format!("{}: {e}", folder.join(name).display()))),
        None => Ok(Value::Null),
    }
}

/// Classes of `transformers` that split text as GPT-2 does.
const GPT2_CLASSES: [&str; 4] =
    ["GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"];
/// Models with these classes, for folders that name none.
const GPT2_MODELS: [&str; 6] = ["gpt2", "opt", "gpt_neo", "gptj", "codegen", "phi"];

/// `vocab.json` and `merges.txt`.
fn gpt2(folder: &Path, config: &Value) -> Result<Option<Vocabulary>> {
    let (Some(ids), Some(merges)) =
        (read(&folder.join("vocab.json"))?, read(&folder.join("merges.txt"))?)
    else {
        return Ok(None);
    };
    let class = config.get("tokenizer_class").and_then(Value::as_str);
    let is_gpt2 = match class {
        Some(class) => GPT2_CLASSES.contains(&class),
        None => {
            let model = read_json(folder, "config.json")?;
            let kind = model.get("model_type").and_then(Value::as_str);
            kind.is_some_and(|kind| GPT2_MODELS.contains(&kind))
        }
    };
    if !is_gpt2 || config.get("add_prefix_space") == Some(&Value::Bool(true)) {
        return Err(Error::unsupported(format!(
            "{}: vocab.json and merges.txt do not say how this model splits text into words, which is \
             only known of GPT-2; put the model's tokenizer.json beside them",
            folder.display()
        )));
    }
    let wrong = |what: String| Error::invalid(format!("{}: {what}", folder.display()));
    let ids: HashMap<String, usize> =
        serde_json::from_slice(&ids).map_err(|e| wrong(format!("vocab.json: {e}")))?;
    let mut tokens = vec![String::new(); ids.len()];
    for (text, id) in ids {
        let slot = tokens.get_mut(id).filter(|slot| slot.is_empty());
        *slot.ok_or_else(|| wrong(format!("vocab.json: {id} is not an id of its own")))? = text;
    }
    let merges = String::from_utf8(merges).map_err(|_| wrong("merges.txt is not UTF-8".into()))?;
    let merges = merges.lines().enumerate();
    let merges = merges.filter(|(i, line)| !(line.is_empty() || *i == 0 && line.starts_with("#v")));
    Ok(Some(Vocabulary {
        pre: Some("gpt-2".into()),
        tokens,
        merges: merges.map(|(_, line)| line.to_owned()).collect(),
        ..Vocabulary::default()
    }))
}

/// What the files beside a vocabulary say of single tokens.
struct SpecialTokens {
    /// Tokens by id, and whether they are special.
    added: BTreeMap<usize, (String, bool)>,
    /// Texts of special tokens.
    named: HashSet<String>,
    /// The text of the begin token.
    bos: Option<String>,
}

impl SpecialTokens {
    fn read(folder: &Path, config: &Value) -> Result<Self> {
        let mut added = BTreeMap::new();
        let wrong = |id: &dyn std::fmt::Display| {
            Error::invalid(format!("{}: added token {id} is broken", folder.display()))
        };
        for (text, id) in read_json(folder, "added_tokens.json")?.as_object().into_iter().flatten()
        {
            let id = id.as_u64().ok_or_else(|| wrong(text))?;
            added.insert(id as usize, (text.clone(), false));
        }
        let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            let (number, text) = id.parse().ok().zip(text_of(token)).ok_or_else(|| wrong(id))?;
            let is_special = token.get("special") == Some(&Value::Bool(true));
            added.insert(number, (text.to_owned(), is_special));
        }
        let map = read_json(folder, "special_tokens_map.json")?;
        let mut named = HashSet::new();
        for values in [config, &map] {
            for key in
                ["bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens"]
            {
                let value = values.get(key).unwrap_or(&Value::Null);
                let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                named.extend(list.iter().filter_map(text_of).map(str::to_owned));
            }
        }
        let bos = [config, &map].into_iter().find_map(|v| text_of(v.get("bos_token")?));
        Ok(Self { added, named, bos: bos.map(str::to_owned) })
    }

    /// Adds the tokens to `vocabulary` and marks those that are special.
    fn apply(self, vocabulary: &mut Vocabulary) -> Result<()> {
        let base = vocabulary.tokens.len();
        vocabulary.token_kinds.resize(base, TokenKind::Normal);
        for (id, (text, is_special)) in self.added {
            let count = vocabulary.tokens.len();
            let is_special = is_special || self.named.contains(&text);
            let (kind, text) = match vocabulary.kind {
                _ if is_special => (TokenKind::Control, text),
                VocabularyKind::ByteLevelBpe => (TokenKind::UserDefined, text),
                // As in `sentencepiece`: these are searched for before spaces are replaced.
                _ => (TokenKind::UserDefined, text.replace('▁', " ")),
            };
            if id > count {
                return Err(Error::invalid(format!(
                    "added token {text:?} has id {id}, but the vocabulary has {count} tokens"
                )));
            }
            if id == count {
                vocabulary.tokens.push(text);
                vocabulary.token_kinds.push(kind);
                if !vocabulary.scores.is_empty() {
                    vocabulary.scores.push(0.0);
                }
            } else {
                vocabulary.tokens[id] = text;
                if vocabulary.token_kinds[id] != TokenKind::Unknown {
                    vocabulary.token_kinds[id] = kind;
                }
            }
        }
        for (text, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.token_kinds) {
            if *kind == TokenKind::Normal && self.named.contains(text) {
                *kind = TokenKind::Control;
            }
        }
        if let Some(bos) = self.bos {
            let id = vocabulary.tokens.iter().position(|text| *text == bos);
            vocabulary.bos = id.and_then(|id| u32::try_from(id).ok()).or(vocabulary.bos);
        }
        Ok(())
    }
}

/// The text of a token that is written as text or as an object with its properties.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}
