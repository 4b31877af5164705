//! Fuzzes `config.json`. The result must be an error with the field, or an architecture whose tensors can be listed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_runtime::parse_config;

fuzz_target!(|text: &str| {
    let Ok(config) = parse_config(text) else { return };
    // Architectures within the limits may still have thousands of layers, and millions of tensors.
    if config.spec.layers <= 64 {
        for tensor in config.spec.tensors().take(4096) {
            assert!(!tensor.shape.contains(&0), "{tensor:?}");
        }
    }
});
