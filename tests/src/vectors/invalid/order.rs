//! Files that break several rules at once. Readers report only the first in the order of container §4.

use stb_format::encoding::{Dense, Encoding, Stbllm, StbllmParts};
use stb_format::half::f16;
use stb_format::{Meta, Rule, Value};

use super::tables::{int_file, nm_file, pair, single, stbllm_file};
use crate::vectors::patch::*;
use crate::vectors::valid;
use crate::vectors::vector::VectorList;

pub(super) fn combinations(list: &mut VectorList) {
    head(list);
    tables(list);
    metadata(list);
    masks(list);
    unused(list);
    models(list);
}

fn head(list: &mut VectorList) {
    let base = valid::smallest();
    let padded = |count: u32, at: usize| {
        edit(&base, |b| {
            put32(b, 24, count);
            b[at] = 1;
        })
    };
    // The directory of 83 entries ends at 4048, that of 84 beyond 4088.
    list.add(
        Rule::HeadReserved,
        "83-sections",
        "too many sections and a byte after them",
        padded(83, 4048),
    );
    list.add(
        Rule::SectionCount,
        "84-sections",
        "so many sections that no padding is left",
        padded(84, 4087),
    );
    let mut both = base.clone();
    both[4100] = 1;
    let (start, _) = section(&base, 2);
    both[start + 16 + 32] = 2;
    list.add(Rule::SectionPadding, "and-checksum", "padding and a checksum", both);
    for (kind, name) in [(16, "digest"), (17, "signature")] {
        let about = "a critical section of a type that is reserved";
        list.add(Rule::SectionCritical, name, about, with_section(&base, kind, 1));
    }
}

fn tables(list: &mut VectorList) {
    let nm = nm_file(1, 8, 2, 40, 4, false);
    let bytes = with_table(&nm, |t| {
        t[32] = 3;
        t[16 + 6] = 3;
        put64(t, 16 + 48, 1);
    });
    list.add(Rule::EncodingParams, "and-shape", "parameters and shape", bytes);
    let bytes = with_table(&pair(), |t| {
        put16(t, 112 + 4, 1);
        t[112 + 7] = 1;
        put64(t, 8, 2);
        t.truncate(208 + 1);
        t.push(b'a');
    });
    list.add(Rule::TensorUnique, "and-reserved", "a name twice, and a reserved byte", bytes);
}

fn metadata(list: &mut VectorList) {
    let base = valid::smallest();
    let mut add = |rule, name, about, section: Vec<u8>| {
        list.add(rule, name, about, with_meta(&base, &section))
    };
    add(Rule::MetaStructure, "empty", "META of no bytes", Vec::new());
    let (a, wrong) = (entry(b"a", 9, &[]), entry(b"b", 4, &[1]));
    add(Rule::MetaOrder, "and-type", "keys in wrong order, and a type", meta(2, &[wrong, a]));
    let texts: [(&str, &str, &[u8]); 3] = [
        ("overlong", "a text with an overlong form", &[0xc0, 0x80]),
        ("beyond", "a text with a code point above U+10FFFF", &[0xf4, 0x90, 0x80, 0x80]),
        ("cut", "a text that ends within a character", &[0x61, 0xe6, 0x97]),
    ];
    for (name, about, text) in texts {
        add(Rule::MetaValue, name, about, meta(1, &[entry(b"k", 1, text)]));
    }
}

/// 2 x 128 weights of 4:8 with the first column of each unit salient; `change` gets the payload.
fn two_units(change: impl Fn(&mut [u8])) -> Vec<u8> {
    let spec = Stbllm::new(4, 128).expect("valid parameters");
    let (rows, cols) = (2, 128);
    let kept = |col: usize| u8::from(col % 8 < 4);
    let parts = StbllmParts {
        spec,
        rows,
        cols,
        salient: (0..cols).map(|col| col % 64 == 0).collect(),
        states: (0..rows * cols).map(|i| kept(i % cols)).collect(),
        negative: vec![false; rows * cols],
        scales: vec![f16::ONE; rows * 5],
    };
    let base = single([rows, cols], Encoding::Stbllm(spec), parts.pack());
    edit_payload(&base, 0, |p| change(p))
}

/// The order of STB-R-043 and STB-R-044: unit by unit, the count first.
fn masks(list: &mut VectorList) {
    // Segments: salient 0..16, states 64..128: low and high of (row 0, unit 0), (row 0, unit 1), ...
    let low = |row: usize, unit: usize| 64 + (row * 2 + unit) * 16;
    let (count, state) = (Rule::StbllmCount, Rule::StbllmState);
    let one_less = |p: &mut [u8], row, unit| p[low(row, unit) + 1] &= !1;
    let sparse = |p: &mut [u8], row, unit| p[low(row, unit) + 8] |= 1;
    let mut add = |rule, name, about, bytes| list.add(rule, name, about, bytes);
    add(
        count,
        "and-state",
        "both in one unit",
        two_units(|p| {
            one_less(p, 0, 0);
            sparse(p, 0, 0);
        }),
    );
    add(
        state,
        "then-count",
        "a state in the first unit, a count in the second",
        two_units(|p| {
            sparse(p, 0, 0);
            one_less(p, 0, 1);
        }),
    );
    add(
        state,
        "row-then-count",
        "a state in the first row, a count in the second",
        two_units(|p| {
            sparse(p, 0, 1);
            one_less(p, 1, 0);
        }),
    );
    add(
        count,
        "then-padding",
        "a count, and a byte between segments",
        two_units(|p| {
            one_less(p, 1, 1);
            p[20] = 1;
        }),
    );
    add(
        Rule::PayloadPadding,
        "and-number",
        "a byte between segments, and a number",
        two_units(|p| {
            p[20] = 1;
            let last = p.len() - 2;
            p[last..].copy_from_slice(&[0, 0x7c]);
        }),
    );
}

/// Unused bits in every kind of segment.
fn unused(list: &mut VectorList) {
    let mut edit = |name: &str, about, base: &[u8], at: usize, bits: u8| {
        let bytes = edit_payload(base, 0, |p| p[at] |= bits);
        list.add(Rule::PayloadPadding, name, about, bytes);
    };
    let stbllm = stbllm_file(4, 1, 21);
    edit("stbllm-segment", "a byte between salient columns and states", &stbllm, 8, 1);
    edit("stbllm-high", "a high bit of a column that does not exist", &stbllm, 64 + 8 + 7, 0x80);
    // 17 x 40, 2:8: 5 groups, 2 quads; row scales at 0, codes at 64. A tile has 3 vectors: those of
    // the planes of width 4, 2 and 1.
    let nm = nm_file(2, 8, 17, 40, 0, false);
    edit("nm-segment", "a byte between row scales and codes", &nm, 34, 1);
    edit("nm-plane-4", "a row that does not exist, plane of width 4", &nm, 64 + 192 + 1, 0x10);
    edit("nm-plane-2", "a row that does not exist, plane of width 2", &nm, 64 + 192 + 64 + 1, 4);
    edit("nm-plane-1", "a row that does not exist, plane of width 1", &nm, 64 + 192 + 128 + 1, 2);
    edit("nm-quad", "a quad that does not exist, plane of width 2", &nm, 64 + 64, 0x10);
    let scaled = nm_file(1, 8, 1, 40, 4, false);
    edit("nm-scale-low", "a scale of a row that does not exist, low half", &scaled, 64 + 1, 1);
    let int = int_file(4, 1, 40);
    edit("int4-high", "the high half of a byte of a column that does not exist", &int, 16, 0x80);
    // 1 x 40, G 32: two units; columns 40 to 63 are those from 8 on of the second.
    let sign = int_file(1, 1, 40);
    edit("sign-unit", "column 48 of 40, 1 bit", &sign, 4, 0x10);
    let two = int_file(2, 1, 40);
    edit("odd2-unit", "column 63 of 40, 2 bits", &two, 8 + 7, 0x80);
    let three = int_file(3, 1, 40);
    edit("odd3-low", "column 40 of 40, the low plane of 3 bits", &three, 8, 4);
    edit("odd3-high", "column 40 of 40, the high plane of 3 bits", &three, 16 + 4, 4);
    edit("odd3-segment", "a byte between codes and scales", &three, 24, 1);
    let scales = vec![(
        "w".to_owned(),
        vec![2],
        Encoding::Dense(Dense::F32),
        vec![0, 0, 0x80, 0x3f, 0, 0, 0x80, 0xff],
    )];
    list.add(
        Rule::PayloadFinite,
        "last",
        "minus infinity as the last weight",
        valid::file(&scales, &Meta::new()),
    );
}

fn models(list: &mut VectorList) {
    let text = |t: &str| Some(Value::Text(t.to_owned()));
    let number = |n| Some(Value::U64(n));
    let mut with = |rule, name: &str, about, changes: &[(&str, Option<Value>)]| {
        list.add(rule, name, about, valid::changed_model(changes));
    };
    with(
        Rule::ModelArchitecture,
        "and-key",
        "an unknown norm, and no activation",
        &[("model.norm", text("layernorm")), ("model.activation", None)],
    );
    with(
        Rule::ModelKey,
        "then-architecture",
        "no norm, and an unknown activation",
        &[("model.norm", None), ("model.activation", text("relu3"))],
    );
    with(
        Rule::ModelKey,
        "and-value",
        "no hidden size, and no layers at all",
        &[("model.hidden_size", None), ("model.layers", number(0))],
    );
    with(
        Rule::ModelTensor,
        "and-parameters",
        "a wrong shape, and no parameter count",
        &[("model.intermediate_size", number(56)), ("model.parameters", None)],
    );
    with(
        Rule::ModelParameters,
        "and-token",
        "a wrong parameter count, and a token outside the vocabulary",
        &[("model.parameters", number(1)), ("tokenizer.bos_id", number(40))],
    );
    with(
        Rule::ModelKey,
        "bos-type",
        "a begin token that is not a number, where none is asked for",
        &[("tokenizer.add_bos", Some(Value::Bool(false))), ("tokenizer.bos_id", text("<s>"))],
    );
    with(
        Rule::ModelKey,
        "architecture",
        "an architecture that is not a text",
        &[("model.architecture", number(1))],
    );
    let value = Rule::ModelValue;
    with(
        value,
        "context",
        "llama3 scaling of no context",
        &[("model.rope.original_context", number(0))],
    );
    with(
        value,
        "factor",
        "a rotary factor of zero",
        &[("model.rope.factor", Some(Value::F64(0.0)))],
    );
    with(value, "theta", "a rotary base of zero", &[("model.rope.theta", Some(Value::F64(0.0)))]);
    with(
        value,
        "65537-heads",
        "more heads than the limit",
        &[("model.heads", number(65537)), ("model.kv_heads", number(1))],
    );
    with(
        value,
        "context-length",
        "a context above 2^32",
        &[("model.context_length", number((1 << 32) + 1))],
    );
}
