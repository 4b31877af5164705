//! Files that every reader refuses, each because of one rule.

use stb_format::encoding::{Dense, Encoding, IntGroup, Nm, Stbllm};
use stb_format::{Meta, Rule, Value};

use super::patch::*;
use super::{Vector, content, valid};
use crate::random::Rng;

/// The collection while it grows.
struct List(Vec<Vector>);

impl List {
    fn add(&mut self, rule: Rule, name: &str, about: &'static str, bytes: Vec<u8>) {
        let name = format!("{}-{name}.stb", rule.id().trim_start_matches("STB-"));
        self.0.push(Vector { name, about, bytes, rule: Some(rule) });
    }
}

/// All invalid vectors in the order of the rules.
#[must_use]
pub fn invalid() -> Vec<Vector> {
    let mut list = List(Vec::new());
    head(&mut list);
    section_rules(&mut list);
    metadata(&mut list);
    table(&mut list);
    encodings(&mut list);
    payloads(&mut list);
    models(&mut list);
    list.0
}

fn head(list: &mut List) {
    let base = valid::smallest();
    let mut add = |rule, name, about, bytes| list.add(rule, name, about, bytes);
    add(Rule::HeadLength, "empty", "no byte at all", vec![]);
    add(Rule::HeadLength, "short", "one byte less than a head", base[..4095].to_vec());
    add(
        Rule::Magic,
        "zip",
        "a file of another kind",
        edit(&base, |b| b[..4].copy_from_slice(b"PK\x03\x04")),
    );
    add(
        Rule::Magic,
        "line-ends",
        "CR LF turned into LF on the way",
        edit(&base, |b| b[4..8].copy_from_slice(b"\n\x1a\n\n")),
    );
    add(
        Rule::MinReader,
        "version-2",
        "only for readers of version 2",
        edit(&base, |b| {
            put16(b, 8, 2);
            put16(b, 10, 2);
        }),
    );
    let mut flipped = base.clone();
    flipped[16] ^= 1;
    add(Rule::HeadChecksum, "bit", "one bit of the file size has flipped", flipped);
    add(Rule::HeadFields, "header-size", "a header of 80 bytes", edit(&base, |b| put32(b, 12, 80)));
    add(
        Rule::HeadFields,
        "entry-size",
        "directory entries of 64 bytes",
        edit(&base, |b| put32(b, 28, 64)),
    );
    add(
        Rule::HeadFields,
        "min-reader-0",
        "readable from version 0",
        edit(&base, |b| put16(b, 8, 0)),
    );
    add(
        Rule::HeadFields,
        "written-0",
        "written by a version below min_reader",
        edit(&base, |b| put16(b, 10, 0)),
    );
    add(Rule::HeadReserved, "flags", "a flag that has no meaning", edit(&base, |b| b[39] = 1));
    add(Rule::HeadReserved, "reserved", "a reserved byte", edit(&base, |b| b[63] = 1));
    add(Rule::HeadReserved, "padding", "a byte after the directory", edit(&base, |b| b[4087] = 1));
    add(
        Rule::SectionCount,
        "none",
        "no section",
        edit(&base, |b| {
            put32(b, 24, 0);
            b[64..4088].fill(0);
        }),
    );
    add(Rule::SectionCount, "65", "one section too many", with_many_sections(&base, 65));
    add(
        Rule::SectionCount,
        "huge",
        "as many sections as the field can say",
        edit(&base, |b| {
            put32(b, 24, u32::MAX);
            b[64..4088].fill(0);
        }),
    );
    add(Rule::FileSize, "cut", "the last byte is missing", base[..base.len() - 1].to_vec());
    let mut longer = base.clone();
    longer.push(0);
    add(Rule::FileSize, "longer", "a byte after the end", longer);
}

fn section_rules(list: &mut List) {
    let base = valid::smallest();
    let mut add = |rule, name, about, bytes| list.add(rule, name, about, bytes);
    add(
        Rule::SectionFields,
        "type-0",
        "a section of type 0",
        edit(&base, |b| put32(b, directory(1), 0)),
    );
    add(
        Rule::SectionFields,
        "flag",
        "a section flag that has no meaning",
        edit(&base, |b| put32(b, directory(1) + 4, 3)),
    );
    add(
        Rule::SectionFields,
        "reserved",
        "a reserved byte of a directory entry",
        edit(&base, |b| b[directory(1) + 47] = 1),
    );
    add(
        Rule::SectionOffset,
        "overlap",
        "two sections at the same place",
        edit(&base, |b| put64(b, directory(1) + 8, 4096)),
    );
    add(
        Rule::SectionOffset,
        "hole",
        "4096 bytes that belong to no section",
        edit(&base, |b| {
            b.splice(8192..8192, [0; 4096]);
            for i in 1..3 {
                let at = get64(b, directory(i) + 8) as u64;
                put64(b, directory(i) + 8, at + 4096);
            }
            let length = b.len() as u64;
            put64(b, 16, length);
        }),
    );
    add(
        Rule::SectionOffset,
        "unaligned",
        "a section that starts at 4104",
        edit(&base, |b| put64(b, directory(0) + 8, 4104)),
    );
    add(
        Rule::SectionBounds,
        "beyond",
        "the last section ends one byte after the file",
        edit(&base, |b| {
            let length = get64(b, directory(2) + 16) as u64;
            put64(b, directory(2) + 16, length + 1);
        }),
    );
    add(
        Rule::SectionBounds,
        "overflow",
        "offset + length is above 2^64",
        edit(&base, |b| put64(b, directory(0) + 16, u64::MAX)),
    );
    add(
        Rule::SectionBounds,
        "early",
        "the file goes on after the last section",
        edit(&base, |b| {
            b.push(0);
            let length = b.len() as u64;
            put64(b, 16, length);
        }),
    );
    let mut twice = sections(&base);
    twice.push(twice[2].clone());
    add(Rule::SectionSet, "two-meta", "META twice", assemble(&twice));
    add(Rule::SectionSet, "no-meta", "no META", assemble(&sections(&base)[..2]));
    add(Rule::SectionSet, "no-data", "no DATA", assemble(&sections(&base)[1..]));
    add(
        Rule::SectionCritical,
        "unknown",
        "a critical section of a private type",
        with_section(&base, 0x8000_0003, 1),
    );
    add(Rule::SectionPadding, "first", "a byte after DATA", edit(&base, |b| b[4100] = 1));
    add(
        Rule::SectionPadding,
        "last",
        "the byte before META",
        edit(&base, |b| {
            let (start, _) = section(b, 3);
            b[start - 1] = 0xff;
        }),
    );
    let mut damaged = base.clone();
    let (start, _) = section(&base, 2);
    damaged[start + 16 + 32] = 2;
    add(Rule::SectionChecksum, "tensors", "a changed byte in TENSORS", damaged);
    let mut stated = base.clone();
    put64(&mut stated, entry_of(&base, 1) + 24, 1);
    seal_head(&mut stated);
    add(Rule::SectionChecksum, "data", "a checksum for DATA", stated);
    let mut private = with_section(&base, 0x8000_0004, 0);
    let at = entry_of(&private, 0x8000_0004);
    let start = get64(&private, at + 8);
    private[start] ^= 0x20;
    add(Rule::SectionChecksum, "private", "a changed byte in a section of unknown type", private);
}

fn metadata(list: &mut List) {
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
    add(Rule::MetaType, "type-6", "value type 6", meta(1, &[entry(b"k", 6, &[])]));
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
fn pair() -> Vec<u8> {
    let tensors = vec![
        ("a".to_owned(), vec![3], Encoding::Dense(Dense::F32), Dense::F32.encode(&[1.0, 2.0, 3.0])),
        ("bc".to_owned(), vec![2, 2], Encoding::Dense(Dense::F16), Dense::F16.encode(&[1.0; 4])),
    ];
    valid::file(&tensors, &Meta::new())
}

fn table(list: &mut List) {
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
fn single(shape: [usize; 2], encoding: Encoding, payload: Vec<u8>) -> Vec<u8> {
    let shape = shape.iter().map(|d| *d as u64).collect();
    valid::file(&vec![("w".to_owned(), shape, encoding, payload)], &Meta::new())
}

fn int_file(bits: u8, rows: usize, cols: usize) -> Vec<u8> {
    let spec = IntGroup::new(bits, 32).expect("valid parameters");
    let payload = content::int_group(&mut Rng(1), spec, rows, cols).pack();
    single([rows, cols], Encoding::IntGroup(spec), payload)
}

fn stbllm_file(n: u8, rows: usize, cols: usize) -> Vec<u8> {
    let spec = Stbllm::new(n, 32).expect("valid parameters");
    let payload = content::stbllm(&mut Rng(2), spec, rows, cols).pack();
    single([rows, cols], Encoding::Stbllm(spec), payload)
}

fn nm_file(n: u8, m: u8, rows: usize, cols: usize, bits: u8, factors: bool) -> Vec<u8> {
    let block = if bits == 0 { 0 } else { 32 };
    let spec = Nm::new(n, m, bits, block, factors).expect("valid parameters");
    let payload = content::nm(&mut Rng(3), spec, rows, cols).pack();
    single([rows, cols], Encoding::Nm(spec), payload)
}

fn encodings(list: &mut List) {
    // Parameters start at byte 32 of the section: header 16, entry offset 16.
    let mut add = |name: &str, about, base: &[u8], at: usize, value: u8| {
        let bytes = with_table(base, |t| t[32 + at] = value);
        list.add(Rule::EncodingParams, name, about, bytes);
    };
    let int = int_file(4, 2, 40);
    add("int-bits", "integers of 5 bits", &int, 0, 5);
    add("int-group", "groups of 33 columns", &int, 2, 33);
    add("int-reserved", "a reserved byte of integer groups", &int, 15, 1);
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
    let flat = with_table(&int, |t| {
        t[16 + 6] = 1;
        put64(t, 16 + 32, 80);
        put64(t, 16 + 40, 0);
    });
    list.add(Rule::EncodingShape, "int-vector", "integer groups of a vector", flat);
    let deep = with_table(&nm, |t| {
        t[16 + 6] = 3;
        put64(t, 16 + 48, 1);
    });
    list.add(Rule::EncodingShape, "nm-3-dims", "joint codes of three dimensions", deep);
    let other = with_table(&nm, |t| t[32] = 2);
    list.add(Rule::TensorLength, "nm-2of8", "payload of 1:8, parameters of 2:8", other);
}

fn payloads(list: &mut List) {
    let base = pair();
    let mut gap = base.clone();
    let (start, length) = payload(&base, 0);
    gap[start + length] = 1;
    list.add(Rule::TensorPadding, "gap", "a byte between two payloads", gap);
    let mut damaged = base.clone();
    let (start, _) = payload(&base, 1);
    damaged[start] ^= 1;
    list.add(Rule::TensorChecksum, "bit", "one bit of a payload has flipped", damaged);

    let mut edit = |rule, name: &str, about, base: &[u8], change: &dyn Fn(&mut [u8])| {
        list.add(rule, name, about, edit_payload(base, 0, |p| change(p)));
    };
    let padding = Rule::PayloadPadding;
    // 4 bits, 2 x 40: rows of 32 bytes; column 40 is in byte 16 + 8 of a row.
    let int4 = int_file(4, 2, 40);
    edit(padding, "int4-column", "a nibble of a column that does not exist", &int4, &|p| {
        p[24] |= 1
    });
    let int8 = int_file(8, 1, 40);
    edit(padding, "int8-column", "a code of a column that does not exist", &int8, &|p| p[63] = 1);
    let odd = int_file(8, 1, 96);
    edit(padding, "int8-segment", "a byte between codes and scales", &odd, &|p| p[96] = 1);
    // 1 x 21: one unit; segments at 0, 64, 128, 192.
    let stbllm = stbllm_file(4, 1, 21);
    edit(padding, "stbllm-salient", "a salient column that does not exist", &stbllm, &|p| {
        p[2] |= 0x20
    });
    edit(padding, "stbllm-state", "a state of a column that does not exist", &stbllm, &|p| {
        p[64 + 7] |= 1
    });
    edit(
        padding,
        "stbllm-both",
        "a salient state 3 of a column that does not exist",
        &stbllm,
        &|p| {
            p[2] |= 0x20;
            p[64 + 2] |= 0x20;
            p[72 + 2] |= 0x20;
        },
    );
    edit(padding, "stbllm-sign", "a sign of a weight that does not exist", &stbllm, &|p| {
        p[128 + 3] |= 0x80
    });
    // 17 x 40, 1:8: 5 groups, 2 quads, 1 vector per tile; row scales at 0, codes at 64.
    let nm = nm_file(1, 8, 17, 40, 0, false);
    edit(padding, "nm-row", "a code of a row that does not exist", &nm, &|p| p[64 + 64 + 1] |= 1);
    edit(padding, "nm-group", "a code of a group that does not exist", &nm, &|p| {
        p[64 + 16] |= 0x10
    });
    let scaled = nm_file(1, 8, 1, 40, 4, false);
    edit(padding, "nm-scale", "a scale of a row that does not exist", &scaled, &|p| p[64] |= 0x10);

    let finite = Rule::PayloadFinite;
    let nan = f32::NAN.to_le_bytes();
    edit(finite, "f32-nan", "a weight that is no number", &base, &|p| {
        p[4..8].copy_from_slice(&nan)
    });
    let f16 = single([1, 2], Encoding::Dense(Dense::F16), vec![0; 4]);
    edit(finite, "f16-infinite", "an infinite weight", &f16, &|p| {
        p[2..4].copy_from_slice(&[0x00, 0x7c])
    });
    let bf16 = single([1, 2], Encoding::Dense(Dense::Bf16), vec![0; 4]);
    edit(finite, "bf16-infinite", "an infinite weight", &bf16, &|p| {
        p[2..4].copy_from_slice(&[0x80, 0xff])
    });
    let infinite = |p: &mut [u8]| {
        let end = p.len();
        p[end - 1] = 0x7c;
        p[end - 2] = 0;
    };
    edit(finite, "int-scale", "an infinite scale", &int4, &infinite);
    edit(finite, "stbllm-scale", "an infinite scale", &stbllm, &infinite);
    edit(finite, "nm-row-scale", "a row scale that is no number", &nm, &|p| {
        p[..2].copy_from_slice(&[1, 0x7e])
    });
    let factors = nm_file(1, 4, 1, 8, 0, true);
    edit(finite, "nm-factor", "an infinite column factor", &factors, &|p| {
        p[..2].copy_from_slice(&[0, 0xfc])
    });

    // One weight more: the first group of the low plane becomes full.
    let count = Rule::StbllmCount;
    edit(count, "more", "eight weights kept where four may be", &stbllm, &|p| p[64] = 0xff);
    edit(count, "fewer", "a group without weights", &stbllm, &|p| {
        p[64 + 1] = 0;
        p[64 + 9] = 0;
    });
    edit(
        count,
        "last-group",
        "five of five weights kept in a last group of 5 columns",
        &stbllm,
        &|p| p[64 + 2] = 0x1f,
    );
    edit(
        Rule::StbllmState,
        "state-3",
        "a weight of a salient column in the sparse region",
        &stbllm,
        &|p| {
            // Makes the first kept weight's column salient and its state 3.
            let kept = p[64] | p[72];
            let lowest = kept & kept.wrapping_neg();
            p[64] |= lowest;
            p[72] |= lowest;
            p[0] |= lowest;
        },
    );
}

fn models(list: &mut List) {
    let (tensors, meta, _) = valid::model();
    let mut with = |rule, name: &str, about, changes: &[(&str, Option<Value>)]| {
        let mut changed = Meta::new();
        let section = stb_format::File::open(&valid::file(&tensors, &meta)).map(|f| {
            f.meta().iter().map(|(k, v)| (k.to_owned(), v.to_value())).collect::<Vec<_>>()
        });
        for (key, value) in section.expect("a valid model") {
            match changes.iter().find(|(k, _)| *k == key) {
                Some((_, Some(value))) => changed.set(&key, value.clone()),
                Some((_, None)) => Ok(()),
                None => changed.set(&key, value),
            }
            .expect("a valid entry");
        }
        list.add(rule, name, about, valid::file(&tensors, &changed));
    };
    let text = |t: &str| Some(Value::Text(t.to_owned()));
    let number = |n| Some(Value::U64(n));
    with(Rule::ModelKey, "missing", "no hidden size", &[("model.hidden_size", None)]);
    with(Rule::ModelKey, "type", "a number where a text belongs", &[("model.norm", number(1))]);
    with(
        Rule::ModelKey,
        "scaling",
        "llama3 scaling without its factor",
        &[("model.rope.factor", None)],
    );
    with(Rule::ModelKey, "tokenizer", "no tokenizer", &[("tokenizer.json", None)]);
    with(
        Rule::ModelKey,
        "bos",
        "a begin token is asked for and not named",
        &[("tokenizer.bos_id", None)],
    );
    with(Rule::ModelKey, "parameters", "no parameter count", &[("model.parameters", None)]);
    let unknown = Rule::ModelArchitecture;
    with(
        unknown,
        "architecture",
        "an architecture of the future",
        &[("model.architecture", text("zebra"))],
    );
    with(unknown, "activation", "an unknown activation", &[("model.activation", text("relu3"))]);
    with(unknown, "pairing", "an unknown pairing", &[("model.rope.pairing", text("thirds"))]);
    with(unknown, "scaling", "an unknown rotary scaling", &[("model.rope.scaling", text("yarn"))]);
    let value = Rule::ModelValue;
    with(value, "zero", "no layers", &[("model.layers", number(0))]);
    with(value, "huge", "2^60 layers", &[("model.layers", number(1 << 60))]);
    with(value, "heads", "3 key heads for 4 heads", &[("model.kv_heads", number(3))]);
    with(value, "odd", "heads of width 7", &[("model.head_dim", number(7))]);
    with(value, "epsilon", "a negative epsilon", &[("model.norm_eps", Some(Value::F64(-1.0)))]);
    with(
        value,
        "range",
        "an empty llama3 range",
        &[("model.rope.high_freq_factor", Some(Value::F64(1.0)))],
    );
    with(
        value,
        "eos",
        "an end token outside the vocabulary",
        &[("tokenizer.eos_ids", Some(Value::U64List(vec![1, 40])))],
    );
    with(value, "bos", "a begin token outside the vocabulary", &[("tokenizer.bos_id", number(40))]);
    let wrong = Rule::ModelTensor;
    with(
        wrong,
        "shape",
        "an intermediate size that the tensors do not have",
        &[("model.intermediate_size", number(56))],
    );
    with(wrong, "missing", "three layers stated, two there", &[("model.layers", number(3))]);
    with(wrong, "extra", "one layer stated, two there", &[("model.layers", number(1))]);
    with(
        wrong,
        "head",
        "embeddings not tied, but no head",
        &[("model.tied_embeddings", Some(Value::Bool(false)))],
    );
    with(
        Rule::ModelParameters,
        "count",
        "one parameter more than there are",
        &[("model.parameters", number(1))],
    );
}
