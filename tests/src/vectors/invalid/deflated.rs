//! Deflated texts.

use stb_format::Rule;

use crate::vectors::patch::*;
use crate::vectors::valid;
use crate::vectors::vector::VectorList;

/// A stream, with the length it states and what is wrong with it.
type Case = (&'static str, &'static str, u64, Vec<u8>);

pub(super) fn texts(list: &mut VectorList) {
    let base = valid::smallest();
    let mut add = |rule, name, about, section: Vec<u8>| {
        list.add(rule, name, about, with_meta_2(&base, &section))
    };
    let one = |value: &[u8]| meta(1, &[entry(b"k", 6, value)]);
    add(Rule::MetaType, "type-7", "value type 7, for readers from version 2", {
        meta(1, &[entry(b"k", 7, &deflated(1, FIXED_A))])
    });
    add(Rule::MetaValue, "deflated-7", "a deflated text of 7 bytes", one(&[0; 7]));
    let mut reserved = entry(b"k", 6, &deflated(1, FIXED_A));
    reserved[3] = 1;
    add(
        Rule::MetaValue,
        "deflated-reserved",
        "the reserved byte of a deflated text",
        meta(1, &[reserved]),
    );
    add(
        Rule::MetaLimits,
        "deflated-long",
        "a deflated text one byte above the limit, stated only",
        one(&deflated((1 << 28) + 1, FIXED_A)),
    );
    add(
        Rule::MetaLimits,
        "deflated-sum",
        "two deflated texts above the limit together, the second stated only",
        meta(
            2,
            &[entry(b"a", 6, &deflated(1, FIXED_A)), entry(b"b", 6, &deflated(1 << 28, FIXED_A))],
        ),
    );
    add(
        Rule::MetaLimits,
        "deflated-overflow",
        "two deflated texts with a sum of 2^64",
        meta(
            2,
            &[entry(b"a", 6, &deflated(1, FIXED_A)), entry(b"b", 6, &deflated(u64::MAX, FIXED_A))],
        ),
    );
    for (name, about, length, stream) in lengths().into_iter().chain(damaged()) {
        add(Rule::MetaDeflate, name, about, one(&deflated(length, &stream)));
    }
}

/// Streams that do not give what is stated.
fn lengths() -> Vec<Case> {
    let stored = |bytes: &[u8]| {
        let n = bytes.len() as u8;
        [&[1, n, 0, !n, 0xff], bytes].concat()
    };
    let fixed = FIXED_A.to_vec();
    vec![
        ("shorter", "a text with a byte less than stated", 2, fixed.clone()),
        ("longer", "a text with a byte more than stated", 0, fixed.clone()),
        ("too-long", "more than a stream of this size can stand for", 3 * 1032 + 1, fixed.clone()),
        ("empty", "no stream", 0, vec![]),
        ("cut", "a stream without its last byte", 1, fixed[..2].to_vec()),
        ("left-over", "a byte after the stream", 1, [fixed.clone(), vec![0]].concat()),
        ("twice", "a second stream after the first", 2, [fixed.clone(), fixed].concat()),
        ("not-last", "no block is the last one", 1, vec![0, 1, 0, 0xfe, 0xff, b'a']),
        ("utf-8", "a text that is not UTF-8", 2, stored(&[0x61, 0xff])),
        ("surrogate", "a text with an encoded surrogate", 3, stored(&[0xed, 0xa0, 0x80])),
    ]
}

/// Streams that RFC 1951 does not allow.
fn damaged() -> Vec<Case> {
    let hex = |text: &str| -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal digits");
        (0..text.len()).step_by(2).map(byte).collect()
    };
    let zlib = [&[0x78, 0x9c], FIXED_A, &[0, 0x62, 0, 0x62]].concat();
    vec![
        ("zlib", "a stream with header and checksum of zlib", 1, zlib),
        ("block-type", "a block of type 3", 0, vec![7]),
        ("stored", "a stored block whose lengths disagree", 1, vec![1, 1, 0, 0xff, 0xff, b'a']),
        ("before-start", "a distance that reaches before the text", 3, vec![0x03, 0x02, 0]),
        ("length-286", "a length symbol that has no meaning", 4, hex("4b1c0300")),
        ("distance-30", "a distance symbol that has no meaning", 4, hex("4b043e00")),
        (
            "287-codes",
            "287 codes of literals and lengths",
            1,
            hex("f5e0010500000000206cedff89a608"),
        ),
        ("31-codes", "31 codes of distances", 1, hex("05fe010500000000206cedff89a608")),
        (
            "incomplete-lengths",
            "an incomplete code of code lengths",
            1,
            hex("05e00109000000002064b57f0915"),
        ),
        ("incomplete", "an incomplete code of literals", 1, hex("05e0010500000080006cadff2342")),
        (
            "incomplete-end",
            "one code of two bits, that of the end",
            0,
            hex("05e001050000008000fc7f1d00"),
        ),
        (
            "incomplete-distance",
            "one distance code of two bits",
            4,
            hex("0de0010500000080006cadff232a26"),
        ),
        (
            "unused-distance",
            "the unused one of two distance codes of one bit",
            4,
            hex("0de0010900000080206cadff234a1e"),
        ),
        (
            "no-distances",
            "a match in a block without distance codes",
            4,
            hex("0de0010500000080006cadff230a0b"),
        ),
        ("too-many", "more codes than their lengths allow", 1, hex("05e0010500000000206cedff2302")),
        (
            "repeat",
            "a code length that repeats the one before the first",
            0,
            hex("05e083000000000000000000000000000000000000000000"),
        ),
    ]
}
