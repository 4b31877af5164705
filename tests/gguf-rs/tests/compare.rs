//! Files that `gguf-rs` writes, and files of llama.cpp, are read alike by both readers: names, shapes, types and
//! places of tensors, and all metadata.

use std::path::Path;

use gguf_rs::get_gguf_container_array_size;
use gguf_rs::writer::{GGUFWriter, MetadataValue, TensorInfo};
use serde_json::Value as Json;
use stb_format::gguf::{Gguf, GgufType, GgufValue};

/// Blocks of every type, written by `format/tests/data/make_types.py`.
const TYPES: &[u8] = include_bytes!("../../../format/tests/data/types.gguf");

/// Types that gguf-rs 0.1.8 does not know (41 and 42), or for which it computes a wrong size.
fn is_wrong_there(kind: GgufType) -> bool {
    matches!(kind.name(), "Q1_0" | "Q2_0" | "IQ4_NL" | "BF16" | "MXFP4")
}

/// Reads a file with both readers and compares everything that both give.
fn compare(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let ours = Gguf::parse(&bytes).unwrap();
    let mut container = get_gguf_container_array_size(path.to_str().unwrap(), u64::MAX).unwrap();
    let theirs = container.decode().unwrap();
    assert_eq!(ours.metadata().len(), theirs.metadata().len());
    for ((key, value), (their_key, their_value)) in ours.metadata().zip(theirs.metadata()) {
        assert_eq!(key, their_key);
        assert!(is_equal(value, their_value), "{key}: {value:?} {their_value}");
    }
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    for (our, their) in ours.tensors().iter().zip(theirs.tensors()) {
        assert_eq!((our.name(), our.type_id()), (their.name.as_str(), their.kind));
        let reversed: Vec<u64> = their.shape.iter().rev().copied().collect();
        assert_eq!(our.shape(), reversed);
        assert_eq!(our.offset(), theirs.data_offset() + their.offset);
        let (kind, payload) = our.payload().unwrap();
        if !is_wrong_there(kind) {
            assert_eq!(payload.len() as u64, their.size, "{kind}");
        }
    }
}

/// Whether a value is the same. `gguf-rs` keeps numbers as decimal texts.
fn is_equal(ours: GgufValue<'_>, theirs: &Json) -> bool {
    let number = || theirs.as_number().map(ToString::to_string).unwrap_or_default();
    match ours {
        GgufValue::Unsigned(v) => number().parse() == Ok(v),
        GgufValue::Signed(v) => number().parse() == Ok(v),
        GgufValue::F32(v) => number().parse() == Ok(v),
        GgufValue::F64(v) => number().parse() == Ok(v),
        GgufValue::Bool(v) => theirs.as_bool() == Some(v),
        GgufValue::Text(v) => theirs.as_str() == Some(v),
        GgufValue::Array(v) => theirs.as_array().is_some_and(|list| {
            list.len() as u64 == v.len() && v.iter().zip(list).all(|(a, b)| is_equal(a, b))
        }),
    }
}

/// Our reader gives back what the writer of `gguf-rs` has written: every type and every kind of value.
#[test]
fn what_gguf_rs_writes() {
    let types = Gguf::parse(TYPES).unwrap();
    let stored: Vec<_> = types
        .tensors()
        .iter()
        .filter(|tensor| !is_wrong_there(tensor.payload().unwrap().0))
        .collect();
    assert_eq!(stored.len(), 2 * GgufType::ALL.len() - 5);
    let folder = tempfile::tempdir().unwrap();
    for version in [2, 3] {
        let path = folder.path().join("written.gguf");
        let mut writer = GGUFWriter::new(&path, version).unwrap();
        writer.add_metadata("general.architecture", "grüße");
        writer.add_metadata_u32("a.u32", u32::MAX);
        writer.add_metadata_i32("a.i32", i32::MIN);
        writer.add_metadata_u64("a.u64", u64::MAX);
        writer.add_metadata_f32("a.f32", 1e-5);
        writer.add_metadata_bool("a.bool", true);
        let texts = ["", "▁a", "b c"].map(|text| MetadataValue::String(text.into()));
        writer.add_metadata_array("a.texts", texts.to_vec());
        let floats = [-1.5, 0.0, 3.4e38].map(MetadataValue::Float32);
        writer.add_metadata_array("a.floats", floats.to_vec());
        let bytes = [0, 7, 255].map(MetadataValue::Uint8);
        writer.add_metadata_array("a.bytes", bytes.to_vec());
        for tensor in &stored {
            writer.add_tensor(TensorInfo {
                name: tensor.name().into(),
                shape: tensor.shape().iter().rev().copied().collect(),
                dtype: tensor.type_id(),
            });
        }
        writer.write().unwrap();
        for (i, tensor) in stored.iter().enumerate() {
            writer.write_tensor_data(i, tensor.payload().unwrap().1).unwrap();
        }
        writer.finalize().unwrap();
        drop(writer);
        compare(&path);
        let bytes = std::fs::read(&path).unwrap();
        let read = Gguf::parse(&bytes).unwrap();
        assert_eq!(read.version(), version as u32);
        for (read, stored) in read.tensors().iter().zip(&stored) {
            assert!(read.payload().unwrap() == stored.payload().unwrap(), "{}", stored.name());
        }
    }
}

/// Files of llama.cpp's converter, where the material next to the repository has them.
#[test]
fn what_llama_cpp_writes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let folder = root.join("shared/data/models/stories260k/gguf");
    let Ok(files) = std::fs::read_dir(&folder) else {
        eprintln!("SKIPPED: files of llama.cpp need the shared data");
        return;
    };
    for file in files {
        compare(&file.unwrap().path());
    }
}
