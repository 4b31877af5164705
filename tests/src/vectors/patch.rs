//! Changes fields of valid files and corrects their checksums.

use stb_format::checksum;

pub(super) fn get32(b: &[u8], at: usize) -> usize {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("4 bytes")) as usize
}

pub(super) fn get64(b: &[u8], at: usize) -> usize {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("8 bytes")) as usize
}

pub(super) fn put16(b: &mut [u8], at: usize, v: u16) {
    b[at..at + 2].copy_from_slice(&v.to_le_bytes());
}

pub(super) fn put32(b: &mut [u8], at: usize, v: u32) {
    b[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

pub(super) fn put64(b: &mut [u8], at: usize, v: u64) {
    b[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// Where directory entry `i` starts.
pub(super) fn directory(i: usize) -> usize {
    64 + 48 * i
}

/// The directory entry of the section of type `kind`.
pub(super) fn entry_of(b: &[u8], kind: usize) -> usize {
    (0..get32(b, 24)).map(directory).find(|at| get32(b, *at) == kind).expect("a known section")
}

/// First byte and length of the section of type `kind`.
pub(super) fn section(b: &[u8], kind: usize) -> (usize, usize) {
    let at = entry_of(b, kind);
    (get64(b, at + 8), get64(b, at + 16))
}

/// Where tensor entry `i` starts.
pub(super) fn tensor(b: &[u8], i: usize) -> usize {
    section(b, 2).0 + 16 + 96 * i
}

/// First byte and length of the payload of tensor `i`, in the file.
pub(super) fn payload(b: &[u8], i: usize) -> (usize, usize) {
    let at = tensor(b, i);
    (section(b, 1).0 + get64(b, at + 64), get64(b, at + 72))
}

/// Corrects the checksums of sections and head, as far as the directory is valid.
pub(super) fn seal(b: &mut [u8]) {
    for i in 0..get32(b, 24).min(83) {
        let at = directory(i);
        let (kind, start, length) = (get32(b, at), get64(b, at + 8), get64(b, at + 16));
        let content = start.checked_add(length).and_then(|end| b.get(start..end));
        if let (true, Some(content)) = (kind != 1, content) {
            let sum = checksum(content);
            put64(b, at + 24, sum);
        }
    }
    seal_head(b);
}

pub(super) fn seal_head(b: &mut [u8]) {
    let sum = checksum(&b[..4088]);
    put64(b, 4088, sum);
}

/// Corrects the checksum of tensor `i`. Call [`seal`] afterwards.
pub(super) fn seal_tensor(b: &mut [u8], i: usize) {
    let (start, length) = payload(b, i);
    let (sum, at) = (checksum(&b[start..start + length]), tensor(b, i));
    put64(b, at + 80, sum);
}

/// A changed copy with right checksums of sections and head.
pub(super) fn edit(base: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut b = base.to_vec();
    change(&mut b);
    seal(&mut b);
    b
}

/// A copy with a changed payload of tensor `i` and right checksums everywhere.
pub(super) fn edit_payload(base: &[u8], i: usize, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut b = base.to_vec();
    let (start, length) = payload(&b, i);
    change(&mut b[start..start + length]);
    seal_tensor(&mut b, i);
    seal(&mut b);
    b
}

/// A section with its directory fields.
#[derive(Clone)]
pub(super) struct Section {
    pub kind: u32,
    pub flags: u32,
    pub content: Vec<u8>,
}

pub(super) fn sections(b: &[u8]) -> Vec<Section> {
    let one = |i| {
        let at = directory(i);
        let (start, length) = (get64(b, at + 8), get64(b, at + 16));
        let (kind, flags) = (get32(b, at) as u32, get32(b, at + 4) as u32);
        Section { kind, flags, content: b[start..start + length].to_vec() }
    };
    (0..get32(b, 24)).map(one).collect()
}

/// A file of these sections.
pub(super) fn assemble(sections: &[Section]) -> Vec<u8> {
    let mut b = vec![0; 4096];
    b[..8].copy_from_slice(&stb_format::MAGIC);
    put16(&mut b, 8, 1);
    put16(&mut b, 10, 1);
    put32(&mut b, 12, 64);
    put32(&mut b, 24, sections.len() as u32);
    put32(&mut b, 28, 48);
    for (i, s) in sections.iter().enumerate() {
        let start = b.len().next_multiple_of(4096);
        b.resize(start, 0);
        b.extend(&s.content);
        let at = directory(i);
        put32(&mut b, at, s.kind);
        put32(&mut b, at + 4, s.flags);
        put64(&mut b, at + 8, start as u64);
        put64(&mut b, at + 16, s.content.len() as u64);
    }
    let length = b.len() as u64;
    put64(&mut b, 16, length);
    seal(&mut b);
    b
}

/// One more section after DATA.
pub(super) fn with_section(base: &[u8], kind: u32, flags: u32) -> Vec<u8> {
    let mut all = sections(base);
    all.insert(1, Section { kind, flags, content: b"private".to_vec() });
    assemble(&all)
}

/// Empty private sections up to `count` sections in all.
pub(super) fn with_many_sections(base: &[u8], count: usize) -> Vec<u8> {
    let mut all = sections(base);
    while all.len() < count {
        let kind = 0x9000_0000 + all.len() as u32;
        all.insert(1, Section { kind, flags: 0, content: Vec::new() });
    }
    assemble(&all)
}

pub(super) fn reordered(base: &[u8], order: [usize; 3]) -> Vec<u8> {
    let all = sections(base);
    assemble(&order.map(|i| all[i].clone()))
}

/// A copy with another META section.
pub(super) fn with_meta(base: &[u8], meta: &[u8]) -> Vec<u8> {
    let mut all = sections(base);
    for s in all.iter_mut().filter(|s| s.kind == 3) {
        s.content = meta.to_vec();
    }
    assemble(&all)
}

/// A copy with another TENSORS section.
pub(super) fn with_table(base: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut all = sections(base);
    let table = all.iter_mut().find(|s| s.kind == 2).expect("a table");
    change(&mut table.content);
    assemble(&all)
}

/// A metadata entry.
pub(super) fn entry(key: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    let mut b = Vec::new();
    b.extend((key.len() as u16).to_le_bytes());
    b.extend([kind, 0]);
    b.extend((value.len() as u32).to_le_bytes());
    b.extend(key);
    b.extend(value);
    b
}

/// The value of a deflated text: the stated length, then the stream.
pub(super) fn deflated(length: u64, stream: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), stream].concat()
}

/// The text "a" as a block of fixed codes.
pub(super) const FIXED_A: &[u8] = &[0x4b, 0x04, 0x00];

/// A copy with another META section, for readers from version 2.
pub(super) fn with_meta_2(base: &[u8], meta: &[u8]) -> Vec<u8> {
    edit(&with_meta(base, meta), |b| {
        put16(b, 8, 2);
        put16(b, 10, 2);
    })
}

/// A META section of `entries` that states `count` of them.
pub(super) fn meta(count: u32, entries: &[Vec<u8>]) -> Vec<u8> {
    let mut b = count.to_le_bytes().to_vec();
    b.extend([0; 4]);
    b.extend(entries.concat());
    b
}
