//! GGUF files: every type decodes to the bits of llama.cpp, and hostile files are errors.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use stb_format::gguf::{Gguf, GgufError, GgufProblem, GgufType, GgufValue};

/// Blocks of every type with their values, written by `data/make_types.py`.
const TYPES: &[u8] = include_bytes!("data/types.gguf");

#[test]
fn every_type_has_the_values_of_llama_cpp() {
    let file = Gguf::parse(TYPES).unwrap();
    let tensor = |name: &str| file.tensors().iter().find(|t| t.name() == name).unwrap();
    for kind in GgufType::ALL {
        let stored = tensor(kind.name());
        assert_eq!((stored.type_id(), stored.shape()), (kind.id(), &[3, 256][..]), "{kind}");
        let (found, bytes) = stored.payload().unwrap();
        assert_eq!(found, *kind);
        assert_eq!(kind.byte_len(3 * 256), Some(bytes.len() as u64));
        let mut values = vec![f32::NAN; 3 * 256];
        kind.decode(bytes, &mut values);
        let (_, expected) = tensor(&format!("{kind}.f32")).payload().unwrap();
        for (i, (value, bytes)) in values.iter().zip(expected.as_chunks::<4>().0).enumerate() {
            let expected = f32::from_le_bytes(*bytes);
            assert_eq!(value.to_bits(), expected.to_bits(), "{kind} {i}: {value} {expected}");
        }
    }
    assert_eq!(file.tensors().len(), 2 * GgufType::ALL.len());
}

/// Writes files.
#[derive(Default)]
struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    fn new(version: u32, tensors: u64, entries: u64) -> Self {
        Self { bytes: b"GGUF".to_vec() }.u32(version).u64(tensors).u64(entries)
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn u32(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    /// A metadata entry.
    fn entry(self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.text(key).u32(kind).raw(value)
    }

    /// A tensor entry; `dims` in the order of the file.
    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let with_name = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(with_name, |b, d| b.u64(*d)).u32(kind).u64(offset)
    }

    /// The file with `data` bytes of data.
    fn data(mut self, data: usize) -> Vec<u8> {
        let start = self.bytes.len().next_multiple_of(32);
        self.bytes.resize(start + data, 1);
        self.bytes
    }
}

/// A file with every kind of value and two tensors.
fn sample(version: u32) -> Vec<u8> {
    let text_list = Builder::default().u32(8).u64(2).text("a").text("bc").bytes;
    let lists = Builder::default().u32(9).u64(1).u32(0).u64(3).raw(&[7, 8, 9]).bytes;
    Builder::new(version, 2, 14)
        .entry("u8", 0, &[200])
        .entry("i8", 1, &(-3i8).to_le_bytes())
        .entry("u16", 2, &50_000u16.to_le_bytes())
        .entry("i16", 3, &(-300i16).to_le_bytes())
        .entry("u32", 4, &4_000_000_000u32.to_le_bytes())
        .entry("i32", 5, &(-70_000i32).to_le_bytes())
        .entry("f32", 6, &0.5f32.to_le_bytes())
        .entry("bool", 7, &[1])
        .entry("text", 8, &Builder::default().text("grüße").bytes)
        .entry("texts", 9, &text_list)
        .entry("lists", 9, &lists)
        .entry("u64", 10, &u64::MAX.to_le_bytes())
        .entry("i64", 11, &i64::MIN.to_le_bytes())
        .entry("f64", 12, &0.25f64.to_le_bytes())
        .tensor("quantized", &[32, 2], 8, 0)
        .tensor("vector", &[3], 0, 96)
        .data(96 + 12)
}

#[test]
fn values_and_tensors_are_read() {
    for version in [2, 3] {
        let bytes = sample(version);
        let file = Gguf::parse(&bytes).unwrap();
        assert_eq!((file.version(), file.metadata().len()), (version, 14));
        for (key, value) in [
            ("u8", GgufValue::Unsigned(200)),
            ("i8", GgufValue::Signed(-3)),
            ("u16", GgufValue::Unsigned(50_000)),
            ("i16", GgufValue::Signed(-300)),
            ("u32", GgufValue::Unsigned(4_000_000_000)),
            ("i32", GgufValue::Signed(-70_000)),
            ("f32", GgufValue::F32(0.5)),
            ("bool", GgufValue::Bool(true)),
            ("text", GgufValue::Text("grüße")),
            ("u64", GgufValue::Unsigned(u64::MAX)),
            ("i64", GgufValue::Signed(i64::MIN)),
            ("f64", GgufValue::F64(0.25)),
        ] {
            assert_eq!(file.get(key), Some(value), "{key}");
        }
        let texts = file.get("texts").unwrap().as_array().unwrap();
        let texts: Vec<_> = texts.iter().map(|value| value.as_text().unwrap()).collect();
        assert_eq!(texts, ["a", "bc"]);
        let lists = file.get("lists").unwrap().as_array().unwrap();
        let inner = lists.iter().next().unwrap().as_array().unwrap();
        assert_eq!(inner.iter().map(|v| v.as_u64().unwrap()).collect::<Vec<_>>(), [7, 8, 9]);
        let [first, second] = file.tensors() else { panic!("two tensors") };
        assert_eq!((first.name(), first.shape()), ("quantized", &[2, 32][..]));
        assert_eq!(first.payload().unwrap().1.len(), 68);
        assert_eq!((second.name(), second.shape()), ("vector", &[3][..]));
        assert_eq!(second.offset() % 32, 0);
    }
}

fn problem(bytes: &[u8]) -> GgufProblem {
    let error = Gguf::parse(bytes).map(|_| ()).unwrap_err();
    assert!(!error.to_string().is_empty());
    error.problem()
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample(3);
    for len in 0..bytes.len() {
        let found = problem(&bytes[..len]);
        let expected = [GgufProblem::Truncated, GgufProblem::Count, GgufProblem::Range];
        assert!(expected.contains(&found), "{len}: {found:?}");
    }
}

#[test]
fn changed_bytes_are_errors_or_other_files() {
    let bytes = sample(3);
    for at in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            read_all(&changed);
        }
    }
}

/// Reads everything in a file that can be parsed.
fn read_all(bytes: &[u8]) {
    let Ok(file) = Gguf::parse(bytes) else { return };
    for (key, value) in file.metadata() {
        // Differs from itself only if it is not a number.
        assert!(file.get(key) == Some(value) || format!("{value:?}").contains("NaN"));
        if let GgufValue::Array(array) = value {
            assert_eq!(array.iter().count() as u64, array.len());
        }
    }
    for tensor in file.tensors() {
        let read: Result<(), GgufError> = tensor.payload().map(|(kind, payload)| {
            assert!(payload.len() <= bytes.len());
            let mut values = vec![0.0; 4 * kind.block_weights() as usize];
            kind.decode(payload, &mut values);
        });
        if let Err(error) = read {
            assert_eq!(error.problem(), GgufProblem::TensorType);
            assert!(error.to_string().contains(tensor.name()));
        }
    }
}

#[test]
fn wrong_heads_are_named() {
    let head = |version: u32| Builder::new(version, 0, 0).bytes;
    assert_eq!(problem(b"GGML\x03\0\0\0"), GgufProblem::Magic);
    assert_eq!(problem(&head(1)), GgufProblem::Version);
    assert_eq!(problem(&head(4)), GgufProblem::Version);
    assert_eq!(problem(&head(3u32.swap_bytes())), GgufProblem::ByteOrder);
    assert!(Gguf::parse(&head(2)).is_ok());
}

#[test]
fn impossible_counts_and_lengths_are_errors_before_memory_is_taken() {
    for count in [1, 1 << 32, 1 << 63, u64::MAX / 32 + 1, u64::MAX] {
        assert_eq!(problem(&Builder::new(3, count, 0).bytes), GgufProblem::Count);
        assert_eq!(problem(&Builder::new(3, 0, count).bytes), GgufProblem::Count);
        for (kind, least) in [(0, 1), (6, 4), (8, 8), (9, 12), (12, 8)] {
            let array = Builder::default().u32(kind).u64(count).raw(&vec![0; least - 1]).bytes;
            let file = Builder::new(3, 0, 1).entry("key", 9, &array).bytes;
            assert_eq!(problem(&file), GgufProblem::Count, "{kind} {count}");
        }
    }
    for length in [100, 1 << 40, u64::MAX] {
        let text = Builder::default().u64(length).raw(&[b'x'; 9]).bytes;
        let file = Builder::new(3, 0, 1).entry("key", 8, &text).bytes;
        assert_eq!(problem(&file), GgufProblem::Truncated);
    }
}

#[test]
fn broken_metadata_is_named() {
    let entry = |kind: u32, value: &[u8]| {
        problem(&Builder::new(3, 0, 1).entry("key", kind, value).raw(&[0; 16]).bytes)
    };
    assert_eq!(entry(13, &[0; 8]), GgufProblem::ValueType);
    assert_eq!(entry(7, &[2]), GgufProblem::Value);
    assert_eq!(entry(8, &Builder::default().u64(1).raw(&[0xff]).bytes), GgufProblem::Text);
    assert_eq!(entry(9, &Builder::default().u32(99).u64(0).bytes), GgufProblem::ValueType);
    let nested = (0..9).fold(Builder::default(), |b, _| b.u32(9).u64(1)).raw(&[0; 64]).bytes;
    assert_eq!(entry(9, &nested), GgufProblem::Value);
    let twice = Builder::new(3, 0, 2).entry("a", 0, &[1]).entry("a", 0, &[1]).bytes;
    assert_eq!(problem(&twice), GgufProblem::Duplicate);
    let unnamed = Builder::new(3, 0, 1).entry("", 0, &[1]).raw(&[0; 16]).bytes;
    assert_eq!(problem(&unnamed), GgufProblem::Name);
    for alignment in [0u32, 3, 1 << 31] {
        let file =
            Builder::new(3, 0, 1).entry("general.alignment", 4, &alignment.to_le_bytes()).data(0);
        assert_eq!(problem(&file), GgufProblem::Alignment, "{alignment}");
    }
}

#[test]
fn impossible_tensors_are_named() {
    let one = |dims: &[u64], kind, offset| {
        problem(&Builder::new(3, 1, 0).tensor("w", dims, kind, offset).data(64))
    };
    assert_eq!(one(&[], 0, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[1, 1, 1, 1, 1], 0, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[0], 0, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[1 << 33, 1 << 33], 0, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[u64::MAX], 0, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[31], 8, 0), GgufProblem::Dimensions);
    assert_eq!(one(&[17], 0, 0), GgufProblem::Range);
    assert_eq!(one(&[1], 0, 64), GgufProblem::Range);
    assert_eq!(one(&[1], 0, 16), GgufProblem::Range);
    assert_eq!(one(&[1], 0, u64::MAX - 31), GgufProblem::Range);
    let two = |first: u64, second: u64| {
        let file = Builder::new(3, 2, 0);
        problem(&file.tensor("a", &[9], 0, first).tensor("b", &[9], 0, second).data(128))
    };
    assert_eq!(two(0, 0), GgufProblem::Overlap);
    assert_eq!(two(0, 32), GgufProblem::Overlap);
    assert_eq!(two(32, 0), GgufProblem::Overlap);
    let same = Builder::new(3, 2, 0).tensor("a", &[1], 0, 0).tensor("a", &[1], 0, 32).data(64);
    assert_eq!(problem(&same), GgufProblem::Duplicate);
}

#[test]
fn an_unknown_type_is_an_error_only_where_its_tensor_is_needed() {
    let bytes =
        Builder::new(3, 2, 0).tensor("strange", &[5], 40, 0).tensor("plain", &[1], 0, 32).data(64);
    let file = Gguf::parse(&bytes).unwrap();
    assert!(file.tensors()[1].payload().is_ok());
    let error = file.tensors()[0].payload().unwrap_err();
    assert_eq!(error.problem(), GgufProblem::TensorType);
    let text = error.to_string();
    assert!(text.contains("strange") && text.contains("40"), "{text}");
}

/// Random changes of files, without a fuzzer: `STB_FUZZ` sets the number of changed files (see `fuzz/README.md`).
#[test]
fn random_changes_do_no_harm() {
    let count = std::env::var("STB_FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000u64);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let interesting = [0, 1, 8, 9, 0x7f, 0x80, 0xff];
    let seeds = [sample(3), sample(2), TYPES[..8192].to_vec()];
    for _ in 0..count {
        let mut bytes = seeds[(random() % 3) as usize].clone();
        for _ in 0..1 + random() % 6 {
            let at = (random() % bytes.len() as u64) as usize;
            match random() % 4 {
                0 => bytes[at] = random() as u8,
                1 => bytes[at] = interesting[(random() % 7) as usize],
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let value =
                        [u64::MAX, 1 << 63, random() % 64, random()][(random() % 4) as usize];
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
                }
            }
        }
        read_all(&bytes);
    }
}
