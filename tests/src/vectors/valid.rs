//! Files that every reader must accept.

use std::io::Cursor;

use stb_format::arch::TensorSpec;
use stb_format::encoding::{
    CoarseRows, Dense, Encoding, IntGroup, MixedRows, Nm, Stbllm, Trellis, TrellisRate,
};
use stb_format::{File, Meta, ModelSpec, RopeScaling, Value, ValueRef, Writer};

use super::vector::Vector;
use super::{content, decoders, patch};
use crate::tiny::tokenizer;
use stb_random::Rng;

pub(super) type Tensors = Vec<(String, Vec<u64>, Encoding, Vec<u8>)>;

pub(super) fn file(tensors: &Tensors, meta: &Meta) -> Vec<u8> {
    let mut writer = Writer::new(Cursor::new(Vec::new())).expect("memory takes anything");
    for (name, shape, encoding, payload) in tensors {
        writer.tensor(name, shape, encoding, payload).expect("a valid tensor");
    }
    writer.finish(meta).expect("a valid file").into_inner()
}

fn dense(name: &str, shape: &[u64], kind: Dense, values: &[f32]) -> Tensors {
    vec![(name.to_owned(), shape.to_vec(), Encoding::Dense(kind), kind.encode(values))]
}

/// The smallest valid file: one tensor with the weight 1, no metadata.
pub(super) fn smallest() -> Vec<u8> {
    file(&dense("w", &[1], Dense::F32, &[1.0]), &Meta::new())
}

/// Dense tensors of every type and rank.
pub(super) fn dense_tensors() -> Tensors {
    let special = [0.0, -0.0, 1.0, -1.5, 6.0e-8, 1.0e-40, 65504.0, -3.0e38];
    let moderate = [0.0, -0.0, 1.0, -1.5, 6.0e-8, -0.333, 65504.0, -1024.0];
    let mut tensors = dense("f32", &[8], Dense::F32, &special);
    tensors.extend(dense("f16", &[2, 4], Dense::F16, &moderate));
    tensors.extend(dense("bf16", &[2, 2, 2], Dense::Bf16, &special));
    tensors.extend(dense("f16.rank4", &[1, 2, 1, 3], Dense::F16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    tensors
}

pub(super) fn int_tensors() -> Tensors {
    integers(Rng(16), &[4, 8], &[(3, 40), (2, 172), (1, 128)])
}

/// Rows that end within a unit, a group and a plane.
pub(super) fn odd_tensors() -> Tensors {
    integers(Rng(17), &[1, 2, 3], &[(3, 40), (2, 172), (1, 128), (2, 5), (1, 1100)])
}

fn integers(mut rng: Rng, bits: &[u8], shapes: &[(usize, usize)]) -> Tensors {
    let mut tensors = Vec::new();
    for (bits, group) in bits.iter().flat_map(|b| [32, 64, 128].map(|g| (*b, g))) {
        for &(rows, cols) in shapes {
            let spec = IntGroup::new(bits, group).expect("valid parameters");
            let payload = content::int_group(&mut rng, spec, rows, cols).pack();
            let name = format!("int{bits}.g{group}.{rows}x{cols}");
            let shape = vec![rows as u64, cols as u64];
            tensors.push((name, shape, Encoding::IntGroup(spec), payload));
        }
    }
    tensors
}

pub(super) fn stbllm_tensors() -> Tensors {
    let mut rng = Rng(32);
    let mut tensors = Vec::new();
    let shapes = [(2, 64, 32), (3, 172, 64), (1, 300, 128), (2, 21, 1024)];
    for n in 1..=8 {
        for (rows, cols, block) in shapes {
            let spec = Stbllm::new(n, block).expect("valid parameters");
            let payload = content::stbllm(&mut rng, spec, rows, cols).pack();
            let name = format!("stbllm.{n}of8.b{block}.{rows}x{cols}");
            let shape = vec![rows as u64, cols as u64];
            tensors.push((name, shape, Encoding::Stbllm(spec), payload));
        }
    }
    tensors
}

pub(super) fn nm_tensors() -> Tensors {
    let mut rng = Rng(48);
    let mut tensors = Vec::new();
    let scales = [(0, 0, false), (4, 32, false), (8, 64, true), (4, 128, true)];
    for (n, m) in [(1, 4), (1, 8), (2, 4), (2, 8)] {
        for (bits, block, factors) in scales {
            for (rows, cols) in [(1, 8), (17, 172), (16, 352), (33, 300)] {
                let spec = Nm::new(n, m, bits, block, factors).expect("valid parameters");
                let payload = content::nm(&mut rng, spec, rows, cols).pack();
                let flag = if factors { ".cols" } else { "" };
                let name = format!("nm.{n}of{m}.b{block}.s{bits}{flag}.{rows}x{cols}");
                let shape = vec![rows as u64, cols as u64];
                tensors.push((name, shape, Encoding::Nm(spec), payload));
            }
        }
    }
    tensors
}

pub(super) fn trellis_tensors() -> Tensors {
    let mut rng = Rng(80);
    let mut tensors = Vec::new();
    let kinds = [
        (0, 0, false),
        (4, 32, false),
        (8, 64, false),
        (4, 128, false),
        (0, 0, true),
        (8, 64, true),
    ];
    for rate in TrellisRate::ALL {
        let (k, v) = (rate.step_bits() as u8, rate.step_weights() as u8);
        for (bits, block, factors) in kinds {
            for (rows, cols) in [(1, 8), (17, 172), (16, 352), (33, 301)] {
                let spec = Trellis::new(k, v, bits, block).expect("valid parameters");
                let spec = spec.with_col_factors(factors);
                let payload = content::trellis(&mut rng, spec, rows, cols).pack();
                let flag = if factors { ".cols" } else { "" };
                let name = format!("trellis.{k}.{v}.b{block}.s{bits}{flag}.{rows}x{cols}");
                let shape = vec![rows as u64, cols as u64];
                tensors.push((name, shape, Encoding::Trellis(spec), payload));
            }
        }
    }
    tensors
}

/// All kinds of parts; one row, some and all rows listed.
pub(super) fn mixed_tensors() -> Tensors {
    let mut rng = Rng(64);
    let int = |bits, group| IntGroup::new(bits, group).expect("valid parameters");
    let nm = |n, m, bits, block| Nm::new(n, m, bits, block, false).expect("valid parameters");
    let trellis = |k, v, bits, block| Trellis::new(k, v, bits, block).expect("valid parameters");
    let parts = [
        (int(8, 32), CoarseRows::IntGroup(int(1, 128))),
        (int(4, 64), CoarseRows::Nm(nm(2, 8, 4, 128))),
        (int(3, 128), CoarseRows::Nm(nm(1, 4, 0, 0))),
        (int(2, 64), CoarseRows::IntGroup(int(4, 32))),
        (int(8, 64), CoarseRows::Trellis(trellis(2, 1, 4, 128))),
        (int(4, 64), CoarseRows::Trellis(trellis(3, 2, 4, 128).with_col_factors(true))),
    ];
    let mut tensors = Vec::new();
    for (k, (fine, coarse)) in parts.into_iter().enumerate() {
        for (count, rows, cols) in [(1, 1, 8), (1, 17, 172), (5, 33, 300), (16, 16, 64)] {
            let spec = MixedRows::new(count, fine, coarse).expect("valid parameters");
            let payload = content::mixed_rows(&mut rng, spec, rows, cols).pack();
            let name = format!("mixed.{k}.{count}of{rows}x{cols}");
            let shape = vec![rows as u64, cols as u64];
            tensors.push((name, shape, Encoding::MixedRows(spec), payload));
        }
    }
    tensors
}

/// Every value type, and texts of several scripts.
fn metadata() -> Meta {
    let mut meta = Meta::new();
    let entries = [
        ("a", Value::Text(String::new())),
        ("text.unicode", Value::Text("naïve 日本語 🦀 \u{1b}[31m\n".into())),
        ("u64.max", Value::U64(u64::MAX)),
        ("f64.small", Value::F64(-5.0e-324)),
        ("f64.large", Value::F64(f64::MAX)),
        ("bool.true", Value::Bool(true)),
        ("bool.false", Value::Bool(false)),
        ("list.empty", Value::U64List(vec![])),
        ("list", Value::U64List(vec![0, 1, u64::MAX])),
        ("text.nul-and-bom", Value::Text("\u{feff}\0".into())),
        ("x.private-use_0", Value::U64(7)),
    ];
    for (key, value) in entries {
        meta.set(key, value).expect("a valid entry");
    }
    meta
}

/// A complete model of two layers with a small tokenizer.
pub(super) fn model() -> (Tensors, Meta, ModelSpec) {
    let spec = ModelSpec {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        context_length: 64,
        norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 32,
        },
        tied_embeddings: true,
        ..ModelSpec::default()
    };
    let (tensors, meta) = model_of(&spec, 7);
    (tensors, meta, spec)
}

/// A model of this `spec` with random weights in mixed encodings, vectors of ones and a small tokenizer.
pub(super) fn model_of(spec: &ModelSpec, seed: u64) -> (Tensors, Meta) {
    let mut rng = Rng(seed);
    let mut tensors = Tensors::new();
    for TensorSpec { name, shape, .. } in spec.tensors() {
        let (rows, cols) = (shape[0] as usize, shape.get(1).map_or(1, |c| *c as usize));
        let (encoding, payload) = if shape.len() == 1 {
            (Encoding::Dense(Dense::F32), Dense::F32.encode(&vec![1.0; rows]))
        } else if name.contains("embed") {
            let spec = IntGroup::new(8, 32).expect("valid parameters");
            (Encoding::IntGroup(spec), content::int_group(&mut rng, spec, rows, cols).pack())
        } else if name.contains("mlp") {
            let spec = Nm::new(2, 8, 4, 32, false).expect("valid parameters");
            (Encoding::Nm(spec), content::nm(&mut rng, spec, rows, cols).pack())
        } else {
            let spec = Stbllm::new(4, 32).expect("valid parameters");
            (Encoding::Stbllm(spec), content::stbllm(&mut rng, spec, rows, cols).pack())
        };
        tensors.push((name, shape, encoding, payload));
    }
    let mut meta = Meta::new();
    spec.write_meta(&mut meta).expect("valid keys");
    let parameters = spec.tensors().map(|t| t.shape.iter().product::<u64>()).sum();
    for (key, value) in [
        ("model.parameters", Value::U64(parameters)),
        ("tokenizer.json", Value::Text(tokenizer())),
        ("tokenizer.add_bos", Value::Bool(true)),
        ("tokenizer.bos_id", Value::U64(0)),
        ("tokenizer.eos_ids", Value::U64List(vec![1])),
        ("tokenizer.chat_template", Value::Text("{{ messages[0].content }}".into())),
    ] {
        meta.set(key, value).expect("a valid entry");
    }
    (tensors, meta)
}

/// A tensor of an unknown encoding with an empty payload, and sections of length 0.
fn empty() -> Vec<u8> {
    let strange = Encoding::Unknown { id: 0, params: [0; 16] };
    let base = file(&vec![("none".to_owned(), vec![3], strange, Vec::new())], &Meta::new());
    let mut sections = patch::sections(&base);
    let meta = sections.pop().expect("META");
    sections.insert(0, meta);
    sections.push(patch::Section { kind: 0x8000_0005, flags: 0, content: Vec::new() });
    patch::assemble(&sections)
}

/// Deflated texts with blocks of all kinds, in a file for readers from version 2.
fn deflated_texts() -> Vec<u8> {
    use miniz_oxide::deflate::compress_to_vec;
    let words: String = (0..300u32).map(|i| format!("{} ", i * i % 1009)).collect();
    // The second needle is 32768 bytes after the first, the longest distance there is.
    let far = format!("needle{}needle", "0".repeat(32768 - 6));
    let text = |text: &str, level| {
        patch::deflated(text.len() as u64, &compress_to_vec(text.as_bytes(), level))
    };
    // One code of one bit; the other code of one bit is not used.
    let end_only = [0x05, 0xe0, 0x01, 0x05, 0, 0, 0, 0, 0x20, 0xfc, 0x7f, 0x1d];
    let one_distance =
        [0x0d, 0xe0, 0x01, 0x09, 0, 0, 0, 0x80, 0x20, 0x6c, 0xad, 0xff, 0x23, 0x4a, 0x16];
    let entries = [
        patch::entry(b"bits-after-the-end", 6, &patch::deflated(1, &[0x4b, 0x04, 0xfc])),
        patch::entry(b"dynamic", 6, &text(&words, 9)),
        patch::entry(b"empty", 6, &patch::deflated(0, &[0x03, 0x00])),
        patch::entry(b"end-only", 6, &patch::deflated(0, &end_only)),
        patch::entry(b"far", 6, &text(&far, 6)),
        patch::entry(b"fixed", 6, &patch::deflated(1, patch::FIXED_A)),
        patch::entry(b"one-distance", 6, &patch::deflated(4, &one_distance)),
        patch::entry(b"plain", 1, "not deflated".as_bytes()),
        patch::entry(b"stored", 6, &text("naïve 日本語 🦀\0", 0)),
        patch::entry(
            b"two-blocks",
            6,
            &patch::deflated(2, &[0, 1, 0, 0xfe, 0xff, b'a', 1, 1, 0, 0xfe, 0xff, b'b']),
        ),
        patch::entry(b"x.private", 6, &text(&words[..400], 1)),
    ];
    let base = file(&dense("w", &[1], Dense::F32, &[1.0]), &Meta::new());
    patch::with_meta_2(&base, &patch::meta(entries.len() as u32, &entries))
}

/// The model file with all its texts deflated, the short ones too.
fn deflated_model() -> Vec<u8> {
    let (tensors, meta, _) = model();
    let base = file(&tensors, &meta);
    let parsed = File::open(&base).expect("a valid model");
    let entry = |(key, value): (&str, ValueRef<'_>)| {
        let key = key.as_bytes();
        match value {
            ValueRef::Text(text) => {
                let stream = miniz_oxide::deflate::compress_to_vec(text.as_bytes(), 6);
                patch::entry(key, 6, &patch::deflated(text.len() as u64, &stream))
            }
            ValueRef::U64(v) => patch::entry(key, 2, &v.to_le_bytes()),
            ValueRef::F64(v) => patch::entry(key, 3, &v.to_le_bytes()),
            ValueRef::Bool(v) => patch::entry(key, 4, &[u8::from(v)]),
            ValueRef::U64List(v) => patch::entry(key, 5, v.as_flattened()),
        }
    };
    let entries: Vec<Vec<u8>> = parsed.meta().iter().map(entry).collect();
    patch::with_meta_2(&base, &patch::meta(entries.len() as u32, &entries))
}

/// The model file with other values for some keys, or without them.
pub(super) fn changed_model(changes: &[(&str, Option<Value>)]) -> Vec<u8> {
    let (tensors, meta, _) = model();
    let base = file(&tensors, &meta);
    let parsed = File::open(&base).expect("a valid model");
    let mut changed = Meta::new();
    for (key, value) in parsed.meta().iter() {
        match changes.iter().find(|(k, _)| *k == key) {
            Some((_, Some(value))) => changed.set(key, value.clone()),
            Some((_, None)) => Ok(()),
            None => changed.set(key, value.to_value()),
        }
        .expect("a valid entry");
    }
    file(&tensors, &changed)
}

/// The model without rotary scaling. Keys that readers must ignore hold invalid values.
fn unscaled() -> Vec<u8> {
    changed_model(&[
        ("model.rope.scaling", Some(Value::Text("none".into()))),
        ("model.rope.factor", Some(Value::F64(-1.0))),
        ("model.rope.original_context", Some(Value::Text("no number".into()))),
        ("model.rope.high_freq_factor", None),
        ("tokenizer.add_bos", Some(Value::Bool(false))),
        ("generation.temperature", Some(Value::Text("hot".into()))),
    ])
}

/// All valid vectors; the smallest comes first.
#[must_use]
pub fn valid() -> Vec<Vector> {
    let none = Meta::new();
    let (model_tensors, model_meta, _) = model();
    let long = "n".repeat(255);
    let mut longest = dense(&long, &[1, 1, 1, 1], Dense::F16, &[1.0]);
    longest.extend(dense("~", &[1], Dense::F16, &[2.0]));
    let mut long_key = Meta::new();
    long_key.set(&"k".repeat(255), Value::U64(1)).expect("a key at the limit");
    let mut unknown = dense("before", &[2], Dense::F32, &[1.0, 2.0]);
    let strange = Encoding::Unknown { id: 0x8000_0001, params: [0xa5; 16] };
    unknown.push(("strange".into(), vec![3, 5], strange, vec![0xee; 100]));
    unknown.extend(dense("after", &[2], Dense::F32, &[3.0, 4.0]));
    let list = [
        ("smallest", "one f32 weight, no metadata: the file of example.md", smallest()),
        (
            "dense",
            "f32, f16 and bf16 of ranks 1 to 4, with zeros of both signs and subnormals",
            file(&dense_tensors(), &none),
        ),
        (
            "int-group",
            "all bits and group sizes, with ragged last groups",
            file(&int_tensors(), &none),
        ),
        (
            "odd-group",
            "1 to 3 bits, all group sizes, ragged last units and groups",
            file(&odd_tensors(), &none),
        ),
        (
            "stbllm",
            "every N, several blocks, ragged last groups, units and blocks",
            file(&stbllm_tensors(), &none),
        ),
        (
            "nm",
            "every N:M and kind of scale, ragged tiles, quads, chunks and blocks",
            file(&nm_tensors(), &none),
        ),
        (
            "trellis",
            "every rate and kind of scale, ragged tiles, units and blocks",
            file(&trellis_tensors(), &none),
        ),
        (
            "mixed-rows",
            "one, some and all rows stored twice, with all kinds of parts",
            file(&mixed_tensors(), &none),
        ),
        (
            "metadata",
            "every value type, empty values, scripts, a control sequence in a text",
            file(&dense("w", &[1], Dense::F32, &[1.0]), &metadata()),
        ),
        (
            "deflated",
            "deflated texts: empty, blocks of each kind, one symbol, long distances, bits after the end",
            deflated_texts(),
        ),
        ("deflated-model", "a model file in which every text is deflated", deflated_model()),
        (
            "longest-names",
            "a tensor name and a key of 255 bytes, the characters ! to ~ at their ends",
            file(&longest, &long_key),
        ),
        (
            "model",
            "a model file: the whole profile, llama3 rotary scaling, mixed encodings",
            file(&model_tensors, &model_meta),
        ),
        (
            "unknown-encoding",
            "a tensor of a private encoding between two that can be decoded",
            file(&unknown, &none),
        ),
        (
            "unknown-section",
            "a section of a private type that is not critical, between DATA and TENSORS",
            patch::with_section(&smallest(), 0x8000_0002, 0),
        ),
        (
            "empty",
            "a payload of no bytes in an empty DATA, META before it, an empty section at the end",
            empty(),
        ),
        (
            "reserved-section",
            "a section of a type that is reserved, not critical, twice",
            patch::with_section(&patch::with_section(&smallest(), 16, 0), 16, 0),
        ),
        (
            "unscaled-model",
            "values of scaling keys that are not in use, and a begin token that is not used",
            unscaled(),
        ),
        (
            "64-sections",
            "the most sections a file may have",
            patch::with_many_sections(&smallest(), 64),
        ),
        (
            "sections-in-other-order",
            "META, then DATA, then TENSORS",
            patch::reordered(&smallest(), [2, 0, 1]),
        ),
        (
            "newer-writer",
            "written by version 7 for readers from version 1",
            patch::edit(&smallest(), |b| patch::put16(b, 10, 7)),
        ),
    ];
    let models = decoders::valid().into_iter();
    list.into_iter()
        .chain(models)
        .map(|(name, about, bytes)| Vector {
            name: format!("{name}.stb"),
            about,
            bytes,
            rule: None,
        })
        .collect()
}
