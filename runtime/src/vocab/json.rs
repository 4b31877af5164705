//! The `tokenizer.json` of a vocabulary.

use std::borrow::Cow;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::check::Tokens;
use super::merges::{self, Merge};
use super::pre_tokenizer::{self, PreTokenizer};
use super::{TokenKind, Vocabulary, VocabularyKind, charsmap};
use crate::error::{Error, Result};

/// The whole file, in the layout of the `tokenizers` crate.
#[derive(Serialize)]
struct Document<'t> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<AddedToken<'t>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: ModelPart<'t>,
}

/// A token that is recognized before anything else.
#[derive(Serialize)]
struct AddedToken<'t> {
    id: u32,
    content: &'t str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum ModelPart<'t> {
    #[serde(rename = "BPE")]
    Bpe {
        unk_token: Option<&'t str>,
        fuse_unk: bool,
        byte_fallback: bool,
        ignore_merges: bool,
        vocab: Ids<'t>,
        merges: Vec<Merge<'t>>,
    },
    Unigram {
        unk_id: Option<u32>,
        byte_fallback: bool,
        vocab: Vec<(&'t str, f32)>,
    },
}

/// Tokens as an object from text to id.
struct Ids<'t>(&'t [Cow<'t, str>]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(0u32..))
    }
}

/// Writes the file.
///
/// # Errors
/// The errors of [`super::tokenizer_json`] that concern more than single arrays.
pub(super) fn write(vocabulary: &Vocabulary, tokens: &Tokens<'_>) -> Result<String> {
    let (pre, model) = match vocabulary.kind {
        VocabularyKind::ByteLevelBpe | VocabularyKind::CharacterBpe => {
            let name = match vocabulary.kind {
                VocabularyKind::CharacterBpe => "gemma4",
                _ => vocabulary.pre.as_deref().unwrap_or("default"),
            };
            let pre = pre_tokenizer::find(name)?;
            (Some(pre), listed_bpe(vocabulary, tokens, pre)?)
        }
        VocabularyKind::SentencePieceBpe => (None, scored_bpe(vocabulary, tokens)?),
        VocabularyKind::Unigram => (None, unigram(vocabulary, tokens)),
    };
    let byte_level = pre.is_some_and(|pre| !pre.plain);
    let document = Document {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added_tokens(vocabulary, tokens),
        normalizer: if byte_level { Value::Null } else { normalizer(vocabulary, pre.is_none())? },
        pre_tokenizer: pre.map_or(Value::Null, pre_tokenizer),
        post_processor: post_processor(vocabulary, tokens, pre),
        decoder: if byte_level {
            byte_level_step()
        } else {
            decoder(pre.is_none() && vocabulary.add_space_prefix)
        },
        model,
    };
    serde_json::to_string(&document).map_err(|e| Error::Internal { what: e.to_string() })
}

/// BPE with the merges of the file.
fn listed_bpe<'t>(
    vocabulary: &'t Vocabulary,
    tokens: &'t Tokens<'_>,
    pre: &PreTokenizer,
) -> Result<ModelPart<'t>> {
    let mut merges = merges::from_list(&vocabulary.merges, &tokens.ids())?;
    if pre.plain {
        merges.extend(merges::of_line_feeds(&tokens.texts)?);
    }
    Ok(ModelPart::Bpe {
        unk_token: if pre.plain { unknown(vocabulary, tokens) } else { None },
        fuse_unk: pre.plain,
        byte_fallback: pre.plain,
        ignore_merges: pre.ignore_merges,
        vocab: Ids(&tokens.texts),
        merges,
    })
}

/// BPE with merges from the scores. Tokens that are not text take no part.
fn scored_bpe<'t>(vocabulary: &'t Vocabulary, tokens: &'t Tokens<'_>) -> Result<ModelPart<'t>> {
    let is_text = |kind: &TokenKind| {
        matches!(kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused)
    };
    let parts: Vec<usize> =
        tokens.kinds.iter().enumerate().filter(|(_, k)| is_text(k)).map(|(id, _)| id).collect();
    Ok(ModelPart::Bpe {
        unk_token: unknown(vocabulary, tokens),
        fuse_unk: true,
        byte_fallback: tokens.kinds.contains(&TokenKind::Byte),
        ignore_merges: false,
        vocab: Ids(&tokens.texts),
        merges: merges::from_scores(&tokens.texts, &parts, |id| vocabulary.scores[id])?,
    })
}

fn unigram<'t>(vocabulary: &'t Vocabulary, tokens: &'t Tokens<'_>) -> ModelPart<'t> {
    let scores = vocabulary.scores.iter().copied();
    ModelPart::Unigram {
        unk_id: vocabulary.unknown.or_else(|| tokens.first(TokenKind::Unknown)),
        byte_fallback: tokens.kinds.contains(&TokenKind::Byte),
        vocab: tokens.texts.iter().map(AsRef::as_ref).zip(scores).collect(),
    }
}

/// The text of the unknown token.
fn unknown<'t>(vocabulary: &Vocabulary, tokens: &'t Tokens<'_>) -> Option<&'t str> {
    let id = vocabulary.unknown.or_else(|| tokens.first(TokenKind::Unknown))?;
    tokens.texts.get(id as usize).map(AsRef::as_ref)
}

/// The tokens that text is searched for first, as with llama.cpp's `parse_special`.
fn added_tokens<'t>(vocabulary: &Vocabulary, tokens: &'t Tokens<'_>) -> Vec<AddedToken<'t>> {
    // What Phi-3 has from Llama 2 does not drop white space.
    const PLAIN: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];
    let all = (0..).zip(tokens.texts.iter().zip(&tokens.kinds));
    all.filter_map(|(id, (text, kind))| {
        let special = match kind {
            TokenKind::Control | TokenKind::Unknown => true,
            TokenKind::UserDefined => false,
            TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
        };
        Some(AddedToken {
            id,
            content: text,
            single_word: false,
            lstrip: false,
            rstrip: vocabulary.strip_after_special && !PLAIN.contains(&text.as_ref()),
            normalized: false,
            special,
        })
    })
    .collect()
}

/// A step that replaces `pattern` by `content`.
fn replace(pattern: Value, content: &str) -> Value {
    json!({ "type": "Replace", "pattern": pattern, "content": content })
}

/// `▁` for spaces, after what SentencePiece does before: its rules, surplus spaces, the space in front.
fn normalizer(vocabulary: &Vocabulary, sentence_piece: bool) -> Result<Value> {
    let mut steps = Vec::new();
    if sentence_piece {
        if !vocabulary.charsmap.is_empty() {
            charsmap::check(&vocabulary.charsmap)?;
            let rules = base64::encode(&vocabulary.charsmap);
            steps.push(json!({ "type": "Precompiled", "precompiled_charsmap": rules }));
        }
        if vocabulary.remove_extra_whitespaces {
            steps.push(replace(json!({ "Regex": "^ +| +$" }), ""));
            steps.push(replace(json!({ "Regex": " {2,}" }), " "));
        }
        if vocabulary.add_space_prefix {
            steps.push(json!({ "type": "Prepend", "prepend": "▁" }));
        }
    }
    steps.push(replace(json!({ "String": " " }), "▁"));
    Ok(json!({ "type": "Sequence", "normalizers": steps }))
}

fn pre_tokenizer(pre: &PreTokenizer) -> Value {
    let split = |expression: &&str| {
        json!({
            "type": "Split",
            "pattern": { "Regex": expression },
            "behavior": "Isolated",
            "invert": false,
        })
    };
    let mut steps: Vec<Value> = pre.splits.iter().map(split).collect();
    if !pre.plain {
        steps.push(byte_level_step());
    }
    json!({ "type": "Sequence", "pretokenizers": steps })
}

/// Bytes to GPT-2's characters, or back as a decoder.
fn byte_level_step() -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": false,
    })
}

fn decoder(strip: bool) -> Value {
    let mut steps = vec![
        replace(json!({ "String": "▁" }), " "),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if strip {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}

/// Puts the begin token in front, if texts start with one.
fn post_processor(
    vocabulary: &Vocabulary,
    tokens: &Tokens<'_>,
    pre: Option<&PreTokenizer>,
) -> Value {
    let of_scores = vocabulary.kind == VocabularyKind::SentencePieceBpe;
    let usual = of_scores || pre.is_some_and(|pre| pre.add_bos);
    let bos = vocabulary.bos.or(of_scores.then_some(1));
    let text = bos.and_then(|bos| tokens.texts.get(bos as usize));
    let (Some(bos), Some(text), true) = (bos, text, vocabulary.add_bos.unwrap_or(usual)) else {
        return Value::Null;
    };
    let part = |id: &str, sequence: u32| {
        [
            json!({ "SpecialToken": { "id": text, "type_id": sequence } }),
            json!({ "Sequence": { "id": id, "type_id": sequence } }),
        ]
    };
    json!({
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": ([part("A", 0), part("B", 1)].concat()),
        "special_tokens": { (text.as_ref()): { "id": text, "ids": [bos], "tokens": [text] } },
    })
}
