//! Hand-made vocabularies of every kind, and hostile ones.

use proptest::prelude::*;

use super::*;
use crate::tokenizer::Tokenizer;

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn load(vocabulary: &Vocabulary) -> Tokenizer {
    let json = tokenizer_json(vocabulary).unwrap();
    Tokenizer::new(&json, None, Vec::new(), vocabulary.tokens.len()).unwrap()
}

fn ids(vocabulary: &Vocabulary, text: &str) -> Vec<u32> {
    load(vocabulary).encode(text).unwrap()
}

fn refused(vocabulary: &Vocabulary) -> String {
    tokenizer_json(vocabulary).unwrap_err().to_string()
}

/// Tokens 0 to 4; `ab` by the first merge, `abc` by the second.
fn byte_level() -> Vocabulary {
    Vocabulary {
        pre: Some("gpt-2".into()),
        tokens: strings(&["a", "b", "c", "Ġ", "ab", "abc", "<|x|>", "Ã", "©", "[u]"]),
        merges: strings(&["a b", "ab c"]),
        token_kinds: [1, 1, 1, 1, 1, 1, 3, 1, 1, 4].map(TokenKind::from_number).to_vec(),
        ..Vocabulary::default()
    }
}

/// `▁ab` and `bc`; the score prefers `bc`.
fn sentence_piece() -> Vocabulary {
    let pieces: [(&str, f32, i64); 13] = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<0xC3>", 0.0, 6),
        ("<0xA9>", 0.0, 6),
        ("▁", -9.0, 1),
        ("a", -9.0, 1),
        ("b", -9.0, 1),
        ("c", -9.0, 1),
        ("bc", -1.0, 1),
        ("▁a", -2.0, 1),
        ("▁abc", -3.0, 1),
        ("ab", -4.0, 1),
    ];
    Vocabulary {
        kind: VocabularyKind::SentencePieceBpe,
        tokens: pieces.iter().map(|p| p.0.to_owned()).collect(),
        scores: pieces.iter().map(|p| p.1).collect(),
        token_kinds: pieces.iter().map(|p| TokenKind::from_number(p.2)).collect(),
        add_space_prefix: true,
        ..Vocabulary::default()
    }
}

#[test]
fn byte_level_bpe_follows_its_list_of_merges() {
    let vocabulary = byte_level();
    assert_eq!(ids(&vocabulary, "abc ab"), [5, 3, 4]);
    assert_eq!(ids(&vocabulary, "bcab"), [1, 2, 4]);
    assert_eq!(ids(&vocabulary, "é"), [7, 8]);
    // Special and user-defined tokens interrupt the text; only special ones vanish from output.
    assert_eq!(ids(&vocabulary, "a<|x|>b[u]c"), [0, 6, 1, 9, 2]);
    let tokenizer = load(&vocabulary);
    assert_eq!(tokenizer.decode(&[0, 6, 1, 9, 3, 7, 8]).unwrap(), "ab[u] é");
    assert!(tokenizer.is_special(6) && !tokenizer.is_special(9));
}

#[test]
fn some_pre_tokenizers_keep_words_that_are_tokens() {
    let without_merge = Vocabulary {
        merges: strings(&["b c"]),
        tokens: strings(&["a", "b", "c", "bc", "abc"]),
        ..Vocabulary::default()
    };
    let with = |pre: &str| Vocabulary { pre: Some(pre.into()), ..without_merge.clone() };
    assert_eq!(ids(&with("gpt-2"), "abc"), [0, 3]);
    assert_eq!(ids(&with("llama-bpe"), "abc"), [4]);
}

#[test]
fn the_score_of_the_result_orders_merges() {
    let vocabulary = sentence_piece();
    // `bc` first, then `▁a`, then both.
    assert_eq!(ids(&vocabulary, "abc"), [11]);
    assert_eq!(ids(&vocabulary, "ab"), [10, 7]);
    assert_eq!(ids(&vocabulary, "a abc"), [10, 11]);
    // Bytes where all of them exist, else the unknown token, once for several characters.
    assert_eq!(ids(&vocabulary, "é"), [5, 3, 4]);
    assert_eq!(ids(&vocabulary, "zyx"), [5, 0]);
    // A space comes after a special token, too.
    assert_eq!(ids(&vocabulary, "a</s>a"), [10, 2, 10]);
    let tokenizer = load(&vocabulary);
    assert_eq!(tokenizer.decode(&[1, 10, 7, 11, 3, 4]).unwrap(), "ab abcé");

    let bare = Vocabulary { add_space_prefix: false, ..vocabulary.clone() };
    assert_eq!(ids(&bare, "abc"), [6, 9]);
    assert_eq!(load(&bare).decode(&[11]).unwrap(), " abc");
    let squeezed = Vocabulary { remove_extra_whitespaces: true, ..vocabulary };
    assert_eq!(ids(&squeezed, "  a   a  "), [10, 10]);
}

#[test]
fn unigram_takes_the_most_probable_tokens() {
    let mut vocabulary = sentence_piece();
    vocabulary.kind = VocabularyKind::Unigram;
    // -2 and -1 together beat nothing; `▁abc` alone is -3, too, and `▁` `ab` `c` far less.
    vocabulary.scores[11] = -2.5;
    assert_eq!(ids(&vocabulary, "abc"), [11]);
    vocabulary.scores[11] = -3.5;
    assert_eq!(ids(&vocabulary, "abc"), [10, 9]);
}

#[test]
fn plain_bpe_takes_runs_of_line_feeds_whole() {
    let vocabulary = Vocabulary {
        kind: VocabularyKind::CharacterBpe,
        tokens: strings(&["<unk>", "a", "▁", "▁a", "\n", "\n\n", "\n\n\n", "\n\n\n\n"]),
        merges: strings(&["▁ a"]),
        ..Vocabulary::default()
    };
    assert_eq!(ids(&vocabulary, "a a\n\n\na\n\n\n\na\na"), [1, 3, 6, 1, 7, 1, 4, 1]);
}

#[test]
fn the_begin_token_is_the_usual_one_or_as_told() {
    let begins = |vocabulary: &Vocabulary| {
        let json = tokenizer_json(vocabulary).unwrap();
        crate::tokenizer::own_begin_token(&json).unwrap()
    };
    assert_eq!(begins(&sentence_piece()), Some(1));
    assert_eq!(begins(&Vocabulary { add_bos: Some(false), ..sentence_piece() }), None);
    assert_eq!(begins(&Vocabulary { bos: Some(2), ..sentence_piece() }), Some(2));
    assert_eq!(begins(&byte_level()), None);
    assert_eq!(begins(&Vocabulary { bos: Some(6), ..byte_level() }), None);
    let llama = Vocabulary { bos: Some(6), pre: Some("llama-bpe".into()), ..byte_level() };
    assert_eq!(begins(&llama), Some(6));
}

#[test]
fn white_space_after_special_tokens_is_dropped_where_the_model_needs_it() {
    let vocabulary = Vocabulary { strip_after_special: true, ..byte_level() };
    assert_eq!(ids(&vocabulary, "a<|x|>\n b"), [0, 6, 1]);
}

#[test]
fn every_pre_tokenizer_loads() {
    let names = refused(&Vocabulary { pre: Some("nonsense".into()), ..byte_level() });
    let names = names.split_once("knows ").unwrap().1.split(';').next().unwrap();
    assert!(names.split(", ").count() > 60, "{names}");
    for name in names.split(", ") {
        let vocabulary = Vocabulary { pre: Some(name.into()), ..byte_level() };
        let text = "abc, 1234567 'S École\r\n\n  中文 ab";
        assert!(!ids(&vocabulary, text).is_empty(), "{name}");
    }
}

#[test]
fn contradictions_are_named() {
    let of = |change: &dyn Fn(&mut Vocabulary)| {
        let mut vocabulary = sentence_piece();
        change(&mut vocabulary);
        refused(&vocabulary)
    };
    type Change<'a> = &'a dyn Fn(&mut Vocabulary);
    let cases: [(Change, &str); 6] = [
        (&|v| v.tokens.clear(), "0 tokens"),
        (&|v| v.scores.truncate(3), "3 scores"),
        (&|v| v.token_kinds.truncate(3), "3 token types"),
        (&|v| v.scores[4] = f32::NAN, "token 4"),
        (&|v| v.tokens[6] = "b".into(), "tokens 6 and 7"),
        (&|v| v.bos = Some(99), "begin token is 99"),
    ];
    for (change, word) in cases {
        let error = of(change);
        assert!(error.contains(word), "{error}");
    }
    let long = of(&|v| v.tokens[6] = "x".repeat(3000));
    assert!(long.contains("3000 bytes"), "{long}");
    for merge in ["ab", "a z", "z a", "b a"] {
        let error = refused(&Vocabulary { merges: strings(&[merge]), ..byte_level() });
        assert!(error.contains("merge 0"), "{error}");
    }
    assert!(VocabularyKind::from_gguf("rwkv").unwrap_err().to_string().contains("rwkv"));
}

fn any_vocabulary() -> impl Strategy<Value = Vocabulary> {
    let kind = prop_oneof![
        Just(VocabularyKind::ByteLevelBpe),
        Just(VocabularyKind::CharacterBpe),
        Just(VocabularyKind::SentencePieceBpe),
        Just(VocabularyKind::Unigram),
    ];
    let pre =
        prop_oneof![Just(None), Just(Some("llama-bpe".to_owned())), "[a-z]{0,3}".prop_map(Some)];
    let tokens = prop::collection::hash_set("[ab▁ \n<é]{0,3}", 0..20);
    let id = prop::option::of(0u32..24);
    (
        kind,
        pre,
        tokens,
        prop::collection::vec(-5f32..5.0, 20),
        prop::collection::vec(0i64..8, 20),
        id.clone(),
        id,
        any::<[bool; 6]>(),
    )
        .prop_map(|(kind, pre, tokens, scores, kinds, unknown, bos, [a, b, c, d, e, f])| {
            let tokens: Vec<String> = tokens.into_iter().collect();
            let count = tokens.len();
            let merges = tokens.iter().flat_map(|x| tokens.iter().map(move |y| (x, y)));
            let known = |(x, y): &(&String, &String)| tokens.contains(&format!("{x}{y}"));
            Vocabulary {
                kind,
                pre,
                merges: merges.filter(|m| f || known(m)).map(|(x, y)| format!("{x} {y}")).collect(),
                scores: scores.into_iter().take(count + usize::from(e && f)).collect(),
                token_kinds: kinds.into_iter().take(count).map(TokenKind::from_number).collect(),
                tokens,
                add_space_prefix: a,
                remove_extra_whitespaces: b,
                charsmap: Vec::new(),
                strip_after_special: c,
                unknown,
                bos,
                add_bos: d.then_some(e),
            }
        })
}

proptest! {
    #[test]
    fn any_vocabulary_is_refused_or_works(vocabulary in any_vocabulary(), text in "[ab▁ \n<éz]{0,20}") {
        if let Ok(json) = tokenizer_json(&vocabulary) {
            let tokenizer = Tokenizer::new(&json, None, Vec::new(), vocabulary.tokens.len()).unwrap();
            // The tokenizer may lack an unknown token.
            if let Ok(ids) = tokenizer.encode(&text) {
                prop_assert!(ids.iter().all(|id| (*id as usize) < vocabulary.tokens.len()));
                tokenizer.decode(&ids).unwrap();
            }
        }
    }
}

/// The pieces, between bars, into which each pre-tokenizer splits [`PIECES_OF`]: those of the Python
/// package `tokenizers`, which has another engine, and of llama.cpp. The latter does not join accents
/// with letters for `tekken`, `gpt-4o` and `kimi-k2`.
const PIECES: [(&str, &str); 30] = [
    (
        "default",
        "I|'|LL| été|234|5| E|\u{301}|ÉCOLEx|\r\n\n | 中文カナa|9|/|\n \n|(|x|.|y|)…| |123|456|7",
    ),
    (
        "gpt-2",
        "I|'|LL| été|2345| E|\u{301}|ÉCOLEx|\r\n\n | 中文カナa|9|/|\n |\n|(|x|.|y|)…| 1234567",
    ),
    (
        "starcoder",
        "I|'|LL| été|2|3|4|5| E|\u{301}|ÉCOLEx|\r\n\n | 中文カナa|9|/|\n |\n|(|x|.|y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "falcon",
        "I|'|LL| été|234|5| E|\u{301}|ÉCOLEx|\r\n\n | 中文カナa|9|/|\n \n|(|x|.|y|)…| |123|456|7",
    ),
    (
        "llama-bpe",
        "I|'LL| été|234|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "glm4",
        "I|'LL| été|234|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "chatglm-bpe",
        "I|'LL| été|234|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "minicpm5",
        "I|'LL| été|234|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "jais-2",
        "I|'LL| été|234|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "qwen2",
        "I|'LL| été|2|3|4|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "qwen35",
        "I|'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "laguna",
        "I|'LL| été|2|3|4|5| E|\u{301}ÉCOLEx|\r|\n\n| | 中文カナa|9|/|\n| |\n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "ufakzeka",
        "I|'LL| été|2|3|4|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "bailingmoe",
        "I|'LL| été|2|3|4|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "seed-coder",
        "I|'LL| été|2|3|4|5| E|\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/|\n \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "exaone-moe",
        "I|'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "tekken",
        "I|'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "gpt-4o",
        "I'LL| été|234|5| E\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "tiny_aya",
        "I'LL| été|2|345| E\u{301}ÉCOLEx|\r\n\n| | 中文カナa|9|/\n| \n|(x|.y|)…| |1|234|567",
    ),
    (
        "kimi-k2",
        "I'LL| été|234|5| E\u{301}ÉCOLEx|\r\n\n| | |中文|カナa|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "deepseek-llm",
        "I|'|LL| é|t|é|2345| E|\u{301}|É|COLEx|\r|\n|\n|  |中文カナ|a|9|/|\n| |\n|(|x|.|y|)|…| |1234567",
    ),
    (
        "deepseek-coder",
        "I|'|LL| été|2|3|4|5| E|\u{301}|ÉCOLEx|\r|\n|\n| | |中文カナ|a|9|/|\n| |\n|(|x|.|y|)|…| |1|2|3|4|5|6|7",
    ),
    (
        "deepseek-v3",
        "I|'LL| été|234|5| E\u{301}ÉCOLEx|\r\n\n|  |中文カナ|a|9|/\n| \n|(x|.y|)…| |123|456|7",
    ),
    (
        "spark2_5",
        "I|'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r|\n|\n|  |中文カナ|a|9|/|\n| |\n|(x|.y|)…| |1|2|3|4|5|6|7",
    ),
    (
        "afmoe",
        "I|'LL| été|2|345| E\u{301}ÉCOLEx|\r\n\n|  |中文カナ|a|9|/\n| \n|(x|.y|)…| |1|234|567",
    ),
    (
        "youtu",
        "I'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r\n\n|  |中文カナ|a|9|/\n| \n|(x|.y|)|…| |1|2|3|4|5|6|7",
    ),
    ("superbpe", "I'LL été|2|345| E\u{301}ÉCOLEx\r\n\n  中文カナa|9|/\n \n(x.y)… |1|234|567"),
    ("bloom", "I'LL| été2345| E\u{301}ÉCOLEx|\r\n\n | 中文カナa9/|\n \n(|x|.|y|)…| 1234567"),
    (
        "viking",
        "I'LL| été|2|3|4|5| E\u{301}ÉCOLEx|\r\n\n | 中文カナa|9|/|\n \n(|x|.|y|)…| |1|2|3|4|5|6|7",
    ),
    ("gemma4", "I'LL été2345 E\u{301}ÉCOLEx\r|\n\n|  中文カナa9/|\n| |\n|(x.y)… 1234567"),
];

const PIECES_OF: &str = "I'LL été2345 E\u{301}ÉCOLEx\r\n\n  中文カナa9/\n \n(x.y)… 1234567";

#[test]
fn pre_tokenizers_split_text_into_words() {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};
    for (name, pieces) in PIECES {
        let vocabulary = Vocabulary { pre: Some(name.into()), ..byte_level() };
        let mut file: serde_json::Value =
            serde_json::from_str(&tokenizer_json(&vocabulary).unwrap()).unwrap();
        // Without the last step, which writes bytes as characters.
        let steps = file["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap();
        steps.retain(|step| step["type"] == "Split");
        let tokenizer = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
        let mut text = PreTokenizedString::from(PIECES_OF);
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut text).unwrap();
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let found: Vec<&str> = splits.iter().map(|(piece, _, _)| *piece).collect();
        assert_eq!(found.join("|"), pieces, "{name}");
    }
}
