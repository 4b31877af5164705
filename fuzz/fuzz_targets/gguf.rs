//! Fuzzes GGUF files. The result must be an error, or a file whose values and tensors can be read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_format::gguf::{Gguf, GgufValue};

fuzz_target!(|data: &[u8]| {
    let Ok(file) = Gguf::parse(data) else { return };
    for (key, value) in file.metadata() {
        assert!(file.get(key).is_some());
        if let GgufValue::Array(array) = value {
            assert_eq!(array.iter().count() as u64, array.len());
        }
    }
    for tensor in file.tensors() {
        let Ok((kind, payload)) = tensor.payload() else { continue };
        // Payloads are inside the file and have the length of their shape.
        assert!(payload.len() <= data.len());
        assert_eq!(kind.byte_len(tensor.shape().iter().product()), Some(payload.len() as u64));
        let mut values = vec![0.0; 64 * kind.block_weights() as usize];
        kind.decode(payload, &mut values);
    }
});
