//! Fuzzes whole files. The result must be an error, or a file whose weights can be decoded. Inputs are
//! also tried with corrected sizes and checksums, so that mutations get past these checks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_format::{File, ModelSpec, checksum};

fuzz_target!(|data: &[u8]| {
    check(data);
    if data.len() >= 4096 {
        let mut sealed = data.to_vec();
        seal(&mut sealed);
        check(&sealed);
    }
});

/// Opens and decodes `bytes`.
fn check(bytes: &[u8]) {
    let Ok(file) = File::open(bytes) else { return };
    let _ = ModelSpec::from_file(&file);
    let verified = file.verify().is_ok();
    for tensor in file.tensors() {
        // Payloads are inside the file.
        assert!(tensor.payload().len() <= bytes.len());
        if let Ok(view) = tensor.view() {
            let mut row = vec![0.0; view.cols()];
            for r in (0..view.rows()).take(64) {
                view.decode_row(r, &mut row);
                assert!(!verified || row.iter().all(|w| w.is_finite()));
            }
        }
    }
}

/// Corrects file size, section checksums and head checksum.
fn seal(b: &mut [u8]) {
    let length = b.len() as u64;
    b[16..24].copy_from_slice(&length.to_le_bytes());
    let count = u32::from_le_bytes(b[24..28].try_into().unwrap()).min(64) as usize;
    for i in 0..count {
        let at = 64 + 48 * i;
        let word = |o: usize| u64::from_le_bytes(b[at + o..at + o + 8].try_into().unwrap());
        let (kind, start, len) = (b[at], word(8), word(16));
        let Some(end) = start.checked_add(len) else { continue };
        if kind != 1 && end <= length {
            let sum = checksum(&b[start as usize..end as usize]);
            b[at + 24..at + 32].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let sum = checksum(&b[..4088]);
    b[4088..4096].copy_from_slice(&sum.to_le_bytes());
}
