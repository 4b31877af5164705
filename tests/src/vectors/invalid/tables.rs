//! Metadata, the tensor table and the parameters of encodings.

use stb_format::encoding::{CoarseRows, Dense, Encoding, IntGroup, MixedRows, Nm, Stbllm, Trellis};
use stb_format::{Meta, Rule};

use crate::vectors::patch::*;
use crate::vectors::vector::VectorList;
use crate::vectors::{content, valid};
use stb_random::Rng;

pub(super) fn metadata(list: &mut VectorList) {
    let base = valid::smallest();
    let mut add = |rule, name, about, section: Vec<u8>| {
        list.add(rule, name, about, with_meta(&base, &section))
    };
    let one = entry(b"key", 2, &7u64.to_le_bytes());
    add(Rule::MetaStructure, "short", "META of 7 bytes", vec![0; 7]);
    add(
        Rule::MetaStructure,
        "reserved",
        "the reserved field of the header",
        [1u32.to_le_bytes(), 1u32.to_le_bytes()].concat(),
    );
    add(
        Rule::MetaStructure,
        "cut-header",
        "an entry with 7 of its 8 bytes",
        meta(1, &[one[..7].to_vec()]),
    );
    add(
        Rule::MetaStructure,
        "cut-value",
        "a value that lacks a byte",
        meta(1, &[one[..one.len() - 1].to_vec()]),
    );
    add(
        Rule::MetaStructure,
        "left-over",
        "a byte after the last entry",
        meta(1, &[one.clone(), vec![0]]),
    );
    add(
        Rule::MetaStructure,
        "missing",
        "two entries stated, one there",
        meta(2, std::slice::from_ref(&one)),
    );
    add(
        Rule::MetaLimits,
        "4097-entries",
        "one entry too many, stated only",
        meta(4097, std::slice::from_ref(&one)),
    );
    add(
        Rule::MetaLimits,
        "huge-count",
        "as many entries as the field can say",
        meta(u32::MAX, &[]),
    );
    add(Rule::MetaLimits, "no-key", "a key of no bytes", meta(1, &[entry(b"", 4, &[1])]));
    add(
        Rule::MetaLimits,
        "key-256",
        "a key of 256 bytes",
        meta(1, &[entry(&[b'k'; 256], 4, &[1])]),
    );
    let mut long = entry(b"k", 1, b"");
    long[4..8].copy_from_slice(&((1u32 << 28) + 1).to_le_bytes());
    add(
        Rule::MetaLimits,
        "long-value",
        "a value one byte above the limit, stated only",
        meta(1, &[long]),
    );
    add(
        Rule::MetaKey,
        "upper-case",
        "a key with a capital letter",
        meta(1, &[entry(b"Key", 4, &[1])]),
    );
    add(
        Rule::MetaKey,
        "utf-8",
        "a key with a letter outside ASCII",
        meta(1, &[entry("é".as_bytes(), 4, &[1])]),
    );
    let (a, b) = (entry(b"a", 4, &[1]), entry(b"b", 4, &[1]));
    add(Rule::MetaOrder, "swapped", "b before a", meta(2, &[b, a.clone()]));
    add(Rule::MetaOrder, "twice", "the same key twice", meta(2, &[a.clone(), a]));
    add(
        Rule::MetaOrder,
        "prefix",
        "ab before a",
        meta(2, &[entry(b"ab", 4, &[1]), entry(b"a", 4, &[1])]),
    );
    add(Rule::MetaType, "type-0", "value type 0", meta(1, &[entry(b"k", 0, &[])]));
    add(
        Rule::MetaType,
        "type-6",
        "a deflated text in a file for readers from version 1",
        meta(1, &[entry(b"k", 6, &deflated(1, FIXED_A))]),
    );
    add(
        Rule::MetaValue,
        "text",
        "a text that is not UTF-8",
        meta(1, &[entry(b"k", 1, &[0x61, 0xff])]),
    );
    add(
        Rule::MetaValue,
        "surrogate",
        "a text with an encoded surrogate",
        meta(1, &[entry(b"k", 1, &[0xed, 0xa0, 0x80])]),
    );
    add(Rule::MetaValue, "u64", "an integer of 7 bytes", meta(1, &[entry(b"k", 2, &[0; 7])]));
    add(
        Rule::MetaValue,
        "nan",
        "a number that is none",
        meta(1, &[entry(b"k", 3, &f64::NAN.to_le_bytes())]),
    );
    add(
        Rule::MetaValue,
        "infinite",
        "minus infinity",
        meta(1, &[entry(b"k", 3, &f64::NEG_INFINITY.to_le_bytes())]),
    );
    add(Rule::MetaValue, "bool", "a truth value of 2", meta(1, &[entry(b"k", 4, &[2])]));
    add(
        Rule::MetaValue,
        "list",
        "a list of one and a half numbers",
        meta(1, &[entry(b"k", 5, &[0; 12])]),
    );
    let mut reserved = entry(b"k", 4, &[1]);
    reserved[3] = 1;
    add(Rule::MetaValue, "reserved", "the reserved byte of an entry", meta(1, &[reserved]));
}

/// Two small tensors, "a" [3] and "bc" [2, 2].
pub(super) fn pair() -> Vec<u8> {
    let tensors = vec![
        ("a".to_owned(), vec![3], Encoding::Dense(Dense::F32), Dense::F32.encode(&[1.0, 2.0, 3.0])),
        ("bc".to_owned(), vec![2, 2], Encoding::Dense(Dense::F16), Dense::F16.encode(&[1.0; 4])),
    ];
    valid::file(&tensors, &Meta::new())
}

pub(super) fn table(list: &mut VectorList) {
    let base = pair();
    // Offsets in the TENSORS section: header 16, entries 96 each, then "abc".
    let (first, second, names) = (16, 112, 208);
    let mut add = |rule, name, about, change: &dyn Fn(&mut Vec<u8>)| {
        list.add(rule, name, about, with_table(&base, |t| change(t)));
    };
    add(Rule::TensorTable, "short", "TENSORS of 15 bytes", &|t| t.truncate(15));
    add(Rule::TensorTable, "none", "no tensor", &|t| put32(t, 0, 0));
    add(Rule::TensorTable, "too-many", "one tensor too many, stated only", &|t| {
        put32(t, 0, (1 << 20) + 1)
    });
    add(Rule::TensorTable, "entry-size", "entries of 88 bytes", &|t| put32(t, 4, 88));
    add(Rule::TensorTable, "names-length", "names longer than the section", &|t| put64(t, 8, 4));
    add(Rule::TensorTable, "names-overflow", "a length of names near 2^64", &|t| {
        put64(t, 8, u64::MAX)
    });
    add(Rule::TensorTable, "count", "more tensors than fit", &|t| put32(t, 0, 3));
    add(Rule::TensorShape, "no-dims", "no dimension", &|t| t[first + 6] = 0);
    add(Rule::TensorShape, "5-dims", "five dimensions", &|t| t[first + 6] = 5);
    add(Rule::TensorShape, "zero", "a dimension of 0", &|t| put64(t, first + 32, 0));
    add(Rule::TensorShape, "unused", "a size in an unused dimension", &|t| put64(t, first + 40, 1));
    add(Rule::TensorShape, "large", "a dimension of 2^32", &|t| put64(t, first + 32, 1 << 32));
    add(Rule::TensorShape, "elements", "more than 2^48 elements", &|t| {
        put64(t, second + 32, 0xffff_ffff);
        put64(t, second + 40, 0x1_0001);
    });
    add(Rule::TensorName, "gap", "a name that does not follow the one before", &|t| {
        put32(t, second, 2)
    });
    add(Rule::TensorName, "empty", "a name of no bytes", &|t| put16(t, first + 4, 0));
    add(Rule::TensorName, "outside", "a name that ends after the names", &|t| {
        put16(t, second + 4, 3)
    });
    add(Rule::TensorName, "left-over", "a byte of the names that no tensor uses", &|t| {
        put16(t, second + 4, 1)
    });
    add(Rule::TensorName, "space", "a space in a name", &|t| t[names + 1] = b' ');
    add(Rule::TensorName, "control", "an escape character in a name", &|t| t[names] = 0x1b);
    add(Rule::TensorName, "utf-8", "a letter outside ASCII in a name", &|t| {
        t[names + 1] = 0xc3;
        t[names + 2] = 0xa9;
    });
    add(Rule::TensorName, "256", "a name of 256 bytes", &|t| {
        put16(t, second + 4, 256);
        put64(t, 8, 257);
        t.resize(names + 257, b'n');
    });
    add(Rule::TensorUnique, "twice", "two tensors of one name", &|t| {
        put16(t, second + 4, 1);
        put64(t, 8, 2);
        t.truncate(names + 1);
        t.push(b'a');
    });
    add(Rule::TensorReserved, "byte", "the reserved byte at 7", &|t| t[first + 7] = 1);
    add(Rule::TensorReserved, "word", "the reserved word at 12", &|t| t[first + 12] = 1);
    add(Rule::TensorReserved, "last", "the reserved word at 88", &|t| t[first + 95] = 1);
    add(Rule::TensorOffset, "start", "the first payload does not start at 0", &|t| {
        put64(t, first + 64, 64)
    });
    add(Rule::TensorOffset, "overlap", "two payloads at one place", &|t| put64(t, second + 64, 0));
    add(Rule::TensorOffset, "unaligned", "a payload that starts at 12", &|t| {
        put64(t, second + 64, 12)
    });
    add(Rule::TensorOffset, "beyond", "a payload that ends after DATA", &|t| {
        put64(t, second + 72, 9)
    });
    add(Rule::TensorOffset, "overflow", "offset + length is above 2^64", &|t| {
        put64(t, second + 72, u64::MAX)
    });
    let left_over = {
        let mut all = sections(&base);
        all[0].content.push(0);
        assemble(&all)
    };
    list.add(Rule::TensorOffset, "left-over", "a byte of DATA after the last payload", left_over);
    let mut add = |rule, name, about, change: &dyn Fn(&mut Vec<u8>)| {
        list.add(rule, name, about, with_table(&base, |t| change(t)));
    };
    add(Rule::EncodingParams, "dense", "a parameter of a dense tensor", &|t| t[first + 16] = 1);
    add(Rule::TensorLength, "f16-as-f32", "f16 payload, f32 encoding", &|t| {
        put32(t, second + 8, 1)
    });
    add(Rule::TensorLength, "shape", "a larger shape than the payload has", &|t| {
        put64(t, second + 32, 3)
    });
}

/// A file with one tensor.
pub(super) fn single(shape: [usize; 2], encoding: Encoding, payload: Vec<u8>) -> Vec<u8> {
    let shape = shape.iter().map(|d| *d as u64).collect();
    valid::file(&vec![("w".to_owned(), shape, encoding, payload)], &Meta::new())
}

pub(super) fn int_file(bits: u8, rows: usize, cols: usize) -> Vec<u8> {
    let spec = IntGroup::new(bits, 32).expect("valid parameters");
    let payload = content::int_group(&mut Rng(1), spec, rows, cols).pack();
    single([rows, cols], Encoding::IntGroup(spec), payload)
}

pub(super) fn stbllm_file(n: u8, rows: usize, cols: usize) -> Vec<u8> {
    let spec = Stbllm::new(n, 32).expect("valid parameters");
    let payload = content::stbllm(&mut Rng(2), spec, rows, cols).pack();
    single([rows, cols], Encoding::Stbllm(spec), payload)
}

pub(super) fn nm_file(n: u8, m: u8, rows: usize, cols: usize, bits: u8, factors: bool) -> Vec<u8> {
    let block = if bits == 0 { 0 } else { 32 };
    let spec = Nm::new(n, m, bits, block, factors).expect("valid parameters");
    let payload = content::nm(&mut Rng(3), spec, rows, cols).pack();
    single([rows, cols], Encoding::Nm(spec), payload)
}

pub(super) fn trellis_file(k: u8, v: u8, rows: usize, cols: usize, bits: u8) -> Vec<u8> {
    let block = if bits == 0 { 0 } else { 32 };
    let spec = Trellis::new(k, v, bits, block).expect("valid parameters");
    let payload = content::trellis(&mut Rng(6), spec, rows, cols).pack();
    single([rows, cols], Encoding::Trellis(spec), payload)
}

/// 2 bits per weight with column factors and without block scales.
pub(super) fn trellis_factors_file(rows: usize, cols: usize) -> Vec<u8> {
    let spec = Trellis::new(2, 1, 0, 0).expect("valid parameters").with_col_factors(true);
    let payload = content::trellis(&mut Rng(8), spec, rows, cols).pack();
    single([rows, cols], Encoding::Trellis(spec), payload)
}

/// Rows 0 and 2 of 3 with 8 bits, and all rows with 1 bit.
pub(super) fn mixed_file() -> Vec<u8> {
    let spec = |bits| IntGroup::new(bits, 32).expect("valid parameters");
    let spec = MixedRows::new(2, spec(8), CoarseRows::IntGroup(spec(1))).expect("valid parameters");
    let payload = content::mixed_rows(&mut Rng(4), spec, 3, 40).pack();
    single([3, 40], Encoding::MixedRows(spec), payload)
}

pub(super) fn encodings(list: &mut VectorList) {
    // Parameters start at byte 32 of the section: header 16, entry offset 16.
    let mut add = |name: &str, about, base: &[u8], at: usize, value: u8| {
        let bytes = with_table(base, |t| t[32 + at] = value);
        list.add(Rule::EncodingParams, name, about, bytes);
    };
    let int = int_file(4, 2, 40);
    add("int-bits", "integers of 5 bits", &int, 0, 5);
    add("int-group", "groups of 33 columns", &int, 2, 33);
    add("int-reserved", "a reserved byte of integer groups", &int, 15, 1);
    add("int-odd", "integers of 3 bits, which have id 17", &int, 0, 3);
    let odd = int_file(2, 2, 40);
    add("odd-bits-0", "odd integers of no bits", &odd, 0, 0);
    add("odd-bits-4", "odd integers of 4 bits", &odd, 0, 4);
    add("odd-group", "groups of 96 columns", &odd, 2, 96);
    add("odd-reserved", "a reserved byte of odd groups", &odd, 1, 1);
    let stbllm = stbllm_file(4, 2, 40);
    add("stbllm-n-0", "0 of 8", &stbllm, 0, 0);
    add("stbllm-n-9", "9 of 8", &stbllm, 0, 9);
    add("stbllm-block", "blocks of 33 columns", &stbllm, 2, 33);
    add("stbllm-block-0", "blocks of no columns", &stbllm, 2, 0);
    let nm = nm_file(1, 8, 2, 40, 4, false);
    add("nm-n", "3 of 8", &nm, 0, 3);
    add("nm-m", "1 of 16", &nm, 1, 16);
    add("nm-scale-bits", "scales of 5 bits", &nm, 2, 5);
    add("nm-flags", "a flag that has no meaning", &nm, 3, 2);
    add("nm-block", "scale bits without a block", &nm, 4, 0);
    let trellis = trellis_file(2, 1, 2, 40, 4);
    add("trellis-step-bits", "steps of 6 bits", &trellis, 0, 6);
    add("trellis-step-weights", "steps of 2 bits and 2 weights", &trellis, 1, 2);
    let pairs = trellis_file(3, 2, 2, 40, 4);
    add("trellis-pair", "steps of 4 bits and 2 weights", &pairs, 0, 4);
    add("trellis-block-33", "blocks of 33 columns", &pairs, 4, 33);
    add("trellis-padding", "a byte after the parameters", &pairs, 15, 1);
    add("trellis-scale-bits", "scales of 5 bits", &trellis, 2, 5);
    add("trellis-flags", "a flag that has no meaning", &trellis, 3, 2);
    add("trellis-block", "scale bits without a block", &trellis, 4, 0);
    let mixed = mixed_file();
    add("mixed-count", "no listed row", &mixed, 0, 0);
    add("mixed-listed-id", "listed rows of N:M signs", &mixed, 4, 48);
    add("mixed-all-id", "all rows of a dense encoding", &mixed, 5, 1);
    add("mixed-listed-bits", "listed rows with the bits of another encoding", &mixed, 6, 2);
    add("mixed-all-bits", "all rows with the bits of another encoding", &mixed, 10, 8);
    add("mixed-all-group", "groups of 33 columns", &mixed, 12, 33);
    add("mixed-reserved", "a reserved byte of the parameters of all rows", &mixed, 15, 1);
    let spec = IntGroup::new(8, 32).expect("valid parameters");
    let rows = Nm::new(1, 4, 4, 32, false).expect("valid parameters");
    let spec = MixedRows::new(1, spec, CoarseRows::Nm(rows)).expect("valid parameters");
    let payload = content::mixed_rows(&mut Rng(5), spec, 2, 40).pack();
    let factors = single([2, 40], Encoding::MixedRows(spec), payload);
    add("mixed-factors", "all rows with column factors", &factors, 13, 1);
    let spec = IntGroup::new(8, 32).expect("valid parameters");
    let rows = Trellis::new(2, 1, 0, 0).expect("valid parameters");
    let spec = MixedRows::new(1, spec, CoarseRows::Trellis(rows)).expect("valid parameters");
    let payload = content::mixed_rows(&mut Rng(9), spec, 2, 40).pack();
    let trellis = single([2, 40], Encoding::MixedRows(spec), payload);
    add("mixed-trellis-flags", "all rows with a flag that has no meaning", &trellis, 13, 2);
    let flat = with_table(&int, |t| {
        t[16 + 6] = 1;
        put64(t, 16 + 32, 80);
        put64(t, 16 + 40, 0);
    });
    list.add(Rule::EncodingShape, "int-vector", "integer groups of a vector", flat);
    let flat = with_table(&odd, |t| {
        t[16 + 6] = 1;
        put64(t, 16 + 32, 80);
        put64(t, 16 + 40, 0);
    });
    list.add(Rule::EncodingShape, "odd-vector", "odd groups of a vector", flat);
    let deep = with_table(&nm, |t| {
        t[16 + 6] = 3;
        put64(t, 16 + 48, 1);
    });
    list.add(Rule::EncodingShape, "nm-3-dims", "N:M codes of three dimensions", deep);
    let deep = with_table(&trellis, |t| {
        t[16 + 6] = 3;
        put64(t, 16 + 48, 1);
    });
    list.add(Rule::EncodingShape, "trellis-3-dims", "trellis codes of three dimensions", deep);
    let other = with_table(&int_file(2, 4, 40), |t| t[32] = 3);
    list.add(Rule::TensorLength, "odd-3-bits", "payload of 2 bits, parameters of 3", other);
    let deep = with_table(&mixed, |t| {
        t[16 + 6] = 3;
        put64(t, 16 + 48, 1);
    });
    list.add(Rule::EncodingShape, "mixed-3-dims", "mixed rows of three dimensions", deep);
    let fewer = with_table(&mixed, |t| t[32] = 4);
    list.add(Rule::EncodingShape, "mixed-count", "4 listed rows of 3", fewer);
    let other = with_table(&mixed, |t| t[32] = 1);
    list.add(Rule::TensorLength, "mixed-count", "payload of 2 listed rows, parameters of 1", other);
    let other = with_table(&nm, |t| t[32] = 2);
    list.add(Rule::TensorLength, "nm-2of8", "payload of 1:8, parameters of 2:8", other);
}
