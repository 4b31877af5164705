//! Fuzzes the META section of an otherwise valid file, for readers from version 1 and from version 2, which may
//! have deflated texts. The result must be an error, or entries that are written back as the same bytes, with
//! version 2 as the same values.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use stb_format::encoding::{Dense, Encoding};
use stb_format::{File, Meta, ModelSpec, Writer, checksum};

fuzz_target!(|data: &[u8]| {
    check(data, 1);
    check(data, 2);
});

fn check(data: &[u8], version: u8) {
    let mut bytes = write(&Meta::new());
    bytes[8] = version;
    // META is the last section and starts at 12288.
    bytes.truncate(12288);
    bytes.extend_from_slice(data);
    seal(&mut bytes, data);
    let Ok(file) = File::open(&bytes) else { return };
    let _ = ModelSpec::from_file(&file);
    let mut meta = Meta::new();
    for (key, value) in file.meta().iter() {
        assert_eq!(file.meta().get(key), Some(value));
        meta.set(key, value.to_value()).expect("metadata that was read can be written");
    }
    let plain = write(&meta);
    assert!(version > 1 || plain == bytes, "the metadata is not canonical");
    meta.deflate_texts();
    for bytes in [plain, write(&meta)] {
        let read = File::open(&bytes).expect("metadata that was written can be read");
        assert!(read.meta().iter().eq(file.meta().iter()), "the metadata changed");
    }
}

fn write(meta: &Meta) -> Vec<u8> {
    let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
    let dense = Encoding::Dense(Dense::F32);
    writer.tensor("w", &[1], &dense, &Dense::F32.encode(&[1.0])).unwrap();
    writer.finish(meta).unwrap().into_inner()
}

/// Sets file size, and length and checksum of META, and the checksum of the head.
fn seal(b: &mut [u8], meta: &[u8]) {
    let (length, meta_length) = (b.len() as u64, meta.len() as u64);
    b[16..24].copy_from_slice(&length.to_le_bytes());
    let at = 64 + 48 * 2;
    b[at + 16..at + 24].copy_from_slice(&meta_length.to_le_bytes());
    b[at + 24..at + 32].copy_from_slice(&checksum(meta).to_le_bytes());
    let sum = checksum(&b[..4088]);
    b[4088..4096].copy_from_slice(&sum.to_le_bytes());
}
