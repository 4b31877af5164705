//! Fuzzes `tokenizer.json`. The result must be an error, or a tokenizer that encodes and decodes texts in bounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_runtime::Tokenizer;

const TEXTS: [&str; 3] =
    ["Hello, world!\n\n 12 é 中", "aaaa  aaaa<s>", "\u{0}\u{1f600}\u{301} \r\n"];

fuzz_target!(|text: &str| {
    let Ok(tokenizer) = Tokenizer::new(text, None, Vec::new(), 1 << 20) else { return };
    for text in TEXTS {
        if let Ok(ids) = tokenizer.encode(text) {
            assert!(ids.iter().all(|id| *id < 1 << 20));
            let _ = tokenizer.decode(&ids);
        }
    }
});
