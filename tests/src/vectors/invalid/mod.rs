//! Files that every reader must refuse, each because of one rule.

mod decoders;
mod deflated;
mod order;
mod payloads;
mod tables;

use stb_format::Rule;

use super::patch::*;
use super::valid;
use super::vector::{Vector, VectorList};

/// All invalid vectors in the order of the rules.
#[must_use]
pub fn invalid() -> Vec<Vector> {
    let mut list = VectorList(Vec::new());
    head(&mut list);
    section_rules(&mut list);
    tables::metadata(&mut list);
    deflated::texts(&mut list);
    tables::table(&mut list);
    tables::encodings(&mut list);
    payloads::payloads(&mut list);
    payloads::models(&mut list);
    order::combinations(&mut list);
    decoders::decoders(&mut list);
    list.0
}

fn head(list: &mut VectorList) {
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
        "version-3",
        "only for readers of version 3",
        edit(&base, |b| {
            put16(b, 8, 3);
            put16(b, 10, 3);
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

fn section_rules(list: &mut VectorList) {
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
